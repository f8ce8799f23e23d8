"""One picture of several runs: their curves over a cost, who reaches whose final value when, and where the last two cross."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..compare import POINT_AXIS, Comparison
from ..matching import Matching
from .drawing import INK, MUTED, new_figure, save_figure, short_count, style_axes, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_comparison", "plot_matching"]

COLORS = (
    "#2f6f9f",
    "#c2410c",
    "#5b7553",
    "#7a4f7a",
    "#8c6d1f",
    "#0f766e",
    "#9f1239",
    "#57606a",
)
X_LABELS = {
    "training-flops": "training FLOPs, auxiliary models included",
    "inference-flops": "inference FLOPs a byte, auxiliary models included",
    "bytes": "bytes",
    "tokens": "tokens",
    "seconds": "seconds",
}
Y_LABELS = {"bits_per_byte": "bits per byte", "loss": "loss (nats a token)"}


def plot_comparison(comparison: Comparison, path: Path | str) -> Path:
    """Draw a comparison.

    Args:
        path: of the PNG.

    Returns:
        Where the PNG is.
    """
    figure = new_figure(9, 5.6)
    axes = figure.add_subplot()
    style_axes(axes)
    if comparison.against == POINT_AXIS:
        _draw_points(axes, comparison)
    else:
        _draw_curves(axes, comparison)
        _draw_match(axes, comparison)
        _draw_crossing(axes, comparison)
        axes.legend(
            frameon=True,
            framealpha=0.9,
            edgecolor="none",
            fontsize=10,
            loc="upper right",
            labelcolor=INK,
        )
    held_out, _, name = comparison.metric.rpartition("/")
    label = Y_LABELS.get(name, name)
    axes.set_ylabel(f"held-out {label}" if held_out else label, fontsize=11, color=INK)
    axes.set_xlabel(X_LABELS[comparison.against], fontsize=11, color=INK)
    axes.xaxis.set_major_formatter(lambda value, position: short_count(value))
    target = Path(path)
    save_figure(figure, target)
    return target


def plot_matching(found: Matching, path: Path | str) -> Path:
    """Draw runs against a baseline: a panel a metric, the baseline's final value as a dashed line.

    Args:
        path: of the PNG.

    Returns:
        Where the PNG is.
    """
    count = len(found.metrics)
    figure = new_figure(max(7.0, 5.2 * count), 4.8)
    for place, metric in enumerate(found.metrics):
        axes = figure.add_subplot(1, count, place + 1)
        style_axes(axes)
        _draw_matching(axes, found, metric)
        axes.set_xlabel(X_LABELS[found.against], fontsize=10, color=INK)
        axes.xaxis.set_major_formatter(lambda value, position: short_count(value))
        held_out, _, name = metric.rpartition("/")
        label = Y_LABELS.get(name, name.replace("_", " "))
        axes.set_ylabel(f"held-out {label}" if held_out else label, fontsize=10, color=INK)
        axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)
    target = Path(path)
    save_figure(figure, target)
    return target


def _draw_matching(axes: Axes, found: Matching, metric: str) -> None:
    shares = {match.run: match.share for match in found.matches if match.metric == metric}
    curves = [found.curves[metric, run.name] for run in found.runs]
    for i, (run, curve) in enumerate(zip(found.runs, curves, strict=True)):
        share = shares.get(run.name)
        note = "" if share is None else f", {100 * share:.0f} %"
        color = COLORS[i % len(COLORS)]
        axes.plot(*thin((curve.x, curve.y)), color=color, linewidth=1.6, label=f"{run.name}{note}")
    target = found.targets[metric]
    axes.axhline(target, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    low = min(float(curve.y.min()) for curve in curves)
    high = max(float(curve.y[len(curve) // 10]) for curve in curves)
    margin = 0.08 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 1.02 * max(float(curve.x[-1]) for curve in curves))


def _draw_curves(axes: Axes, comparison: Comparison) -> None:
    for i, (run, raw, smooth) in enumerate(
        zip(comparison.runs, comparison.curves, comparison.smooth, strict=True)
    ):
        color = COLORS[i % len(COLORS)]
        if comparison.windows[i] > 1:
            axes.plot(*thin((raw.x, raw.y)), color=color, alpha=0.18, linewidth=0.8)
        axes.plot(
            *thin((smooth.x, smooth.y)),
            color=color,
            linewidth=2.0,
            marker="o" if len(smooth) < 20 else "",
            markersize=4,
            label=f"{run.name} ({comparison.final(i):.3f})",
        )
    axes.set_xlim(0, 1.02 * max(curve.x[-1] for curve in comparison.smooth))
    axes.set_ylim(*_limits(comparison))


def _limits(comparison: Comparison) -> tuple[float, float]:
    """From below everything to where the curves are a tenth on: their first values would flatten the rest."""
    low = min(curve.y.min() for curve in comparison.smooth)
    high = max(float(curve.y[len(curve) // 10]) for curve in comparison.smooth)
    margin = 0.08 * max(high - low, 1e-3)
    return low - margin, high + margin


def _draw_match(axes: Axes, comparison: Comparison) -> None:
    """Where the best run has the final value of the worst, and how much sooner."""
    finals = [curve.y[-1] for curve in comparison.smooth]
    best, worst = int(np.argmin(finals)), int(np.argmax(finals))
    names = comparison.runs[best].name, comparison.runs[worst].name
    found = [m for m in comparison.matches if (m.run, m.other) == names and m.at is not None]
    for match in found[:1]:
        at = float(match.at or 0.0)
        axes.plot(
            [at, match.other_at],
            [match.value, match.value],
            color=MUTED,
            linestyle=(0, (4, 3)),
            linewidth=1.2,
            marker="|",
            markersize=9,
            zorder=5,
        )
        axes.annotate(
            f"{match.ratio:.2f}x",
            (max(at, match.other_at), match.value),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=10,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            zorder=6,
        )


def _draw_crossing(axes: Axes, comparison: Comparison) -> None:
    if len(comparison.runs) > 2:
        return
    for _, _, item in comparison.crossings:
        if item.x is not None and item.y is not None:
            axes.plot(
                [item.x],
                [item.y],
                marker="o",
                markersize=8,
                markerfacecolor="none",
                markeredgecolor=INK,
                linestyle="",
                label=f"they cross at {short_count(float(f'{item.x:.3g}'))}",
                zorder=5,
            )


def _draw_points(axes: Axes, comparison: Comparison) -> None:
    front = []
    for i, (run, smooth) in enumerate(zip(comparison.runs, comparison.smooth, strict=True)):
        x, y = float(smooth.x[-1]), float(smooth.y[-1])
        axes.plot([x], [y], marker="o", markersize=8, color=COLORS[i % len(COLORS)], zorder=4)
        axes.annotate(
            f"{run.name} ({y:.3f})",
            (x, y),
            # A frontier falls to the right: above it there is room.
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=10,
            color=INK,
        )
        if run.name in comparison.frontier:
            front.append((x, y))
    axes.plot(*zip(*sorted(front), strict=True), color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.margins(x=0.25, y=0.2)
