"""Finds long runs of a repeated n-gram, which make losses spike (OLMo 2, arXiv 2501.00656, section
3.3.1).

A run is a stretch where an n-gram of `period` tokens follows itself at least `max_count` times:
exactly 32 trigger with the default, 31 do not. Used on rows by the loader and on documents by
preparation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
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
    # In n repeats of a period, all ids but the first period's equal the one a period back.
    longest = rows.shape[1] // settings.max_count
    periods = np.arange(settings.min_period, min(settings.max_period, longest) + 1)
    if not len(periods) or not len(rows):
        return found
    runs = (settings.max_count - 1) * periods
    which, suspects = _suspects(rows, periods, runs)
    for i in np.unique(which):
        unsure = suspects[which == i]
        unsure = unsure[~found[unsure]]
        found[unsure] = _have_run(rows[unsure], int(periods[i]), int(runs[i]))
    return found


def _suspects(
    rows: NDArray[Any], periods: NDArray[np.int64], runs: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (index of a period, row) that may have a run; no other pair has. Looks at few positions
    of each.
    """
    stride = max(1, int(runs[0]) // SAMPLES_IN_A_RUN)
    together = _sampled_repeats(rows, periods, stride)  # (P, R, samples)
    samples = 1
    while (
        samples < SAMPLES_IN_A_RUN
        and together.shape[2] > samples
        and runs[0] // stride >= 2 * samples
    ):
        together = together[:, :, :-samples] & together[:, :, samples:]
        samples *= 2
    # `together[..., i]` says that `samples` sampled positions from the i-th on all repeat. Few
    # pairs are left now.
    which, row = np.nonzero(together.any(axis=2))
    left = together[which, row]
    needed = runs[which] // stride
    while (further := needed >= 2 * samples).any():
        longer = left[:, :-samples] & left[:, samples:]
        stays = ~further | longer.any(axis=1)
        which, row, needed, left = which[stays], row[stays], needed[stays], longer[stays]
        samples *= 2
    return which, row


def _sampled_repeats(
    rows: NDArray[Any], periods: NDArray[np.int64], stride: int
) -> NDArray[np.bool_]:
    """(P, R, samples) bool, whether every `stride`-th id of a row equals the one a period after
    it.
    """
    count, length = rows.shape
    padded = np.zeros((count, length + int(periods[-1])), rows.dtype)
    padded[:, :length] = rows
    row_step, id_step = padded.strides
    shifted = as_strided(
        padded[:, periods[0] :],
        (len(periods), count, -(-length // stride)),
        (id_step, row_step, id_step * stride),
        writeable=False,
    )
    together = np.empty(shifted.shape, bool)
    np.equal(shifted, rows[None, :, ::stride], out=together)
    # Behind the end stands padding, which may equal an id.
    together &= (np.arange(0, length, stride) + periods[:, None] < length)[:, None]
    return together


def _have_run(rows: NDArray[Any], period: int, run: int) -> NDArray[np.bool_]:
    """(R,) bool, whether so many positions in a row equal the one a period earlier."""
    width = rows.shape[1] - period + 1
    is_break = np.ones((len(rows), width), bool)
    # The last column stays a break, so that no run goes on into the next row.
    np.not_equal(rows[:, period:], rows[:, :-period], out=is_break[:, :-1])
    breaks = np.flatnonzero(is_break)
    lengths = np.diff(breaks, prepend=-1) - 1
    found = np.zeros(len(rows), bool)
    found[breaks[lengths >= run] // width] = True
    return found
