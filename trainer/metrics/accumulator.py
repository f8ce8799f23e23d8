"""Keeps the values of steps where they are, on the device, until a flush fetches all of them at once.

Asking a GPU for one number waits for everything queued before it. So a step only leaves references
here, and a flush is one stacked copy for each type of value, whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["MetricsAccumulator"]

Number = float | int


class MetricsAccumulator:
    """Values of the steps since the last flush."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, Tensor | Number]]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, step: int, values: Mapping[str, Tensor | Number]) -> None:
        """Remember a step's values; never waits for the device.

        Args:
            values: numbers, and () or (1,) tensors on any device. Tensors are kept by reference, so what
                is handed over must not be written to later.
        """
        self._pending.append((step, dict(values)))

    def flush(self) -> list[dict[str, Number]]:
        """Records of all steps since the last flush, `step` first, as Python numbers."""
        pending, self._pending = self._pending, []
        places: dict[tuple[torch.device, torch.dtype], list[tuple[int, str]]] = {}
        for index, (_, values) in enumerate(pending):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    places.setdefault((value.device, value.dtype), []).append((index, name))
        records: list[dict[str, Number]] = [{"step": step, **values} for step, values in pending]  # type: ignore[dict-item]
        for group in places.values():
            stacked = torch.stack([pending[i][1][name].detach().reshape(()) for i, name in group])  # type: ignore[union-attr]
            for (index, name), value in zip(group, stacked.cpu().tolist(), strict=True):
                records[index][name] = value
        return records
