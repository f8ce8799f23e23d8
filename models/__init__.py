"""What is trained: one folder a family. Names load lazily: configurations need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import IGNORED, PackedBatch
    from .build import build_model, build_task
    from .task import BaseWeights, InitSpec, LossOutput, LossTerm, ParameterGroup, Task

__all__ = [
    "IGNORED",
    "BaseWeights",
    "InitSpec",
    "LossOutput",
    "LossTerm",
    "PackedBatch",
    "ParameterGroup",
    "Task",
    "build_model",
    "build_task",
]

_MODULES = {
    "IGNORED": "batch",
    "PackedBatch": "batch",
    "build_model": "build",
    "build_task": "build",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f".{_MODULES.get(name, 'task')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
