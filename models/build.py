"""From a model configuration to its task and networks. A family is found by its module name, nothing else."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from .initialise import initialise_module
from .section import Section
from .task import Task

__all__ = ["build_model", "build_task"]


def build_task(config: Section) -> Task:
    """The task of `config.family`: `build_task` in `weft.models.FAMILY.task`."""
    module = importlib.import_module(f".{config.family}.task", __package__)  # type: ignore[attr-defined]
    return module.build_task(config)


def build_model(config: Section, *, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
    """A family's network with start values, for use as a library; families with several give a ModuleDict."""
    task = build_task(config)
    with torch.device("meta"):
        networks = task.build_networks()
    for name, network in networks.items():
        network.to_empty(device=device)
        initialise_module(network, name, task, seed)
    return next(iter(networks.values())) if len(networks) == 1 else nn.ModuleDict(networks)
