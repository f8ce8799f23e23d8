"""Spike score: how often a curve leaves its own recent past (OLMo 2, arXiv 2501.00656, section 3).

The share of all values so far that lie at least 7 standard deviations from the mean of the 1000
values before them. The state is the window and two counts, all of which metrics.jsonl holds
already, so a resumed run rebuilds it from there and checkpoints need not carry it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["SpikeMonitor", "SpikeScore"]

WINDOW = 1000
MINIMUM = 128
"""Values needed before one is judged: the deviation of a few is no measure."""
SIGMAS = 7.0


class SpikeScore:
    """Score of one curve. Values that are not finite count as spikes and stay out of the window."""

    def __init__(
        self, window: int = WINDOW, minimum: int = MINIMUM, sigmas: float = SIGMAS
    ) -> None:
        self.minimum, self.sigmas = minimum, sigmas
        self.values = 0
        self.spikes = 0
        self._window = np.empty(window)
        self._stored = 0

    @property
    def score(self) -> float:
        return self.spikes / self.values if self.values else 0.0

    def add(self, value: float) -> bool:
        """Judge a value against those before it, then remember it; True for a spike."""
        is_spike = self._is_spike(value)
        self.spikes += is_spike
        self.restore(value)
        return is_spike

    def restore(self, value: float) -> None:
        """Remember a value that was judged in an earlier attempt."""
        self.values += 1
        if math.isfinite(value):
            self._window[self._stored % len(self._window)] = value
            self._stored += 1

    def _is_spike(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if self._stored < self.minimum:
            return False
        past = self._window[: self._stored]
        # Two passes, afresh each time: running sums never recover from one huge value.
        distance = abs(value - past.mean())
        return bool(distance > 0 and distance >= self.sigmas * past.std(ddof=1))


class SpikeMonitor:
    """Spike scores of the loss and the gradient norm, as metrics of each step."""

    CURVES = ("loss", "grad_norm")

    def __init__(self) -> None:
        self.scores = {name: SpikeScore() for name in self.CURVES}

    def judge(self, record: Mapping[str, Any]) -> dict[str, float | int]:
        """`NAME_spikes` (count so far) and `NAME_spike_score` (their share) for each curve in a record."""
        found: dict[str, float | int] = {}
        for name, score in self.scores.items():
            if name in record:
                score.add(record[name])
                found |= {f"{name}_spikes": score.spikes, f"{name}_spike_score": score.score}
        return found

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take one record of an earlier attempt, in order of step."""
        for name, score in self.scores.items():
            if name in record:
                score.restore(record[name])
                score.spikes = record.get(f"{name}_spikes", score.spikes)
