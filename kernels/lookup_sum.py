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
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table_shape = table.shape
        return F.embedding_bag(ids, table, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        if grad.is_cuda:
            return _expanded_gradient(ids, grad, ctx.table_shape), None
        return _coalesced_gradient(ids, grad, ctx.table_shape), None


def _coalesced_gradient(ids: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """One row for each distinct id; the stable sort fixes the order of summation."""
    ordered, order = ids.flatten().sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = is_first.nonzero().squeeze(1)
    positions = order.div_(ids.shape[1], rounding_mode="floor")
    values = F.embedding_bag(positions, grad.contiguous(), starts, mode="sum")
    return torch.sparse_coo_tensor(
        ordered[starts][None], values, shape, is_coalesced=True, check_invariants=False
    )


def _expanded_gradient(ids: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """One row a lookup, duplicates included: counting distinct ids would wait for the GPU."""
    values = grad[:, None].expand(*ids.shape, grad.shape[-1]).reshape(-1, grad.shape[-1])
    return torch.sparse_coo_tensor(ids.reshape(1, -1), values, shape, check_invariants=False)


def lookup_sum(table: Tensor, ids: Tensor) -> Tensor:
    """`table[ids].sum(1)`.

    Args:
        table: (N, d) float; its gradient is a sparse COO tensor of the same shape (coalesced on
            the CPU, with duplicate rows on CUDA).
        ids: (T, k) int64 in [0, N).

    Returns:
        (T, d) in the type of `table`.
    """
    return _LookupSum.apply(table, ids)
