"""Shared by all tests: no network, fixed seeds, one thread (two workers share the machine's cores)."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides between its interpreter and its compiler when a kernel's module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def group_of(nodeid: str) -> str:
    """What has to run on one worker with a test: it shares a cluster, a compiler or a run with others; else the test alone.

    By name, because xdist's own marks reach its scheduler inside the names of tests, and not under every pytest.
    """
    path = nodeid.partition("::")[0]
    if path.startswith("tests/slurm/"):
        return "slurm"
    if "sm90" in nodeid:
        return "sm90"
    return path if _has_shared_fixture(path) else nodeid


@functools.cache
def _has_shared_fixture(path: str) -> bool:
    file = Path(__file__).parents[1] / path
    return file.is_file() and 'scope="module"' in file.read_text()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a worker of xdist: groups first, and of them the one that waits for a scheduler; single tests even out the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    group = group_of(nodeid)
    return 0 if group == "slurm" else 2 if group == nodeid else 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
