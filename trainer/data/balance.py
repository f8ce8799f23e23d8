"""Which rank takes which rows of a step, so that patches are spread evenly where bytes already are.

Every rank has the same number of rows, hence bytes. How many patches a row has is known where patches are stored; the
rows of a step are then dealt out by it. The dealing is a pure function of the step's rows: on another number of ranks a
step has the same rows, and its loss differs by the order of summation alone.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

__all__ = ["deal_rows", "rank_balance"]


def deal_rows(loads: NDArray[np.int64], ranks: int, micro_rows: int) -> list[NDArray[np.int64]]:
    """Rows of each rank, micro-batch after micro-batch, each in ascending order.

    The heaviest row that is left goes to the rank with the least load that has room; so within a rank to
    its micro-batches. Ties go to the lower number.

    Args:
        loads: (R,) patches of each row, R a multiple of `ranks`.
        micro_rows: rows of one micro-batch, which divides R / ranks.
    """
    share = len(loads) // ranks
    dealt = []
    for rows in _deal(np.arange(len(loads)), loads, ranks):
        dealt.append(np.concatenate(_deal(rows, loads[rows], share // micro_rows)))
    return dealt


def _deal(rows: NDArray[np.int64], loads: NDArray[np.int64], hands: int) -> list[NDArray[np.int64]]:
    room = len(rows) // hands
    held: list[list[int]] = [[] for _ in range(hands)]
    # (load, number) of the hands with room: a full one does not come back.
    waiting = [(0, hand) for hand in range(hands)]
    for place in np.argsort(-loads, kind="stable").tolist():
        total, hand = heapq.heappop(waiting)
        held[hand].append(int(rows[place]))
        if len(held[hand]) < room:
            heapq.heappush(waiting, (total + int(loads[place]), hand))
    return [np.array(sorted(hand), np.int64) for hand in held]


def rank_balance(loads: NDArray[np.int64], dealt: list[NDArray[np.int64]]) -> float:
    """Patches of the fullest rank over the mean of all; 1 is even."""
    totals = np.array([loads[rows].sum() for rows in dealt], np.float64)
    return float(totals.max() / totals.mean()) if totals.mean() else 1.0
