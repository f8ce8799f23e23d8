"""The loader: one global order for any number of ranks, exact restarts, errors in the open, nothing lost."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_prepare import write_texts
from weft.models.batch import IGNORED, PackedBatch
from weft.models.errors import ConfigError, DataError
from weft.trainer.data.config import DataConfig, HeldOutConfig, RepeatFilterConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.loader import PackedLoader, held_out_batches

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    write_texts(root / "a", files=40, size=900)
    write_texts(root / "b", files=25, size=300, seed=1)
    return root


def open_two(folder: Path, **rest: object) -> Dataset:
    sources = tuple(SourceConfig(name=name, path=str(folder / name), **rest) for name in ("a", "b"))  # type: ignore[arg-type]
    held_out = HeldOutConfig(documents=3)
    return open_data(
        DataConfig(
            sources=sources,
            sequence_length=LENGTH,
            held_out=held_out,
            cache_dir=str(folder / "cache"),
        )
    )


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return open_two(folder)


def rows_of(batch: PackedBatch) -> dict[int, tuple[int, list[int], list[int]]]:
    tokens, targets = (
        batch.tokens.view(batch.rows, -1).tolist(),
        batch.targets.view(batch.rows, -1).tolist(),
    )
    return {
        i: (s, t, u)
        for i, s, t, u in zip(batch.sample_ids, batch.source_ids, tokens, targets, strict=True)
    }


def take(data: Dataset, steps: int, **rest: object) -> dict[int, tuple[int, list[int], list[int]]]:
    settings = {"seed": 7, "batch_rows": 8, **rest}
    found: dict[int, tuple[int, list[int], list[int]]] = {}
    with PackedLoader(data, **settings) as loader:  # type: ignore[arg-type]
        for _ in range(steps):
            for batch in loader.next_step().micro_batches:
                rows = rows_of(batch)
                assert not rows.keys() & found.keys()
                found.update(rows)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_any_number_of_ranks_sees_the_same_order_once(
    data: Dataset, ranks: int, micro: int
) -> None:
    expected = take(data, 6)
    assert sorted(expected) == list(range(48))
    parts = [
        take(data, 6, data_rank=r, data_ranks=ranks, micro_batch_rows=micro) for r in range(ranks)
    ]
    assert sum(len(part) for part in parts) == 48
    assert {i: row for part in parts for i, row in part.items()} == expected


def test_a_pass_gives_every_id_as_a_target_exactly_once(data: Dataset) -> None:
    total = sum(source.sequences for source in data.sources)
    rows = take(data, total, batch_rows=1)
    for number, source in enumerate(data.sources):
        stream = np.empty((1, source.train.tokens), source.train.dtype)
        source.train.read_rows(stream, [0], [0])
        mine = Counter(tuple(t) for s, t, _ in rows.values() if s == number)
        cut = stream[0][: source.sequences * LENGTH].reshape(-1, LENGTH)
        assert mine == Counter(tuple(row) for row in cut.tolist())
        pairs = sum(
            1 for s, _, u in rows.values() if s == number for target in u if target != IGNORED
        )
        # Every id but the first of each document is a target.
        ids = stream[0][: source.sequences * LENGTH + 1]
        assert pairs == int((ids[1:] != 1).sum())


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(done=st.integers(0, 300), ranks=st.sampled_from([1, 2, 4]))
def test_a_restart_anywhere_equals_going_on(data: Dataset, done: int, ranks: int) -> None:
    whole = take(data, 2, start_sample=done, batch_rows=8)
    for rank in range(ranks):
        part = take(data, 2, start_sample=done, data_rank=rank, data_ranks=ranks)
        assert part == {i: whole[i] for i in part}
    later = take(data, 1, start_sample=done + 8)
    assert later == {i: whole[i] for i in later}


def test_state_counts_what_was_given_out_not_what_was_assembled(data: Dataset) -> None:
    with PackedLoader(data, seed=7, batch_rows=8, prefetch=4) as loader:
        for _ in range(3):
            loader.next_step()
        assert loader.state() == {"samples": 24, "seed": 7, "fingerprint": data.fingerprint}
        returned = loader.next_step()
        loader.give_back(returned)
        assert loader.state()["samples"] == 24
        assert loader.next_step() is returned
        following = loader.next_step()
        assert following.first_sample == 32
        assert loader.state()["samples"] == 40


def test_counts_by_source_add_up(folder: Path) -> None:
    data = open_two(folder, weight=1.0)
    counted: Counter[str] = Counter()
    with PackedLoader(data, seed=3, batch_rows=16) as loader:
        for _ in range(20):
            step = loader.next_step()
            seen = Counter(
                data.sources[s].name for batch in step.micro_batches for s in batch.source_ids
            )
            assert {name: count for name, count in step.source_counts.items() if count} == seen
            counted += seen
        assert loader.source_counts() == counted
        assert loader.source_epochs()["b"] == counted["b"] / data.source("b").sequences
        assert step.epochs["b"] == (counted["b"] - 1) // data.source("b").sequences
    assert abs(counted["a"] - counted["b"]) < 64


def test_seeds_change_the_order_and_threads_do_not(data: Dataset) -> None:
    base = take(data, 10)
    assert base == take(data, 10, threads=3, prefetch=6)
    assert base != take(data, 10, seed=8)


def test_a_step_assembled_again_is_the_same(data: Dataset) -> None:
    with PackedLoader(data, seed=7, batch_rows=8) as loader:
        step = [loader.next_step() for _ in range(3)][-1]
        again = loader.assemble(step.first_sample)
    for one, other in zip(step.micro_batches, again.micro_batches, strict=True):
        assert rows_of(one) == rows_of(other)
        assert torch.equal(one.cu_seqlens, other.cu_seqlens)


def test_errors_of_the_background_surface_at_their_step(folder: Path) -> None:
    data = open_two(folder, max_epochs=1.0)
    total = sum(source.sequences for source in data.sources)
    with PackedLoader(data, seed=0, batch_rows=8) as loader:
        for _ in range(total // 8):
            loader.next_step()
        with pytest.raises(DataError, match=r"too few samples: source '[ab]' has \d+ sequences"):
            [loader.next_step() for _ in range(200)]


def test_one_pass_over_all_sources_is_allowed_to_the_last_sample(folder: Path) -> None:
    data = open_two(folder, max_epochs=1.0)
    total = sum(source.sequences for source in data.sources)
    assert len(take(data, total, batch_rows=1, end_sample=total)) == total


def test_the_end_and_a_closed_loader_say_so(data: Dataset) -> None:
    loader = PackedLoader(data, seed=0, batch_rows=8, end_sample=16)
    loader.next_step()
    loader.next_step()
    with pytest.raises(ValueError, match="closed or at its end_sample"):
        loader.next_step()
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed or at its end_sample"):
        loader.next_step()


def test_a_wait_ends_with_the_step_or_with_the_request(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    whole = PackedLoader.assemble
    monkeypatch.setattr(
        PackedLoader, "assemble", lambda self, first: (released.wait(30), whole(self, first))[1]
    )
    asked = []
    with PackedLoader(data, seed=0, batch_rows=8, prefetch=1) as loader:
        assert not loader.wait(lambda: bool(asked.append(0)) or len(asked) == 3)
        assert len(asked) == 3
        released.set()
        assert loader.wait(lambda: False)
        step = loader.next_step()
        # The step is still the first, and what was waited for is part of what it cost.
        assert step.first_sample == 0
        assert step.wait_s > 0.2


def test_steps_begin_after_what_is_left_out(data: Dataset) -> None:
    whole = take(data, 9)
    ranges = [(16, 24), (30, 37)]
    with PackedLoader(data, seed=7, batch_rows=8, end_sample=64, leave_out=ranges) as loader:
        starts = []
        for _ in range(6):
            step = loader.next_step()
            starts.append(step.first_sample)
            for batch in step.micro_batches:
                rows = rows_of(batch)
                assert rows == {sample: whole[sample] for sample in rows}
        with pytest.raises(ValueError, match="end_sample"):
            loader.next_step()
    assert starts == [0, 8, 37, 45, 53, 61]


def test_shares_that_do_not_divide_are_refused(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="9 samples a step do not divide over 2 ranks"):
        PackedLoader(data, seed=0, batch_rows=9, data_ranks=2)
    with pytest.raises(ConfigError, match="micro-batches of 3 samples do not divide a share of 8"):
        PackedLoader(data, seed=0, batch_rows=8, micro_batch_rows=3)


def test_filtered_rows_keep_their_place(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "rulers"
    root.mkdir()
    for i in range(30):
        (root / f"{i}.txt").write_text("word " * (i + 3) + "-" * 70 + " word" * 20)

    def open_with(enabled: bool) -> Dataset:
        return open_data(
            DataConfig(
                sources=(SourceConfig(name="s", path=str(root)),),
                sequence_length=64,
                cache_dir=str(tmp_path / "cache"),
                repeat_filter=RepeatFilterConfig(enabled=enabled),
            )
        )

    plain, filtered = take(open_with(False), 5), take(open_with(True), 5)
    silent = [i for i, (_, _, targets) in filtered.items() if set(targets) == {IGNORED}]
    assert silent
    assert len(silent) < 40
    for i, (source, tokens, targets) in plain.items():
        assert filtered[i][:2] == (source, tokens)
        assert (filtered[i][2] == targets) != (i in silent)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_held_out_batches_cover_every_byte_once_on_any_ranks(
    data: Dataset, ranks: int, rows: int
) -> None:
    source = data.source("a")
    each = [held_out_batches(data, "a", rows, rank, ranks) for rank in range(ranks)]
    batches = [list(part) for part in each]
    assert {len(part) for part in batches} == {len(each[0])}
    flat = [batch for part in batches for batch in part]
    assert sum(batch.target_bytes for batch in flat) == source.held_out_bytes
    # Every id but the BOS of each document.
    assert sum(batch.target_count for batch in flat) == source.held_out.tokens - 3
    for batch in flat:
        assert len(batch.tokens) == batch.rows * batch.row_length
        assert set(batch.source_ids) == {0}
    used = Counter(i for b in flat if b.target_count for i in b.sample_ids)
    assert set(used.values()) == {1}


def test_held_out_batches_can_be_limited_and_be_none(data: Dataset, folder: Path) -> None:
    limited = list(held_out_batches(data, "a", 2, max_tokens=5 * LENGTH))
    assert sum(len(batch.tokens) for batch in limited) == 5 * LENGTH
    assert list(held_out_batches(data, "a", 2, max_tokens=10**9))[-1].row_length < LENGTH
    with pytest.raises(DataError, match="no source 'c'; there is a, b"):
        held_out_batches(data, "c", 2)
    config = data.config.model_copy(update={"held_out": HeldOutConfig(documents=0)})
    assert len(held_out_batches(open_data(config), "a", 2)) == 0


def test_waiting_is_measured(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    inner = PackedLoader.assemble

    def slow(self: PackedLoader, first_sample: int):
        time.sleep(0.05)
        return inner(self, first_sample)

    monkeypatch.setattr(PackedLoader, "assemble", slow)
    with PackedLoader(data, seed=0, batch_rows=8, prefetch=2) as loader:
        waits = [loader.next_step().wait_s for _ in range(3)]
        assert min(waits) > 0.02
        time.sleep(0.2)
        assert loader.next_step().wait_s < 0.02
