"""The order as a function: bijections, exact counts, random access, independence of how it is asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weft.models.errors import DataError
from weft.trainer.data.order import (
    BLOCK,
    Apportionment,
    Permutation,
    SampleOrder,
    SourceShare,
    integer_weights,
)

SIZES = st.lists(st.integers(1, 700), min_size=1, max_size=6)


def mixture(
    sizes: list[int], weights: list[float] | None = None, **rest: float
) -> list[SourceShare]:
    weights_or_none = weights or [None] * len(sizes)
    return [
        SourceShare(f"s{j}", size, weight, **rest)  # type: ignore[arg-type]
        for j, (size, weight) in enumerate(zip(sizes, weights_or_none, strict=True))
    ]


@given(st.integers(1, 5000), st.binary(max_size=8))
def test_permutation_is_a_bijection(n: int, key: bytes) -> None:
    assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_reaches_far_and_depends_on_its_key() -> None:
    n = 10**12 + 7
    values = np.arange(n - 1000, n)
    first = Permutation(n, b"a")(values)
    assert len(set(first.tolist())) == 1000
    assert first.min() >= 0
    assert first.max() < n
    assert (first != Permutation(n, b"b")(values)).mean() > 0.99
    # Spread over the whole range: the mean of 1000 uniform draws is within five of its deviations.
    assert abs(first.mean() / n - 0.5) < 5 * np.sqrt(1 / 12 / 1000)


def test_small_permutations_are_close_to_uniform() -> None:
    draws = np.array([Permutation(5, str(key).encode())(np.arange(5)) for key in range(4000)])
    counts = np.array([np.bincount(draws[:, place], minlength=5) for place in range(5)])
    chi_squared = ((counts - 800) ** 2 / 800).sum()
    # 25 cells with 16 degrees of freedom; 60 is beyond one in a million.
    assert chi_squared < 60


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7))
def test_apportionment_is_exact_and_never_takes_back(weights: list[int]) -> None:
    split = Apportionment(weights)
    rounds = 2 * split.total + 3
    assigned = split.assign(np.arange(rounds))
    before = [0] * len(weights)
    for items in range(rounds):
        now = split.counts(items)
        assert sum(now) == items
        assert now == before
        before[assigned[items]] += 1
    assert split.counts(split.total) == weights
    assert split.counts(10**15 * split.total) == [10**15 * weight for weight in weights]


def test_integer_weights_keep_integers_and_ratios() -> None:
    assert integer_weights([3, 5]) == [3, 5]
    shares = integer_weights([0.7, 0.2, 0.1])
    assert sum(shares) == 1 << 30
    assert np.allclose(np.array(shares) / (1 << 30), [0.7, 0.2, 0.1], atol=2e-9)
    assert min(integer_weights([1.0, 1e-30])) == 1


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 2**63))
def test_one_pass_without_weights_sees_each_sequence_once(sizes: list[int], seed: int) -> None:
    order = SampleOrder(mixture(sizes), seed)
    for epoch in range(2):
        found = order.locate(epoch * sum(sizes), (epoch + 1) * sum(sizes))
        seen = Counter(zip(found.sources.tolist(), found.sequences.tolist(), strict=True))
        assert set(seen.values()) == {1}
        assert len(seen) == sum(sizes)
        assert set(found.epochs.tolist()) == {epoch}


@settings(max_examples=40, deadline=None)
@given(SIZES, st.data())
def test_counts_in_closed_form_equal_counting(sizes: list[int], data: st.DataObject) -> None:
    weighted = data.draw(st.booleans())
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    order = SampleOrder(mixture(sizes, weights if weighted else None), 3)
    stop = data.draw(st.integers(0, 5 * BLOCK))
    counted = (
        np.bincount(order.locate(0, stop).sources, minlength=len(sizes))
        if stop
        else [0] * len(sizes)
    )
    assert list(order.counts(stop).values()) == list(counted)


def test_weights_are_kept_within_a_few_samples() -> None:
    weights = [0.5, 0.3, 0.19, 0.01]
    order = SampleOrder(mixture([10_000, 50, 700, 3], weights), 0)
    for stop in (BLOCK, 10 * BLOCK, 10**9 // BLOCK * BLOCK):
        counts = np.array(list(order.counts(stop).values()))
        assert np.abs(counts - np.array(weights) * stop).max() <= 3


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 3000), st.integers(1, 300))
def test_any_window_equals_the_whole(sizes: list[int], first: int, length: int) -> None:
    whole = SampleOrder(mixture(sizes), 11).locate(0, first + length)
    part = SampleOrder(mixture(sizes), 11).locate(first, first + length)
    for name in ("sources", "epochs", "sequences"):
        assert (getattr(whole, name)[first:] == getattr(part, name)).all()


def test_far_positions_are_reached_at_once() -> None:
    order = SampleOrder(mixture([10**9, 10**8]), 5)
    found = order.locate(10**12, 10**12 + 64)
    assert found.sequences.max() < 10**9
    assert set(found.epochs.tolist()) <= {909, 908}


def test_repeats_are_whole_passes_plus_a_part() -> None:
    order = SampleOrder(mixture([40, 1000], [0.5, 0.5]), 9)
    found = order.locate(0, 500)
    mine = found.sources == 0
    sequences, epochs = found.sequences[mine], found.epochs[mine]
    assert (np.diff(epochs) >= 0).all()
    for epoch in range(int(epochs[-1])):
        assert sorted(sequences[epochs == epoch].tolist()) == list(range(40))
    assert sequences[epochs == 0].tolist() != sequences[epochs == 1].tolist()


def test_seeds_and_names_change_the_order() -> None:
    base = SampleOrder(mixture([1000]), 1).locate(0, 100).sequences
    assert (base != SampleOrder(mixture([1000]), 2).locate(0, 100).sequences).mean() > 0.9
    renamed = SampleOrder([SourceShare("other", 1000)], 1).locate(0, 100).sequences
    assert (base != renamed).mean() > 0.9


def test_too_few_samples_are_refused_before_and_while_running() -> None:
    order = SampleOrder(mixture([100], max_epochs=1.5), 0)
    order.check(150)
    order.locate(0, 150)
    with pytest.raises(
        DataError, match=r"too few samples: source 's0' has 100 sequences, 150 samples.*takes 151"
    ):
        order.check(151)
    with pytest.raises(DataError, match="too few samples"):
        order.locate(140, 151)


def test_weights_for_some_sources_only_are_refused() -> None:
    with pytest.raises(DataError, match="all of them one, or none"):
        SampleOrder([SourceShare("a", 5, 1.0), SourceShare("b", 5)], 0)
