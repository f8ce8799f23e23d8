"""Shared by all tests: no network, fixed seeds, one thread (two workers share the machine's cores)."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides between its interpreter and its compiler when a kernel's module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under xdist: tests that share a run, or a compiler, go to one worker, and go first; single tests even out the end."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None and (name := _group_of(item)):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=_place)


def _group_of(item: pytest.Item) -> str | None:
    if "sm90" in item.nodeid:
        return "sm90"
    fixtures = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
    is_shared = any(f.scope == "module" for found in fixtures for f in found)
    return item.path.name if is_shared else None


def _place(item: pytest.Item) -> int:
    """The tests on a scheduler first: they are the longest group, and wait for most of it."""
    mark = item.get_closest_marker("xdist_group")
    return 2 if mark is None else 1 - (mark.args[0] == "slurm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
