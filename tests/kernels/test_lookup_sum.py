"""Sums of table rows, and their sparse gradient against the dense one."""

from __future__ import annotations

import torch
from weft.kernels import lookup_sum
from weft.kernels.lookup_sum import _expanded_gradient


def test_value_and_gradient_equal_the_dense_form() -> None:
    table = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 12, (50, 4))
    ids[7] = 5  # one row four times at one position
    seed = torch.randn(50, 3, dtype=torch.float64)
    out = lookup_sum(table, ids)
    torch.testing.assert_close(out, table[ids].sum(1))
    (gradient,) = torch.autograd.grad(out, table, seed)
    (expected,) = torch.autograd.grad(table[ids].sum(1), table, seed)
    assert gradient.is_sparse
    torch.testing.assert_close(gradient.to_dense(), expected)
    assert torch.equal(gradient.coalesce().indices()[0], ids.unique())
    torch.testing.assert_close(
        _expanded_gradient(ids, seed, table.shape, False).to_dense(), expected
    )


def test_gradient_rows_come_sorted_and_once() -> None:
    table = torch.randn(1000, 2, requires_grad=True)
    ids = torch.randint(0, 1000, (64, 6))
    lookup_sum(table, ids).sum().backward()
    rows = table.grad._indices()[0]
    assert torch.equal(rows, ids.unique())


def test_gradients_accumulate() -> None:
    table = torch.randn(9, 2, requires_grad=True)
    first, second = torch.tensor([[1, 2]]), torch.tensor([[2, 8]])
    for ids in (first, second):
        lookup_sum(table, ids).sum().backward()
    assert table.grad.to_dense()[:, 0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 1]


def test_missing_rows_add_nothing() -> None:
    table = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, -1], [-1, -1], [4, 1], [0, -1]])
    there = (ids >= 0)[..., None]
    out, plain = lookup_sum(table, ids, has_missing=True), (table[ids] * there).sum(1)
    torch.testing.assert_close(out, plain)
    seed = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, table, seed)
    (expected,) = torch.autograd.grad(plain, table, seed)
    torch.testing.assert_close(gradient.to_dense(), expected)
    assert gradient.coalesce().indices()[0].tolist() == [0, 1, 4]
    expanded = _expanded_gradient(ids, seed, table.shape, True)
    torch.testing.assert_close(expanded.to_dense(), expected)
