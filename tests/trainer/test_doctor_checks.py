"""Single checks of the doctor against faults of one machine."""

from __future__ import annotations

import shutil
import socket
from collections import namedtuple
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from weft.trainer.doctor import compute, gpus, network, storage, system
from weft.trainer.doctor.context import Context
from weft.trainer.doctor.place import Place

Usage = namedtuple("Usage", "total used free")

SMI = """#!/bin/sh
case "$1" in
  *name,driver_version*) echo "0, NVIDIA H100, 550.1, 81559"; echo "1, NVIDIA H100, 550.1, 81559";;
  *memory.used*) echo "0, 4"; echo "1, @USED@";;
  *ecc.errors*) echo "0, 0"; echo "1, @ECC@";;
  *remapped*) echo "0, 0, 0"; echo "1, @PENDING@, 0";;
  *clocks_event*) echo 'Field "clocks_event_reasons.hw_slowdown" is not a valid field'; exit 2;;
  *clocks_throttle*) echo "0, Not Active, Not Active, Not Active, Not Active"; echo "1, Not Active, @HOT@, Not Active, Not Active";;
esac
"""
HEALTHY = {"USED": "4", "ECC": "0", "PENDING": "0", "HOT": "Not Active"}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Place(), tmp_path, is_quick=True, environment={})


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs an nvidia-smi that answers for two GPUs."""

    def install(**values: str) -> None:
        text = SMI
        for name, value in {**HEALTHY, **values}.items():
            text = text.replace(f"@{name}@", value)
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").write_text(text)
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    return install


def test_healthy_gpus(context: Context, smi: Any) -> None:
    smi()
    found = [
        check(context)
        for check in (
            gpus.check_driver,
            gpus.check_gpu_memory,
            gpus.check_ecc,
            gpus.check_throttling,
        )
    ]
    assert [f.status for f in found] == ["ok"] * 4
    assert found[0].found == "2 x NVIDIA H100, 80 GiB, driver 550.1"
    assert found[0].facts["driver"] == "550.1"


@pytest.mark.parametrize(
    ("fault", "check", "status", "said"),
    [
        ({"USED": "40960"}, gpus.check_gpu_memory, "fail", "GPU 1: 40.0 GiB"),
        ({"ECC": "3"}, gpus.check_ecc, "fail", "GPU 1 has 3"),
        ({"PENDING": "1"}, gpus.check_ecc, "fail", "GPU 1 wait to be remapped"),
        ({"HOT": "Active"}, gpus.check_throttling, "warn", "GPU 1 (hw_thermal_slowdown)"),
    ],
)
def test_sick_gpus(
    context: Context, smi: Any, fault: dict[str, str], check: Any, status: str, said: str
) -> None:
    smi(**fault)
    found = check(context)
    assert found.status == status
    assert said in found.found
    assert found.mend
    # What is wrong with a GPU of another job is not ours.
    ours = replace(context, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert check(ours).status == "ok"


def test_without_a_gpu_the_checks_say_so(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for check in (gpus.check_driver, gpus.check_gpu_memory, gpus.check_ecc, gpus.check_throttling):
        found = check(context)
        assert (found.status, found.found) == ("skipped", "no GPU")


def test_a_full_disk(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10_000_000)
    found = storage.check_disk_space(context)
    assert (found.status, found.blame) == ("fail", "configuration")

    def full(path: Path, size: int) -> float:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_write", full)
    found = storage.check_disk_speed(context)
    assert found.status == "fail"
    assert "No space left on device" in found.found
    assert list(context.run_dir.iterdir()) == []


def test_a_slow_disk(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_write", lambda path, size: size / 10e6)
    found = storage.check_disk_speed(context)
    assert found.status == "warn"
    assert "10 MB/s" in found.found


def test_a_triton_cache_on_a_network(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "file_system_of", lambda path: "nfs4")
    given = replace(context, environment={"TRITON_CACHE_DIR": str(context.run_dir / "cache")})
    found = storage.check_triton_cache(given)
    assert found.status == "warn"
    assert "nfs4" in found.found


def test_a_port_that_is_taken(context: Context) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = Place(0, 2, host="n0", address="127.0.0.1", port=port)
        found = network.check_master_port(replace(context, place=place))
        assert (found.status, found.blame) == ("fail", "configuration")
        assert str(port) in found.found
        held = replace(place, is_held_by_agent=True)
        assert network.check_master_port(replace(context, place=held)).status == "ok"
    assert network.check_master_port(replace(context, place=place)).status == "ok"


def test_loopback(context: Context) -> None:
    assert network.check_loopback(context).status == "ok"


def test_missing_packages(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    found = system.check_packages(context)
    assert found.status == "ok"
    assert "deepspeed (pip install 'weft[deepspeed]')" in found.found
    assert found.facts["deepspeed"] == "absent"
    (context.run_dir / "config.yaml").write_text(
        yaml.safe_dump(
            {"parallel": {"engine": "deepspeed"}, "logging": {"wandb": {"enabled": True}}}
        )
    )
    asked = replace(context)
    for check in (system.check_packages, system.check_wandb):
        found = check(asked)
        assert (found.status, found.blame) == ("fail", "configuration")
        assert "pip install" in found.mend


def test_wandb_key(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "none is needed" in system.check_wandb(context).found
    (tmp_path / "config.yaml").write_text("logging: {wandb: {enabled: true}}")
    context = replace(context)
    assert system.check_wandb(context).status == "fail"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-to-be-shown\n")
    found = system.check_wandb(context)
    assert found.status == "ok"
    assert "not-to-be-shown" not in found.found
    assert (
        system.check_wandb(replace(context, environment={"WANDB_MODE": "offline"})).status == "ok"
    )


def test_a_name_that_does_not_resolve(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    found = system.check_hostname(context)
    assert found.status == "fail"
    assert "/etc/hosts" in found.mend


def test_little_shared_memory_and_few_files(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert system.check_shared_memory(context).status == "warn"
    monkeypatch.setattr(system.resource, "getrlimit", lambda kind: (1024, 1024))
    found = system.check_limits(context)
    assert found.status == "warn"
    assert "open files 1,024" in found.found


def test_a_device_that_multiplies_wrongly(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compute.check_matmul(context).status == "ok"
    monkeypatch.setattr(compute, "_matmul_error", lambda device: float("inf"))
    found = compute.check_matmul(context)
    assert (found.status, found.blame) == ("fail", "node")


def test_the_error_of_a_product_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.to
    assert compute._matmul_error(torch.device("cpu")) < 1e-6
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: right(self, device) * float("nan"))
    assert compute._matmul_error(torch.device("cpu")) == float("inf")


def test_file_systems() -> None:
    assert storage.file_system_of(Path("/proc")) == "proc"
    assert storage.nearest_folder(Path("/proc/not/there")) == Path("/proc")
