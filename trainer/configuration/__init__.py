"""Configuration of a run: recipes, overrides, validation. No module of this package imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checks import check_against_world
    from .load import Loaded, config_hash, dump_config, load_config, load_run_config
    from .schema import TrainingConfig

__all__ = [
    "Loaded",
    "TrainingConfig",
    "check_against_world",
    "config_hash",
    "dump_config",
    "load_config",
    "load_run_config",
]

_MODULES = {"check_against_world": "checks", "TrainingConfig": "schema"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = importlib.import_module(f".{_MODULES.get(name, 'load')}", __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
