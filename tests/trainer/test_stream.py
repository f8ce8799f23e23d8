"""Reading a sequence that lies over several pieces."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from weft.trainer.data.stream import TokenStream


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.data())
def test_rows_equal_slices_of_the_whole(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    cuts = np.cumsum([0, *lengths])
    stream = TokenStream([whole[a:b] for a, b in pairwise(cuts)], np.dtype("<u2"))
    assert stream.tokens == len(whole)
    width = data.draw(st.integers(1, len(whole)))
    starts = data.draw(st.lists(st.integers(0, len(whole) - width), min_size=1, max_size=4))
    out = np.zeros((len(starts), width), np.uint16)
    borders = stream.read_rows(out, range(len(starts)), starts)
    inner = {int(c) for c in cuts}
    for row, start in enumerate(starts):
        assert out[row].tolist() == list(range(start, start + width))
        expected = [c - start for c in sorted(inner) if start < c < start + width]
        assert [position for r, position in borders if r == row] == expected


def test_sequences_need_the_id_after() -> None:
    stream = TokenStream([np.arange(20, dtype=np.uint32)], np.dtype("<u4"))
    assert [stream.sequences(n) for n in (5, 10, 19, 20)] == [3, 1, 1, 0]
    assert TokenStream([], np.dtype("<u2")).sequences(5) == 0
