"""From a model configuration to its task and networks; a family is found by its module's name."""

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
    family = config.family  # type: ignore[attr-defined]
    module = importlib.import_module(f".{family}.task", __package__)
    return module.build_task(config)


def build_model(
    config: Section, device: torch.device | str | None = None, seed: int = 0
) -> nn.Module:
    """A family's network with start values, for library use; several come as a ModuleDict."""
    task = build_task(config)
    with torch.device("meta"):
        networks = task.build_networks()
    for name, network in networks.items():
        network.to_empty(device=device or "cpu")
        initialise_module(network, name, task, seed)
    return next(iter(networks.values())) if len(networks) == 1 else nn.ModuleDict(networks)
