"""Finds long runs of a repeated n-gram, which make losses spike (OLMo 2, arXiv 2501.00656, section 3.3.1).

A run is a stretch where an n-gram of `period` tokens follows itself at least `max_count` times: exactly 32
trigger with the default, 31 do not. Used on rows by the loader and on documents by preparation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import RepeatFilterConfig

__all__ = ["find_repetitive_rows"]

# A run covers at least this many sampled positions, so that few rows pass the screen by chance.
SAMPLES_IN_A_RUN = 4


def find_repetitive_rows(rows: NDArray[Any], settings: RepeatFilterConfig) -> NDArray[np.bool_]:
    """Which rows hold a run.

    Args:
        rows: (R, L) ids of any integer type.

    Returns:
        (R,) bool.
    """
    found = np.zeros(len(rows), bool)
    for period in range(settings.min_period, settings.max_period + 1):
        # In n repeats of a period, all but the first equal the id one period back.
        run = (settings.max_count - 1) * period
        for row in np.flatnonzero(_may_have_run(rows, period, run) & ~found):
            found[row] = _longest_run(rows[row], period) >= run
    return found


def _may_have_run(rows: NDArray[Any], period: int, run: int) -> NDArray[np.bool_]:
    """(R,) bool, false only where no run can be: looks at a few positions of every possible run."""
    positions = rows.shape[1] - period
    if positions < run:
        return np.zeros(len(rows), bool)
    stride = max(1, run // SAMPLES_IN_A_RUN)
    equal = rows[:, :positions:stride] == rows[:, period::stride]
    together = min(SAMPLES_IN_A_RUN, run // stride)
    width = equal.shape[1] - together + 1
    hits = equal[:, :width].copy()
    for shift in range(1, together):
        hits &= equal[:, shift : shift + width]
    return hits.any(axis=1)


def _longest_run(row: NDArray[Any], period: int) -> int:
    """Most consecutive positions that equal the one a period earlier."""
    breaks = np.flatnonzero(row[period:] != row[:-period])
    edges = np.concatenate(([-1], breaks, [len(row) - period]))
    return int(np.diff(edges).max()) - 1
