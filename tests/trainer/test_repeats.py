"""The repeated n-gram filter against its definition, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weft.trainer.data.config import RepeatFilterConfig
from weft.trainer.data.repeats import find_repetitive_rows

DEFAULT = RepeatFilterConfig()


def by_definition(row: list[int], config: RepeatFilterConfig) -> bool:
    for period in range(config.min_period, config.max_period + 1):
        for start in range(len(row) - period * config.max_count + 1):
            gram = row[start : start + period]
            if row[start : start + period * config.max_count] == gram * config.max_count:
                return True
    return False


def row_with_run(length: int, start: int, period: int, tokens: int) -> np.ndarray:
    """Ids that never repeat but for `tokens` of an n-gram of `period` different ids."""
    row = np.arange(1000, 1000 + length)
    row[start : start + tokens] = np.resize(np.arange(period), tokens)
    return row[None, :]


@pytest.mark.parametrize("period", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_exactly_32_repeats_trigger_and_31_do_not(period: int, place: str) -> None:
    tokens, length = 32 * period, 600
    start = {"start": 0, "middle": 77, "end": length - tokens}[place]
    assert find_repetitive_rows(row_with_run(length, start, period, tokens), DEFAULT).tolist() == [
        True
    ]
    assert find_repetitive_rows(
        row_with_run(length, start, period, tokens - 1), DEFAULT
    ).tolist() == [False]


def test_period_14_does_not_trigger() -> None:
    assert not find_repetitive_rows(row_with_run(4096, 3, 14, 14 * 200), DEFAULT)[0]


def test_rows_are_judged_apart_and_short_ones_pass() -> None:
    rows = np.concatenate(
        [row_with_run(512, 0, 1, 31), row_with_run(512, 40, 2, 64), row_with_run(512, 0, 1, 0)]
    )
    assert find_repetitive_rows(rows, DEFAULT).tolist() == [False, True, False]
    assert find_repetitive_rows(np.zeros((2, 31), np.int64), DEFAULT).tolist() == [False, False]
    assert find_repetitive_rows(np.zeros((2, 32), np.uint16), DEFAULT).tolist() == [True, True]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_agrees_with_the_definition(data: st.DataObject) -> None:
    low = data.draw(st.integers(1, 5))
    config = RepeatFilterConfig(
        min_period=low,
        max_period=data.draw(st.integers(low, 13)),
        max_count=data.draw(st.integers(2, 9)),
    )
    length = data.draw(st.integers(1, 80))
    ids = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    row = data.draw(ids)
    gram = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=14))
    run = min(length, len(gram) * config.max_count + data.draw(st.integers(-1, 1)))
    start = data.draw(st.integers(0, length - run))
    row[start : start + run] = np.resize(gram, run).tolist()
    rows = np.array([row, row[::-1]], np.uint16)
    assert find_repetitive_rows(rows, config).tolist() == [
        by_definition(r, config) for r in rows.tolist()
    ]
