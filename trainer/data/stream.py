"""A source's ids as one long sequence over many memory-mapped pieces, read at any position.

Every piece starts with a document, so the borders between pieces are borders between documents.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenStream"]


class TokenStream:
    """Pieces laid end to end.

    Args:
        pieces: (N_p,) id arrays, none empty.
        dtype: type of the ids where there are no pieces.
    """

    def __init__(self, pieces: Sequence[NDArray[Any]], dtype: np.dtype) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        ends = np.cumsum([len(piece) for piece in self._pieces], dtype=np.int64)
        self._starts: list[int] = [0, *ends.tolist()]
        self.tokens = self._starts.pop()
        self.dtype = (
            np.result_type(*{piece.dtype for piece in self._pieces}) if self._pieces else dtype
        )

    def sequences(self, length: int) -> int:
        """Rows of `length` positions, each of which has the id that follows it."""
        return max(0, (self.tokens - 1) // length)

    def read_rows(
        self, out: NDArray[Any], rows: Sequence[int], starts: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Fill rows of `out` with the ids from given positions on.

        Args:
            out: (R, N) array; no start + N may pass the end.
            rows: which rows to fill.
            starts: where each of them starts in this stream.

        Returns:
            (row, position other than 0) of every place in them at which a piece starts.
        """
        wanted, pieces, first_ids = out.shape[1], self._pieces, self._starts
        borders: list[tuple[int, int]] = []
        for row, start in zip(rows, starts, strict=True):
            number = bisect_right(first_ids, start) - 1
            offset = start - first_ids[number]
            part = pieces[number][offset : offset + wanted]
            if len(part) == wanted:
                out[row] = part
            else:
                found = self._read_across(out[row], number, offset)
                borders.extend((row, position) for position in found)
        return borders

    def _read_across(self, out: NDArray[Any], number: int, offset: int) -> list[int]:
        filled = 0
        borders: list[int] = []
        while True:
            part = self._pieces[number][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(out):
                return borders
            borders.append(filled)
            number, offset = number + 1, 0
