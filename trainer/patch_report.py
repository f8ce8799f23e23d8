"""What `weft data patches` shows: lengths, the curve of levels, and text with its borders; as tables, JSON and a PNG."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.batch import PackedBatch
from ..models.blt.patch_level import (
    PatchSample,
    PatchSummary,
    find_level,
    level_curve,
    sample_patches,
    summarise,
)
from ..models.blt.patching import PatchMaker
from .data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["PatchReport", "make_report", "plot_report", "render_report"]

BAR_WIDTH = 30
LENGTHS_SHOWN = 16
BORDER = "|"
STYLES = ("black on bright_cyan", "black on bright_yellow")
INK, MUTED, GRID, FILL, MARK = "#24292f", "#6e7781", "#e6e8eb", "#2f6f9f", "#c2410c"


@dataclass(frozen=True)
class PatchReport:
    """Patches of a sample.

    Args:
        identity: of the patcher, level included.
        level: the key of the level that can be chosen, None where the rule has none.
        wanted: mean size that was asked for.
        curve: (level, mean size), lowest level first.
        text: patches of some text, in order, decoded; special ids are <s> and </s>.
    """

    identity: dict[str, Any]
    level: str | None
    wanted: float | None
    summary: PatchSummary
    curve: tuple[tuple[float, float], ...]
    text: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def make_report(
    maker: PatchMaker, batches: Iterable[PackedBatch], vocabulary: Vocabulary, text_bytes: int
) -> PatchReport:
    """Look at some batches; a level that is left open is found on them first."""
    sample = sample_patches(maker, batches)
    config = maker.config
    if config.open_level is not None:
        assert config.patch_size is not None
        level = find_level(sample, config, config.open_level, config.patch_size)
        maker = maker.with_levels(**{config.open_level: level})
    patches = sample.patches(maker.config)
    count = int(patches.count)
    name = {"entropy": "threshold", "both": "threshold", "rise": "rise"}.get(config.scheme)
    starts = patches.starts[:count].tolist()
    first, stop = _text_span(sample, vocabulary, text_bytes)
    shown = [start for start in starts if first <= start < stop]
    ids = sample.tokens.numpy()
    text = [_decode(ids[a:b], vocabulary) for a, b in zip(shown, [*shown[1:], stop], strict=True)]
    return PatchReport(
        identity=dict(maker.identity),
        level=name,
        wanted=config.patch_size,
        summary=summarise(patches.lengths[:count]),
        curve=tuple(level_curve(sample, maker.config, name)) if name else (),
        text=tuple(text),
    )


def _text_span(sample: PatchSample, vocabulary: Vocabulary, wanted: int) -> tuple[int, int]:
    """Positions to show: from the beginning of a document where there is one, to the end of its row at most."""
    begins = np.flatnonzero(sample.tokens.numpy() == vocabulary.bos_id)
    first = int(begins[0]) if len(begins) else 0
    row_end = (first // sample.row_length + 1) * sample.row_length
    return first, min(first + wanted, row_end, len(sample.tokens))


def _decode(ids: Any, vocabulary: Vocabulary) -> str:
    marks = {vocabulary.bos_id: "<s>", vocabulary.eos_id: "</s>"}
    if len(ids) == 1 and int(ids[0]) in marks:
        return marks[int(ids[0])]
    tail = marks[vocabulary.eos_id] if int(ids[-1]) == vocabulary.eos_id else ""
    return vocabulary.decode(ids) + tail


def render_report(report: PatchReport, *, is_terminal: bool) -> Iterator[RenderableType]:
    """Tables and text, for a rich console."""
    summary = report.summary
    yield _rule(report)
    cuts = ", ".join(
        f"{p} % {n}" for p, n in zip((1, 10, 50, 90, 99), summary.percentiles, strict=True)
    )
    yield (
        f"{summary.bytes:,} bytes in {summary.patches:,} patches: mean {summary.mean:.2f} bytes, {cuts}, "
        f"longest {summary.longest:,}\n"
    )
    yield _table("Patch lengths", ("bytes", "patches", "share", ""), _length_rows(summary))
    if report.level and report.curve:
        current = report.identity[report.level]
        most = max(size for _, size in report.curve)
        rows = [
            (f"{level:.3f}", f"{size:.2f}", "█" * max(1, round(BAR_WIDTH * size / most)))
            for level, size in report.curve
        ]
        title = f"Mean patch size by {report.level} (now {current:.4f})"
        yield _table(title, (f"{report.level}, nats", "bytes a patch", ""), rows)
    if report.text:
        yield _marked(report.text, is_terminal=is_terminal)


def _rule(report: PatchReport) -> str:
    parts = [f"{k.replace('_', ' ')} {v}" for k, v in report.identity.items() if v is not None]
    return ", ".join(part[:40] for part in parts)


def _length_rows(summary: PatchSummary) -> list[tuple[str, ...]]:
    counts = list(summary.histogram)
    shown = [(str(n), c) for n, c in counts if n < LENGTHS_SHOWN]
    rest = sum(c for n, c in counts if n >= LENGTHS_SHOWN)
    if rest:
        shown.append((f"{LENGTHS_SHOWN} and more", rest))
    most = max(c for _, c in shown)
    return [
        (name, f"{c:,}", f"{c / summary.patches:.1%}", "█" * round(BAR_WIDTH * c / most) or "▏")
        for name, c in shown
    ]


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _marked(patches: tuple[str, ...], *, is_terminal: bool) -> RenderableType:
    """Neighbouring patches in two colours on a terminal, with a sign between them elsewhere."""
    from rich.text import Text

    if not is_terminal:
        return Text(BORDER.join(patches), overflow="ignore", no_wrap=True)
    text = Text()
    for number, patch in enumerate(patches):
        text.append(patch, style=STYLES[number % 2])
    return text


def plot_report(report: PatchReport, path: Path) -> None:
    """Draw the lengths and the curve into a PNG. matplotlib is imported on use."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if report.curve else 1
    figure = Figure(figsize=(5.2 * columns, 4.2))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED, labelcolor=INK)
    lengths, counts = zip(*report.summary.histogram, strict=True)
    last = max(report.summary.percentiles[-1], 2)
    panels[0].bar(lengths, counts, color=FILL)
    panels[0].set_xlim(0, last + 1)
    panels[0].axvline(report.summary.mean, color=MARK, label=f"mean {report.summary.mean:.2f}")
    panels[0].set(xlabel="bytes a patch", ylabel="patches")
    panels[0].legend(frameon=False)
    if report.level and report.curve:
        levels, sizes = zip(*report.curve, strict=True)
        panels[1].plot(levels, sizes, color=FILL, linewidth=2)
        current = report.identity[report.level]
        panels[1].plot([current], [report.summary.mean], "o", color=MARK, label=f"{current:.3f}")
        panels[1].set(xlabel=f"{report.level}, nats", ylabel="mean bytes a patch", yscale="log")
        panels[1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=150, facecolor="white")
    os.replace(temporary, path)
