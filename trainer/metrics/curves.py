"""Curves of runs against each other: who reaches whose final value at what cost, and where they cross. NumPy alone.

Smaller values are better. Between two records a curve is a straight line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Crossover", "Curve", "crossover", "first_reach", "smooth", "smoothed"]


@dataclass(frozen=True)
class Curve:
    """A value over a cost.

    Args:
        x: (N,) cost so far, rising.
        y: (N,) values.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Crossover:
    """How two curves lie over the costs that both have seen.

    Args:
        x, y: the last place where they cross; None where one leads throughout.
        leader: 0 or 1, which is lower from there on; None where they are equal.
        count: how often they cross.
    """

    x: float | None
    y: float | None
    leader: int | None
    count: int


def smooth(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """(N,) running mean over `half` values to each side; centred, so that it does not lag behind."""
    sums = np.concatenate([[0.0], values.cumsum()])
    places = np.arange(len(values))
    # The window shrinks evenly at both ends: a one-sided one would bend the curve there.
    reach = np.minimum(half, np.minimum(places, len(values) - 1 - places))
    # The last values are of one step; a mean of the newest few says more.
    reach_back = np.maximum(reach, np.minimum(places, half // 2))
    return (sums[places + reach + 1] - sums[places - reach_back]) / (reach + reach_back + 1)


def smoothed(curve: Curve, window: int) -> Curve:
    """A curve whose values are means over about `window` records; 1 leaves it as it is."""
    return Curve(curve.x, smooth(curve.y, window // 2))


def first_reach(curve: Curve, value: float) -> float | None:
    """The cost at which a curve is first at a value or below; None where it never is."""
    below = np.flatnonzero(curve.y <= value)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(curve.x[0])
    drop = curve.y[i - 1] - curve.y[i]
    part = (curve.y[i - 1] - value) / drop
    return float(curve.x[i - 1] + part * (curve.x[i] - curve.x[i - 1]))


def crossover(a: Curve, b: Curve) -> Crossover | None:
    """How two curves lie to each other; None where no cost is common to both."""
    low, high = max(a.x[0], b.x[0]), min(a.x[-1], b.x[-1])
    if low > high:
        return None
    inner = np.concatenate([a.x, b.x])
    x = np.unique(np.concatenate([[low, high], inner[(inner > low) & (inner < high)]]))
    ya, yb = np.interp(x, a.x, a.y), np.interp(x, b.x, b.y)
    gap = ya - yb
    apart = np.flatnonzero(gap)
    if not len(apart):
        return Crossover(None, None, None, 0)
    signs = np.sign(gap[apart])
    turns = np.flatnonzero(signs[1:] != signs[:-1])
    leader = 0 if signs[-1] < 0 else 1
    if not len(turns):
        return Crossover(None, None, leader, 0)
    # Where they touch for a while between the two sides, the end of that is where the leader leaves.
    last = int(apart[turns[-1] + 1])
    before = last - 1
    part = gap[before] / (gap[before] - gap[last])
    place = float(x[before] + part * (x[last] - x[before]))
    return Crossover(place, float(np.interp(place, a.x, a.y)), leader, len(turns))
