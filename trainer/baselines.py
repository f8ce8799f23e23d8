"""What general-purpose compressors make of the held-out text: the yardstick for bits per byte. Imports no torch."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..models.errors import DataError

if TYPE_CHECKING:
    from .data.dataset import Dataset

__all__ = ["compression_bits_per_byte", "held_out_documents"]


def compression_bits_per_byte(documents: bytes | Iterable[bytes]) -> dict[str, float]:
    """Compressed bits for each raw byte of the documents laid end to end, by name of the compressor.

    Laid end to end is to their advantage: each document profits from those before it, which a model that
    sees one document at a time doesn't.

    Raises:
        DataError: there is not a byte to compress.
    """
    raw = documents if isinstance(documents, bytes) else b"".join(documents)
    if not raw:
        raise DataError("no held-out bytes to compress; set data.held_out.documents above 0")
    sizes = {
        "gzip -9": len(gzip.compress(raw, compresslevel=9, mtime=0)),
        "xz -9": len(lzma.compress(raw, preset=9)),
    }
    return {name: 8 * size / len(raw) for name, size in sizes.items()}


def held_out_documents(data: Dataset, source: str | None = None) -> list[bytes]:
    """Raw bytes of every held-out document, in the order they are evaluated.

    Args:
        source: only this one; None is all.
    """
    names = [item.name for item in data.sources] if source is None else [source]
    return [data.vocabulary.decode_bytes(ids) for name in names for ids in data.held_out(name)]
