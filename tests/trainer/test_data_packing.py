"""Packed batches against a slow packing, id by id."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from weft.models.batch import IGNORED
from weft.trainer.data.config import RepeatFilterConfig
from weft.trainer.data.packing import RowAssembler, Rows

EOS = 2
LENGTHS = np.array([0, 0, 0, 0] + [3] * 6, np.int32)


def pack(
    ids: list[list[int]],
    borders: tuple[tuple[int, int], ...] = (),
    repeats: RepeatFilterConfig | None = None,
    **rest: bool,
):
    rows = Rows(np.array(ids, np.uint16), borders, tuple(range(len(ids))), (0,) * len(ids))
    return RowAssembler(EOS, LENGTHS, repeats).pack(rows, **rest)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_agrees_with_packing_by_hand(data: st.DataObject) -> None:
    count, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12))
    row = st.lists(st.integers(1, 9), min_size=length + 1, max_size=length + 1)
    ids = data.draw(st.lists(row, min_size=count, max_size=count))
    borders = data.draw(
        st.lists(
            st.tuples(st.integers(0, count - 1), st.integers(1, length)), max_size=3, unique=True
        )
    )
    batch = pack(ids, tuple(borders))
    tokens, targets, positions, starts, raw = [], [], [], [], 0
    for r, one in enumerate(ids):
        position = 0
        for i in range(length):
            if i == 0 or one[i - 1] == EOS or (r, i) in borders:
                starts.append(r * length + i)
                position = 0
            is_last = one[i] == EOS or (r, i + 1) in borders
            tokens.append(one[i])
            targets.append(IGNORED if is_last else one[i + 1])
            raw += 0 if is_last else int(LENGTHS[one[i + 1]])
            positions.append(position)
            position += 1
    assert batch.tokens.tolist() == tokens
    assert batch.targets.tolist() == targets
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == [*starts, count * length]
    assert batch.max_seqlen == max(
        b - a for a, b in zip(starts, [*starts[1:], count * length], strict=True)
    )
    assert batch.target_count == sum(t != IGNORED for t in targets)
    assert batch.target_bytes == raw
    assert (batch.rows, batch.row_length) == (count, length)
    assert [str(t.dtype) for t in (batch.tokens, batch.targets, batch.position_ids, batch.cu_seqlens)] == [
        "torch.int64", "torch.int64", "torch.int64", "torch.int32",
    ]  # fmt: skip


def test_the_repeat_filter_silences_a_row_and_keeps_its_place() -> None:
    plain, repeated = [4, 5, 6, 7] * 10 + [4], [4] * 41
    repeats = RepeatFilterConfig(max_period=3)
    batch = pack([plain, repeated, plain], repeats=repeats)
    rows = batch.targets.view(3, 40)
    assert (rows[0] != IGNORED).all()
    assert (rows[1] == IGNORED).all()
    assert batch.tokens.view(3, 40)[1].tolist() == repeated[:40]
    assert (batch.target_count, batch.target_bytes, batch.sample_ids) == (80, 240, (0, 1, 2))
    assert pack([plain, repeated, plain]).target_count == 120


def test_the_filter_looks_at_the_inputs_of_a_row_only() -> None:
    row = [*range(5, 9), *[4] * 31]
    repeats = RepeatFilterConfig(max_period=1)
    # The 32nd repeat is the target of the last position, not an input.
    assert pack([[*row, 4]], repeats=repeats).target_count == 35
    assert pack([[*row[1:], 4, 9]], repeats=repeats).target_count == 0


def test_a_stand_in_carries_no_loss() -> None:
    batch = pack([[4, 5, 6, 7]], ignore_all=True)
    assert (batch.target_count, batch.target_bytes) == (0, 0)
    assert set(batch.targets.tolist()) == {IGNORED}
