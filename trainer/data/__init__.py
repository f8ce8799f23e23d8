"""Data: sources prepared into shards, an order that is a function, packed batches.

Names load on use, so that configurations load without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig
    from .dataset import Dataset, open_data
    from .loader import PackedLoader, StepBatch, held_out_batches
    from .prepare import prepare_source
    from .vocabulary import Vocabulary, open_vocabulary

__all__ = [
    "DataConfig",
    "Dataset",
    "PackedLoader",
    "StepBatch",
    "Vocabulary",
    "held_out_batches",
    "open_data",
    "open_vocabulary",
    "prepare_source",
]

_HOMES = {
    "DataConfig": "config",
    "Dataset": "dataset",
    "open_data": "dataset",
    "PackedLoader": "loader",
    "StepBatch": "loader",
    "held_out_batches": "loader",
    "prepare_source": "prepare",
    "Vocabulary": "vocabulary",
    "open_vocabulary": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
