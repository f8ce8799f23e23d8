"""Where a run's numbers go: metrics.jsonl, the terminal, W&B, TensorBoard, plots. Names load on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accumulator import MetricsAccumulator
    from .config import LoggingConfig
    from .plot import plot_run
    from .progress import Progress
    from .recorder import MetricsRecorder
    from .records import read_metrics

__all__ = [
    "LoggingConfig",
    "MetricsAccumulator",
    "MetricsRecorder",
    "Progress",
    "plot_run",
    "read_metrics",
]

_HOMES = {
    "LoggingConfig": "config",
    "MetricsAccumulator": "accumulator",
    "MetricsRecorder": "recorder",
    "Progress": "progress",
    "plot_run": "plot",
    "read_metrics": "records",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
