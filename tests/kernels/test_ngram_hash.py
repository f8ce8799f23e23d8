"""N-gram hashes against exact Python integers that are wrapped and reduced by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weft.kernels import HASH_PRIMES, following_windows, ngram_hash, packed_windows


def oracle(ids: list[int], end: int, start: int, size: int, prime: int, rows: int) -> int:
    """The formula of the paper's code, on unbounded integers; ids before `start` count as 0."""
    total = 0
    for power, index in enumerate(range(end - size + 1, end + 1)):
        total += (ids[index] if index >= start else 0) * prime**power
    wrapped = (total + 2**63) % 2**64 - 2**63
    return wrapped % rows


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    rows=st.sampled_from([1, 97, 65_536, 500_002]),
    functions=st.integers(1, 3),
    data=st.data(),
)
def test_packed_hashes_equal_exact_arithmetic(
    lengths: list[int], sizes: list[int], rows: int, functions: int, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, 2**20), min_size=sum(lengths), max_size=sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])
    hashed = ngram_hash(
        packed_windows(torch.tensor(ids), positions, max(sizes)), sizes, rows, functions
    )
    assert hashed.shape == (len(ids), functions * len(sizes))
    for end, position in enumerate(positions.tolist()):
        expected = [
            (function * len(sizes) + i) * rows
            + oracle(ids, end, end - position, size, HASH_PRIMES[function], rows)
            for function in range(functions)
            for i, size in enumerate(sizes)
        ]
        assert hashed[end].tolist() == expected


def test_the_sum_wraps_and_the_modulus_is_floored() -> None:
    # 104 * p^2 exceeds 2^63, and the wrapped sum is negative: three wrong variants must differ.
    ids, prime, rows = [7, 200, 104], HASH_PRIMES[0], 500_002
    exact = sum(x * prime**j for j, x in enumerate(ids))
    wrapped = (exact + 2**63) % 2**64 - 2**63
    assert wrapped < 0
    found = ngram_hash(packed_windows(torch.tensor(ids), torch.arange(3), 3), [3], rows)[
        2, 0
    ].item()
    assert found == wrapped % rows
    truncated = -(-wrapped % rows)
    assert found not in (exact % rows, exact % 2**64 % rows, truncated)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_known_history_continues_a_sequence(step: int) -> None:
    sizes, rows = (2, 3, 5), 97
    ids = torch.randint(1, 300, (3, 10))
    history, found = torch.zeros(3, 4, dtype=torch.int64), []
    for new in ids.split(step, dim=1):
        found.append(ngram_hash(following_windows(history, new), sizes, rows, 2))
        history = torch.cat((history, new), dim=1)[:, -4:]
    whole = [ngram_hash(packed_windows(row, torch.arange(10), 5), sizes, rows, 2) for row in ids]
    assert torch.equal(torch.cat(found, dim=1), torch.stack(whole))


def test_newest_first_is_the_papers_order() -> None:
    ids, rows = [7, 200, 104, 0, 259, 33, 90, 2, 61], 500_002
    windows = packed_windows(torch.tensor(ids), torch.arange(len(ids)), 8, missing=-1)
    found = ngram_hash(windows, (2, 8), rows, 2, oldest_first=False)
    for end in range(len(ids)):
        expected = []
        for table, (prime, size) in enumerate(
            (prime, size) for prime in HASH_PRIMES[:2] for size in (2, 8)
        ):
            newest_first = ids[max(0, end - size + 1) : end + 1][::-1]
            value = oracle(newest_first, size - 1, 0, size, prime, rows) if end + 1 >= size else 0
            expected.append(table * rows + value if end + 1 >= size else -1)
        assert found[end].tolist() == expected
