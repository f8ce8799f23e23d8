"""Sum of several table rows a position, with a row-sparse gradient.

A dense gradient of hashed n-gram tables would be as large as the tables, of which a batch touches
few rows. On the CPU each row comes out once, in order: rows are summed by the same fused bag kernel
as the lookup, over positions sorted by row, without holding one gradient copy a lookup.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["lookup_sum"]


class _LookupSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, has_missing: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table_shape, ctx.has_missing = table.shape, has_missing
        weights = None
        if has_missing:
            weights, ids = (ids >= 0).to(table.dtype), ids.clamp(min=0)
        return F.embedding_bag(ids, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        make = _expanded_gradient if grad.is_cuda else _coalesced_gradient
        return make(ids, grad, ctx.table_shape, ctx.has_missing), None, None


def _coalesced_gradient(ids: Tensor, grad: Tensor, shape: torch.Size, has_missing: bool) -> Tensor:
    """One row for each distinct id; the stable sort fixes the order of summation."""
    ordered, order = ids.flatten().sort(stable=True)
    if has_missing:
        there = slice(int((ordered < 0).sum()), None)
        ordered, order = ordered[there], order[there]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = is_first.nonzero().squeeze(1)
    positions = order.div_(ids.shape[1], rounding_mode="floor")
    values = F.embedding_bag(positions, grad.contiguous(), starts, mode="sum")
    return torch.sparse_coo_tensor(
        ordered[starts][None], values, shape, is_coalesced=True, check_invariants=False
    )


def _expanded_gradient(ids: Tensor, grad: Tensor, shape: torch.Size, has_missing: bool) -> Tensor:
    """One row a lookup, duplicates included: counting distinct ids would wait for the GPU.

    Missing ones are rows of zeros for the table's first row: leaving them out would be counting as well.
    """
    values = grad[:, None].expand(*ids.shape, grad.shape[-1])
    if has_missing:
        values, ids = values * (ids >= 0)[..., None], ids.clamp(min=0)
    return torch.sparse_coo_tensor(
        ids.reshape(1, -1), values.reshape(-1, grad.shape[-1]), shape, check_invariants=False
    )


def lookup_sum(table: Tensor, ids: Tensor, *, has_missing: bool = False) -> Tensor:
    """`table[ids].sum(1)`.

    Args:
        table: (N, d) float; its gradient is a sparse COO tensor of the same shape (coalesced on
            the CPU, with duplicate rows on CUDA).
        ids: (T, k) int64 in [0, N).
        has_missing: negative ids may occur, and add nothing.

    Returns:
        (T, d) in the type of `table`.
    """
    return _LookupSum.apply(table, ids, has_missing)
