"""One picture of a run, RUN/plots/loss.png, from metrics.jsonl alone. matplotlib is imported on use.

The large panel has the training curve, its smoothed form and held-out points against tokens, in bits per byte
where the vocabulary allows; small panels below have the learning rate and the gradient norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError
from .curves import smooth
from .drawing import INK, MUTED, Points, new_figure, save_figure, short_count, style_axes, thin
from .records import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_run"]

TRAIN, HELD_OUT = "#2f6f9f", "#c2410c"
REFERENCES = ("#57606a", "#8c6d1f", "#5b7553", "#7a4f7a")


def plot_run(
    run_dir: Path | str,
    *,
    baselines: Mapping[str, float] | None = None,
    path: Path | str | None = None,
) -> Path:
    """Draw a run's curves.

    Args:
        run_dir: the run folder.
        baselines: horizontal lines by name, in the unit of the large panel, such as `gzip -9` in bits per byte.
        path: of the PNG; None is RUN/plots/loss.png.

    Returns:
        Where the PNG is.

    Raises:
        DataError: the run has no records to draw.
    """
    records = read_metrics(run_dir)
    in_bits = any("bits_per_byte" in record for record in records)
    key, unit = ("bits_per_byte", "bits per byte") if in_bits else ("loss", "loss (nats a token)")
    train = _curve(records, key)
    if not len(train[0]):
        raise DataError(
            f"{Path(run_dir) / METRICS_FILE} has no training steps to plot; let the run log some first"
        )
    target = Path(path) if path is not None else Path(run_dir) / "plots" / "loss.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure, large, small = _panels(_title(run_dir, records))
    _draw_main(large, train, _curve(records, f"eval/{key}"), dict(baselines or {}), unit)
    _draw_small(small[0], _curve(records, "lr"), "learning rate", is_log=False)
    _draw_small(small[1], _curve(records, "grad_norm"), "gradient norm", is_log=True)
    save_figure(figure, target)
    return target


def _curve(records: list[dict[str, Any]], key: str) -> Points:
    """Tokens and values of the steps that have a finite one."""
    found, tokens = [], 0
    for record in records:
        tokens = record.get("tokens", tokens)
        value = record.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((tokens or record["step"], value))
    array = np.array(found, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _title(run_dir: Path | str, records: list[dict[str, Any]]) -> str:
    steps = records[-1]["step"]
    return f"{Path(run_dir).resolve().name}  ·  {steps:,} steps"


def _panels(title: str) -> tuple[Figure, Axes, tuple[Axes, Axes]]:
    figure = new_figure(9, 6.6)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 1))
    large = figure.add_subplot(grid[0, :])
    small = (figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1]))
    large.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK, pad=12)
    for axes in (large, *small):
        style_axes(axes)
    return figure, large, small


def _draw_main(
    axes: Axes, train: Points, held_out: Points, baselines: dict[str, float], unit: str
) -> None:
    tokens, values = thin(train)
    axes.plot(tokens, values, color=TRAIN, alpha=0.22, linewidth=0.9)
    curve = _smooth(train[1])
    axes.plot(
        *thin((train[0], curve)),
        color=TRAIN,
        linewidth=2.0,
        label=f"training, smoothed ({curve[-1]:.3f})",
    )
    if len(held_out[0]):
        label = f"held out ({held_out[1][-1]:.3f})"
        line = "-" if len(held_out[0]) > 1 else ""
        axes.plot(
            *held_out,
            line,
            color=HELD_OUT,
            marker="o",
            markersize=6,
            linewidth=1.4,
            label=label,
            zorder=4,
        )
    for (name, value), color in zip(baselines.items(), REFERENCES * len(baselines), strict=False):
        axes.axhline(
            value, color=color, linestyle=(0, (5, 3)), linewidth=1.3, label=f"{name} ({value:.3f})"
        )
    axes.set_ylim(*_limits(curve, held_out[1], list(baselines.values())))
    axes.set_xlim(0, train[0][-1] * 1.01)
    _label(axes, unit, size=11)
    axes.set_xlabel("tokens", fontsize=11, color=INK)
    axes.legend(
        frameon=True,
        framealpha=0.9,
        edgecolor="none",
        fontsize=10,
        loc="upper right",
        labelcolor=INK,
    )


def _draw_small(axes: Axes, curve: Points, name: str, *, is_log: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    tokens, values = thin(curve)
    axes.plot(tokens, values, color=MUTED, linewidth=1.1)
    if is_log and len(values) and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    # 0.002 and 5, not powers of ten.
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    if len(tokens):
        axes.set_xlim(0, tokens[-1] * 1.01)
    axes.set_title(name, loc="left", fontsize=10.5, color=INK)
    _label(axes, "", size=10)
    axes.set_xlabel("tokens", fontsize=10, color=INK)


def _label(axes: Axes, unit: str, *, size: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(unit, fontsize=size, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, position: short_count(value))


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over 2 % of the run, at least 10 steps."""
    return smooth(values, max(5, len(values) // 100))


def _limits(
    smooth: NDArray[np.float64], held_out: NDArray[np.float64], baselines: list[float]
) -> tuple[float, float]:
    """From below everything to the smoothed curve's early values: its very first ones would flatten the rest."""
    early = smooth[len(smooth) * 3 // 100]
    shown = [smooth.min(), early, *held_out, *baselines]
    low, high = min(shown), max(shown)
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin
