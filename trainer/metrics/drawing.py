"""What Weft's pictures share: colours, axes, numbers on them. matplotlib is imported on use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "Points",
    "new_figure",
    "save_figure",
    "short_count",
    "style_axes",
    "thin",
]

INK, MUTED, GRID = "#24292f", "#6e7781", "#e6e8eb"
MAX_POINTS = 4000

Points = tuple[NDArray[np.float64], NDArray[np.float64]]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    # Not pyplot: no global state, no window system, safe in a thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    return figure


def style_axes(axes: Axes) -> None:
    """Light grid, two spines, readable ticks."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=10)


def short_count(value: float) -> str:
    """250K and 2B, where engineers say 250k and 2G; 3.1e+18 past all names."""
    from matplotlib.ticker import EngFormatter

    if abs(value) >= 1e15:
        return f"{value:.3g}"
    return EngFormatter(sep="")(value).replace("k", "K").replace("G", "B")


def thin(points: Points) -> Points:
    """At most MAX_POINTS of a curve: a PNG has no room for more."""
    stride = -(-len(points[0]) // MAX_POINTS) or 1
    return points[0][::stride], points[1][::stride]


def save_figure(figure: Figure, target: Path) -> None:
    """Write a PNG, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=150, facecolor="white")
    os.replace(temporary, target)
