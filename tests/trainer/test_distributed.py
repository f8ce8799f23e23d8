"""Who a process is under each launcher, what is said where one is half there, and exchanges between real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch.distributed as dist
from ranks import free_port
from weft.models.errors import LaunchError
from weft.trainer.distributed import Topology, initialise_distributed, shutdown_distributed
from weft.trainer.slurm import first_host, rendezvous_port, slurm_rendezvous

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine the tests run on may itself be under torchrun or SLURM."""
    for name in [n for n in os.environ if n in LAUNCHER or n.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def join(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[list[Any], dict[str, Any]]:
    """Where the environment puts this process, and what it would have told torch."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: told.update(rest))
    monkeypatch.setattr("weft.trainer.distributed.join_store", lambda *_: None)
    monkeypatch.setattr(dist, "new_group", lambda **rest: told.update(host=rest["backend"]))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    t = initialise_distributed("cpu", timeout_s=5)
    return [t.rank, t.world_size, t.local_rank, t.local_world_size, t.is_main], told


HERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, [0, 1, 0, 1, True]),
        # torchrun on two nodes of four.
        (
            {
                "RANK": "6",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "2",
                "LOCAL_WORLD_SIZE": "4",
                "GROUP_RANK": "1",
                **HERE,
            },
            [6, 8, 2, 4, False],
        ),
        # A launcher that says no more than it must: one node.
        ({"RANK": "0", "WORLD_SIZE": "2", **HERE}, [0, 2, 0, 2, True]),
        ({"RANK": "0", "WORLD_SIZE": "1"}, [0, 1, 0, 1, True]),
        ({"WORLD_SIZE": "1"}, [0, 1, 0, 1, True]),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "4", **HERE}, [5, 8, 1, 4, False]),
        # A job script that exports the world size for torch.
        ({**SRUN, "WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "4", **HERE}, [5, 8, 1, 4, False]),
        # torchrun started by one srun task a node: torchrun's word counts.
        (
            {**SRUN, "RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", **HERE},
            [3, 16, 3, 16, False],
        ),
        # srun with nothing exported: the step's own numbers count, uneven nodes included.
        (
            {
                **SRUN,
                "SLURM_JOB_ID": "41",
                "SLURM_STEP_ID": "2",
                "SLURM_STEP_NUM_TASKS": "7",
                "SLURM_STEP_TASKS_PER_NODE": "4,3",
                "SLURM_STEP_NODELIST": "localhost",
            },
            [5, 7, 1, 3, False],
        ),
        # The batch script itself has the job's number of tasks and is none of them.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "41"}, [0, 1, 0, 1, True]),
        # A shell inside an allocation of one task.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, [0, 1, 0, 1, True]),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}, [0, 1, 0, 1, True]),
    ],
)
def test_places_by_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: list[Any]
) -> None:
    found, told = join(monkeypatch, **environment)
    assert found == place
    if place[1] == 1:
        assert told == {}, "one process needs no process group"
    else:
        assert (told["rank"], told["world_size"], told["host"]) == (place[0], place[1], "gloo")
        assert told["timeout"].total_seconds() == 5


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK is set but WORLD_SIZE is not; start with torchrun, or unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not; start with torchrun"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK is 'two', expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is '', expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 but WORLD_SIZE is 2; ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 ranks but no MASTER_ADDR and no MASTER_PORT; start"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            "2 ranks but no MASTER_PORT; start with torchrun, or export both",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x', expected a whole number",
        ),
        (SRUN, "8 ranks but no MASTER_ADDR and no MASTER_PORT; start with torchrun"),
    ],
)
def test_half_a_launcher_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        join(monkeypatch, **environment)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LaunchError, match=r"torch sees no CUDA device; set run\.device=cpu"):
        initialise_distributed("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", **HERE}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="local rank 2 has no GPU: this node shows 2"):
        initialise_distributed("auto")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-010,12],login", "gpu007"),
        ("gpu[3,5-9]", "gpu3"),
        ("rack[1-2]-node[08-11]", "rack1-node08"),
        ("a-b[02]-ib,c", "a-b02-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_where_the_ranks_of_a_step_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_rendezvous() == {}
    step = {"SLURM_PROCID": "1", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2"}
    for name, value in {**step, "SLURM_STEP_NODELIST": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert slurm_rendezvous() == {"MASTER_ADDR": "localhost", "MASTER_PORT": "20289"}
    # Jobs side by side on one node, and steps of one job, meet at other ports, none of them one that Linux hands out.
    ports = {rendezvous_port(job, step) for job in range(4000, 4010) for step in range(3)}
    assert len(ports) == 30
    assert all(20_000 <= port < 30_000 for port in ports)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "no-such-host.invalid")
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.1.2.3")
    assert slurm_rendezvous()["MASTER_ADDR"] == "10.1.2.3"


# Values whose JSON has other lengths on other ranks, characters of several bytes, and nothing at all.
VALUES = [{"text": "ä" * 1000, "n": [1, 2.5, None, True]}, ""]
LARGE = 2**53 + 1


def exchange(topology: Topology) -> dict[str, Any]:
    rank = topology.rank
    found = {
        "place": [topology.rank, topology.world_size, topology.is_main],
        "broadcast": [topology.broadcast_json(v if rank == 0 else ["not", "mine"]) for v in VALUES],
        "gathered": [topology.gather_json(VALUES[rank]), topology.gather_json(None)],
        "sums": topology.sum_integers([LARGE, LARGE * (rank + 1), -rank, 2**62 - 1 + rank, 0]),
        "none": topology.sum_integers([]),
        "float": topology.gather_json(0.1 + 0.2 * rank),
    }
    topology.barrier()
    return found


SLURM_TASK = """
import json, sys
sys.path[:0] = {path!r}
from test_distributed import exchange
from weft.trainer.distributed import initialise_distributed, shutdown_distributed

print(json.dumps(exchange(initialise_distributed("cpu", timeout_s=60))))
shutdown_distributed()
"""


def test_exchanges_of_two_tasks_of_srun() -> None:
    shared = {
        **os.environ,
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM_TASK.format(path=[p for p in sys.path if p])],
            env={**shared, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        outputs = [task.communicate(timeout=100) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    found = [json.loads(out) for out, _ in outputs]
    assert [f.pop("place") for f in found] == [[0, 2, True], [1, 2, False]]
    assert found[0] == found[1]
    assert found[0]["broadcast"] == VALUES
    assert found[0]["gathered"] == [VALUES, [None, None]]
    # In float64 the first of these would be even.
    assert found[0]["sums"] == [2 * LARGE, 3 * LARGE, -1, 2**63 - 1, 0]
    assert found[0]["none"] == []
    assert found[0]["float"] == [0.1, 0.1 + 0.2]


def test_one_process_exchanges_with_itself_as_several_would() -> None:
    alone = Topology()
    alone.barrier()
    for value in VALUES:
        assert alone.broadcast_json(value) == value
        assert alone.gather_json(value) == [json.loads(json.dumps(value))]
    assert alone.sum_integers([LARGE, 2]) == [LARGE, 2]
    shutdown_distributed()
    assert not dist.is_initialized()
