"""Where the ranks of a step meet, with ports that other programs really have."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist
from weft.models.errors import RankLostError
from weft.trainer import rendezvous
from weft.trainer.distributed import initialise_distributed
from weft.trainer.exit_codes import ExitCode
from weft.trainer.rendezvous import join_store

STEP = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0"}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Another program's port; it takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def other_store() -> dist.TCPStore:
    """The store of another job."""
    store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=5), wait_for_workers=False)
    store.set("weft/.40.0..", "")
    return store


@pytest.fixture(autouse=True)
def _a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [n for n in os.environ if n in launcher or n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)


def meet_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def refusal(rank: int, monkeypatch: pytest.MonkeyPatch, port: int, **launcher: str) -> str:
    meet_at(monkeypatch, port)
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLostError) as caught:
        initialise_distributed("cpu", timeout_s=1)
    assert not dist.is_initialized()
    assert caught.value.exit_code == ExitCode.MACHINE
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "WORLD_SIZE": "2"}], ids=["srun", "other"])
def test_rank_0_names_the_port_that_is_taken(
    launcher: dict[str, str], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listener.getsockname()[1]
    assert refusal(0, monkeypatch, port, **launcher) == (
        f"port {port} of 127.0.0.1 is taken by another program; "
        "export MASTER_PORT=... (a free one), or start again"
    )


def test_the_others_do_not_wait_for_a_program_that_says_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listener.getsockname()[1]
    begin = time.monotonic()
    said = refusal(1, monkeypatch, port)
    assert time.monotonic() - begin < 10
    assert f"port {port} of 127.0.0.1 is taken by another program, which does not answer" in said
    assert "(it says nothing); export MASTER_PORT=" in said


def test_the_others_do_not_join_another_job(
    other_store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(1, monkeypatch, other_store.port)
    assert f"port {other_store.port} of 127.0.0.1 is taken by another program" in said
    # Rank 0 of that job would count us among its own.
    assert "is taken by another program; " in refusal(0, monkeypatch, other_store.port)


def test_a_rank_0_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        said = refusal(1, monkeypatch, bound.getsockname()[1])
    assert "rank 0 did not come to 127.0.0.1:" in said
    assert "are all ranks running" in said


def test_ranks_meet_whoever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ANSWER_S", 10.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet_at(monkeypatch, probe.getsockname()[1])
    stores: list[dist.Store] = []
    early = threading.Thread(target=lambda: stores.append(join_store(1, 2, 20)))
    early.start()
    time.sleep(0.1)
    mine = join_store(0, 2, 20)
    early.join(20)
    mine.set("said", "something")
    assert stores[0].get("said") == b"something"
    assert stores[0].timeout == timedelta(seconds=20)
