"""The accelerate engine does what `accelerate config` says, refuses what contradicts the run, and changes places with torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import free_port
from test_resume import resume, run_new
from tiny_run import EXACT, trace, write_recipe
from weft.launch.local import LocalRanks
from weft.models.errors import ConfigError, LaunchError
from weft.trainer.distributed import Topology
from weft.trainer.engines.accelerate_engine import _check_settings, _read_settings
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig

STEPS = 12
SIZE = {"train__steps": STEPS, "checkpoint__every": 4, "schedule__horizon_steps": STEPS}
ACCELERATE = "parallel.engine=accelerate"


def check(
    settings: dict[str, Any], world: int = 2, strategy: str = "auto", compute: str = "fp32"
) -> str:
    return _check_settings(
        settings,
        ParallelConfig(engine="accelerate", strategy=strategy),
        PrecisionConfig(compute=compute),
        Topology(0, world),
    )


@pytest.mark.parametrize(
    ("settings", "world", "strategy"),
    [
        ({}, 1, "single"),
        ({}, 2, "ddp"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2, "mixed_precision": "no"}, 2, "ddp"),
        ({"distributed_type": "MULTI_GPU"}, 1, "single"),
        ({"distributed_type": "NO"}, 2, "ddp"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, 2, "fsdp"),
    ],
)
def test_the_strategy_is_what_the_config_means(
    settings: dict[str, Any], world: int, strategy: str
) -> None:
    assert check(settings, world) == strategy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mixed_precision": "bf16"},
            "is bf16 but precision.compute is fp32; set precision.compute=bf16",
        ),
        ({"mixed_precision": "fp16"}, "is fp16; Weft computes in fp32 or bf16"),
        ({"gradient_accumulation_steps": 4}, "is 4; Weft accumulates by train.micro_batch_tokens"),
        (
            {"num_processes": 8},
            "num_processes is 8 but 2 were started; start with: accelerate launch",
        ),
        ({"distributed_type": "DEEPSPEED"}, "is DEEPSPEED; set parallel.engine=deepspeed"),
        ({"distributed_type": "XLA"}, "is XLA; choose multi-CPU, multi-GPU or FSDP"),
        ({"distributed_type": "FSDP"}, "fsdp_version is 1; Weft shards with FSDP2"),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
            },
            "Weft offloads through parallel.engine=deepspeed",
        ),
    ],
)
def test_what_contradicts_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(settings)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_strategy_of_ones_own_must_be_the_configs() -> None:
    assert check({}, strategy="ddp") == "ddp"
    with pytest.raises(
        ConfigError, match=r"parallel\.strategy is fsdp but accelerate's .* MULTI_CPU"
    ):
        check({}, strategy="fsdp")


def test_the_file_and_the_environment_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 4}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**content, "fsdp_config": {"fsdp_version": 2}}))
    read = _read_settings(str(path))
    assert {name: read[name] for name in content} == content
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
    }.items():
        monkeypatch.setenv(name, value)
    read = _read_settings(None)
    assert (read["distributed_type"], read["mixed_precision"]) == ("FSDP", "bf16")
    assert read["fsdp_config"]["fsdp_version"] == 2
    with pytest.raises(
        ConfigError, match=r"there is no file .*nowhere; write one with: accelerate config"
    ):
        _read_settings(str(tmp_path / "nowhere"))
    path.write_text("distributed_type: FSDP\nnum_machnes: 3\n")
    with pytest.raises(ConfigError, match=r"is no accelerate config: .*num_machnes"):
        _read_settings(str(path))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(LaunchError, match=r"pip install 'weft\[accelerate\]'"):
        run_new(tmp_path, ACCELERATE)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("undisturbed"), **SIZE)


def same_but_for_sums(run: Path, other: Path) -> None:
    for ours, theirs in zip(trace(run), trace(other), strict=True):
        for name, a, b in zip(EXACT, ours, theirs, strict=False):
            is_sum = name in ("loss", "z_loss", "grad_norm", "bits_per_byte")
            assert a == (pytest.approx(b, rel=1e-5) if is_sum else b), name


def test_a_run_goes_from_torch_to_accelerate_and_back(tmp_path: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, **{**SIZE, "train__steps": 4})
    run = tmp_path / "run"
    for number, arguments in enumerate(
        ([str(recipe)], ["--resume", str(run), "train.steps=8", ACCELERATE])
    ):
        group = LocalRanks(["train", *arguments], 2, tmp_path / "logs" / str(number))
        assert group.wait() == [0, 0], group.tail()
    assert resume(run, f"train.steps={STEPS}", "parallel.engine=torch") == 0
    same_but_for_sums(run, undisturbed)


@pytest.mark.parametrize("engine", ["torch", "accelerate"])
def test_accelerate_launch_starts_the_same_run(
    tmp_path: Path, undisturbed: Path, engine: str
) -> None:
    recipe = write_recipe(tmp_path, **SIZE, parallel__engine=engine)
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    port = ["--main_process_port", str(free_port()), "--mixed_precision", "no"]
    done = subprocess.run(
        [sys.executable, *command, *port, "-m", "weft", "train", str(recipe)],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same_but_for_sums(tmp_path / "run", undisturbed)
