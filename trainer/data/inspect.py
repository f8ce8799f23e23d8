"""What training will see, in tables: sources, document lengths, packing, and samples with their
borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...models.batch import IGNORED
from .dataset import Dataset, Source
from .interleaved.inspect import (
    count_modalities,
    decode_interleaved,
    padding_positions,
)
from .loader import PackedLoader

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...models.batch import PackedBatch

__all__ = [
    "LengthSummary",
    "PackingSummary",
    "plain_table",
    "render_dataset",
    "summarise_lengths",
    "summarise_packing",
]

PERCENTILES = (1, 10, 50, 90, 99)
BAR_WIDTH = 30
PACKING_SAMPLES = 1024
ROWS_AT_ONCE = 64
SAMPLE_CHARACTERS = 1200
BORDER = "⟦next document⟧"
CUT_OFF = "⟦row ends inside the document⟧"
PADDING = "⟦padding, {} positions⟧"
NO_LOSS = "⟦repeats: no loss on this row⟧"


@dataclass(frozen=True)
class LengthSummary:
    """Document lengths of a source, in ids.

    Args:
        percentiles: those of `PERCENTILES`.
        histogram: (documents shorter than this power of two but not than the one before,
            documents).
    """

    documents: int
    mean: float
    longest: int
    percentiles: tuple[int, ...]
    histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackingSummary:
    """How well rows are used, over some samples of the order.

    Args:
        trained: share of positions that carry a loss.
        filtered: share of rows silenced by the repeat filter.
        documents: documents or parts of one in a row, on average.
        cut: share of rows that end inside a document.
        padding: share of positions that no document has.
        modalities: (positions, counted targets) by modality; empty where all is text.
        images: in a row, on average.
    """

    samples: int
    trained: float
    filtered: float
    documents: float
    cut: float
    padding: float = 0.0
    modalities: dict[str, tuple[int, int]] = field(default_factory=dict)
    images: float = 0.0


def summarise_lengths(lengths: NDArray[np.int64]) -> LengthSummary:
    """Of (D,) document lengths."""
    bits = np.ceil(np.log2(lengths + 1)).astype(int)
    counts = np.bincount(bits)
    present = np.flatnonzero(counts)
    histogram = tuple(
        (1 << int(bit), int(counts[bit])) for bit in range(present[0], present[-1] + 1)
    )
    cuts = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    return LengthSummary(
        len(lengths), float(lengths.mean()), int(lengths.max()), tuple(cuts), histogram
    )


def summarise_packing(data: Dataset, seed: int, samples: int = PACKING_SAMPLES) -> PackingSummary:
    """Look at the first samples of a run's order."""
    total = sum(source.sequences for source in data.sources)
    rows = min(samples, total) // ROWS_AT_ONCE * ROWS_AT_ONCE or min(samples, total)
    trained = positions = silent = pieces = cut = padding = 0
    eos_id, is_padded = data.vocabulary.eos_id, data.config.packs_documents
    for batch in _batches(data, seed, rows):
        trained += batch.target_count
        positions += len(batch.tokens)
        carries_loss = (batch.targets.view(batch.rows, -1) >= 0).any(dim=1)
        silent += int((~carries_loss).sum())
        pieces += len(batch.cu_seqlens) - 1
        last = batch.tokens if not is_padded else batch.targets
        last_ids = last.view(batch.rows, -1)[:, -1]
        if is_padded:
            padding += padding_positions(batch, eos_id)
            pieces -= int((batch.tokens.view(batch.rows, -1)[:, -1] == eos_id).sum())
            cut += int(((last_ids != eos_id) & (last_ids != IGNORED)).sum())
        else:
            cut += int((last_ids != eos_id).sum())
    summary = PackingSummary(
        rows, trained / positions, silent / rows, pieces / rows, cut / rows, padding / positions
    )
    if data.config.interleaved is None:
        return summary
    counts = count_modalities(data, _batches(data, seed, rows))
    modalities = {name: (counts.positions[name], counts.targets[name]) for name in data.modalities}
    return replace(summary, modalities=modalities, images=counts.images / rows)


def _batches(data: Dataset, seed: int, rows: int) -> Iterator[PackedBatch]:
    at_once = min(ROWS_AT_ONCE, rows)
    with PackedLoader(data, seed=seed, batch_rows=at_once, end_sample=rows) as loader:
        for _ in range(rows // at_once):
            yield loader.next_step().micro_batches[0]


def render_dataset(data: Dataset, *, seed: int = 0, samples: int = 3) -> Iterator[RenderableType]:
    """Tables and samples, for a rich console."""
    if data.config.images is not None:
        from .images.inspect import render_images

        yield from render_images(data, seed)
        return
    yield _sources_table(data)
    for source in data.sources:
        yield from _render_lengths(source)
    yield _packing_table(summarise_packing(data, seed))
    if samples:
        yield from _render_samples(data, seed, samples)


def plain_table(
    title: str, columns: tuple[str, ...], rows: Sequence[Sequence[str]]
) -> RenderableType:
    """A table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i and name.strip() else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _sources_table(data: Dataset) -> RenderableType:
    total = sum(source.config.weight or source.sequences for source in data.sources)
    rows = []
    for source in data.sources:
        share = (source.config.weight or source.sequences) / total
        dropped = ", ".join(
            f"{number} {reason}" for reason, number in sorted(source.manifest.dropped.items())
        )
        rows.append(
            (
                source.name,
                f"{source.manifest.documents:,}",
                f"{source.train.tokens:,}",
                f"{source.manifest.bytes:,}",
                f"{source.sequences:,}",
                f"{share:.1%}",
                f"{len(source.manifest.held_out)} ({source.held_out_bytes:,} B)",
                dropped or "none",
                source.manifest.fingerprint[:12],
            )
        )
    columns = (
        "source", "documents", "train ids", "bytes", f"samples of {data.sequence_length}",
        "share", "held out", "left out", "fingerprint",
    )  # fmt: skip
    return plain_table(
        f"Sources, vocabulary {data.config.vocabulary} ({data.vocabulary.size} ids)", columns, rows
    )


def _render_lengths(source: Source) -> Iterator[RenderableType]:
    summary = summarise_lengths(source.document_lengths())
    most = max(count for _, count in summary.histogram)
    rows = [
        (
            f"{edge // 2:,} to {edge - 1:,}",
            f"{count:,}",
            "█" * round(BAR_WIDTH * count / most) or "▏",
        )
        for edge, count in summary.histogram
    ]
    yield plain_table(
        f"Document lengths of {source.name}, ids", ("length", "documents", " " * BAR_WIDTH), rows
    )
    cuts = ", ".join(
        f"{p} % {value:,}" for p, value in zip(PERCENTILES, summary.percentiles, strict=True)
    )
    yield f"mean {summary.mean:,.0f}, {cuts}, longest {summary.longest:,}\n"


def _packing_table(summary: PackingSummary) -> RenderableType:
    rows = [
        ("positions that carry a loss", f"{summary.trained:.2%}"),
        ("rows silenced by the repeat filter", f"{summary.filtered:.2%}"),
        ("padding", f"{summary.padding:.2%}" if summary.padding else "0 (nothing is padded)"),
        ("documents or parts of one in a row", f"{summary.documents:.2f}"),
        ("rows that end inside a document", f"{summary.cut:.2%}"),
    ]
    for name, (positions, targets) in summary.modalities.items():
        rows.append((f"{name}: positions, targets", f"{positions:,}, {targets:,}"))
    if summary.modalities:
        rows.append(("images in a row", f"{summary.images:.2f}"))
    return plain_table(f"Packing, first {summary.samples} samples", ("", "value"), rows)


def _render_samples(data: Dataset, seed: int, samples: int) -> Iterator[RenderableType]:
    from rich.panel import Panel
    from rich.text import Text

    rows = min(samples, sum(source.sequences for source in data.sources))
    with PackedLoader(data, seed=seed, batch_rows=1, end_sample=rows) as loader:
        for _ in range(rows):
            batch = loader.next_step().micro_batches[0]
            source = data.sources[batch.source_ids[0]].name
            text = Text()
            for piece, style in decode_pieces(data, batch):
                text.append(piece, style=style)
            yield Panel(
                text, title=f"sample {batch.sample_ids[0]} from {source}", title_align="left"
            )


def decode_pieces(data: Dataset, batch: PackedBatch) -> Iterator[tuple[str, str]]:
    """(text, style) of a batch's documents, with marks where they are cut; long ones lose their
    middle.
    """
    borders = batch.cu_seqlens.tolist()
    room = max(80, SAMPLE_CHARACTERS // (len(borders) - 1))
    is_padded = data.config.packs_documents and int(batch.tokens[-1]) == data.vocabulary.eos_id
    for i, (start, stop) in enumerate(pairwise(borders)):
        if i:
            yield f"\n{BORDER}\n", "bold magenta"
        if is_padded and stop == len(batch.tokens):
            yield PADDING.format(stop - start), "dim"
            break
        text = _decode(data, batch, start, stop)
        if len(text) > room:
            text = (
                f"{text[: room // 2]}\n… {len(text) - room:,} characters …\n{text[-(room // 2) :]}"
            )
        yield text, ""
    last = batch.targets if data.config.packs_documents else batch.tokens
    if not is_padded and int(last[-1]) != data.vocabulary.eos_id:
        yield f"\n{CUT_OFF}", "bold magenta"
    if batch.target_count == 0:
        yield f"\n{NO_LOSS}", "bold red"


def _decode(data: Dataset, batch: PackedBatch, start: int, stop: int) -> str:
    if batch.modality is not None:
        return decode_interleaved(data, batch, start, stop)
    return data.vocabulary.decode(batch.tokens[start:stop].numpy())
