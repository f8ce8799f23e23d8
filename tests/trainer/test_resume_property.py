"""Any sequence of attempts, on any number of ranks, reads the rows of one uninterrupted pass, each once and in place."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_prepare import write_texts
from weft.models.batch import PackedBatch
from weft.trainer.data.config import DataConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.loader import PackedLoader

BATCH_ROWS, LENGTH, MOST_STEPS = 8, 32, 40


class Attempt(NamedTuple):
    """One start of the run: how many steps it makes, on how many data ranks, in which micro-batches."""

    steps: int
    ranks: int
    micro_rows: int
    prefetch: int


class Row(NamedTuple):
    source: int
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    positions: tuple[int, ...]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two sources of unequal weight, small enough to be passed over more than once."""
    root = tmp_path_factory.mktemp("texts")
    write_texts(root / "a", files=20, size=300)
    write_texts(root / "b", files=8, size=200, seed=1)
    sources = (
        SourceConfig(name="a", path=str(root / "a"), weight=0.6),
        SourceConfig(name="b", path=str(root / "b"), weight=0.4),
    )
    opened = open_data(
        DataConfig(sources=sources, sequence_length=LENGTH, cache_dir=str(root / "cache"))
    )
    assert opened.source("b").sequences < 0.4 * MOST_STEPS * BATCH_ROWS
    return opened


def rows_of(batch: PackedBatch) -> list[tuple[int, Row]]:
    parts = [
        tensor.view(batch.rows, -1).tolist()
        for tensor in (batch.tokens, batch.targets, batch.position_ids)
    ]
    return [
        (sample, Row(source, *map(tuple, row)))
        for sample, source, *row in zip(batch.sample_ids, batch.source_ids, *parts, strict=True)
    ]


def run_attempt(
    data: Dataset, attempt: Attempt, start: int, seed: int
) -> tuple[list[tuple[int, Row]], int]:
    """What all ranks of an attempt read, in rank order, and where each says the run stands after it."""
    found: list[list[tuple[int, Row]]] = [[] for _ in range(attempt.steps)]
    stands = set()
    for rank in range(attempt.ranks):
        with PackedLoader(
            data,
            seed=seed,
            batch_rows=BATCH_ROWS,
            micro_batch_rows=attempt.micro_rows,
            data_rank=rank,
            data_ranks=attempt.ranks,
            start_sample=start,
            prefetch=attempt.prefetch,
        ) as loader:
            for step in range(attempt.steps):
                batches = loader.next_step().micro_batches
                found[step] += [row for batch in batches for row in rows_of(batch)]
            stands.add(loader.state()["samples"])
    (samples,) = stands
    return [row for step in found for row in step], samples


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    micro_rows = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n * ranks <= BATCH_ROWS]))
    # An attempt may be killed before its first step.
    return Attempt(draw(st.integers(0, 8)), ranks, micro_rows, draw(st.integers(1, 4)))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequence=st.lists(attempts(), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_attempts_read_the_rows_of_one_pass(
    data: Dataset, sequence: list[Attempt], seed: int
) -> None:
    steps = sum(attempt.steps for attempt in sequence)
    whole, _ = run_attempt(data, Attempt(steps, 1, BATCH_ROWS, 2), 0, seed)
    read: list[tuple[int, Row]] = []
    samples = 0
    for attempt in sequence:
        rows, samples = run_attempt(data, attempt, samples, seed)
        read += rows
    assert [sample for sample, _ in read] == list(range(steps * BATCH_ROWS))
    assert read == whole


def test_another_number_of_steps_done_reads_other_rows(data: Dataset) -> None:
    """The property can fail: rows at one sample and at the next are not alike."""
    (first, *_), _ = run_attempt(data, Attempt(1, 1, 8, 1), 0, 0)
    shifted, _ = run_attempt(data, Attempt(1, 1, 8, 1), 1, 0)
    assert first[1] != shifted[0][1]
