"""Which stretches of a prepared source are trained on, and which are its held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shards import Manifest
from .stream import TokenStream

__all__ = ["Span", "document_span", "open_spans", "split_spans"]


class Span(NamedTuple):
    """Positions [start, stop) of one shard."""

    shard: int
    start: int
    stop: int


def split_spans(folder: Path, manifest: Manifest) -> tuple[list[Span], list[Span]]:
    """The stretches between held-out documents, and those documents; none empty."""
    chosen: dict[int, list[int]] = {}
    for number, document, _ in manifest.held_out:
        chosen.setdefault(number, []).append(document)
    train, held_out = [], []
    for number, shard in enumerate(manifest.shards):
        position = 0
        for document in sorted(chosen.get(number, ())):
            start, stop = document_span(shard.open_ends(folder), document)
            train.append(Span(number, position, start))
            held_out.append(Span(number, start, stop))
            position = stop
        train.append(Span(number, position, shard.tokens))
    return [s for s in train if s.start < s.stop], [s for s in held_out if s.start < s.stop]


def open_spans(
    folder: Path, manifest: Manifest, spans: Sequence[Span], dtype: np.dtype
) -> TokenStream:
    """The ids of some stretches, laid end to end."""
    ids = [shard.open_ids(folder) for shard in manifest.shards]
    return TokenStream([ids[span.shard][span.start : span.stop] for span in spans], dtype)


def document_span(ends: NDArray[np.int64], document: int) -> tuple[int, int]:
    """Positions [start, stop) of a document in its shard."""
    return (int(ends[document - 1]) if document else 0), int(ends[document])
