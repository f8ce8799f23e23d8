"""Rows back at their positions with a bias of their modality, summed in fp32: what the step sizes of Mamba need.

`routed_linear` rounds its bias to the type of its rows. A step size of Mamba is about exp(-6.9) at the start, where
bfloat16 has steps of 0.031 in the exponent: the sum must be wider than what is summed, and is one pass with the gather.
T rows of N channels, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import wide_dtype
from .linear import _row_sums_op
from .norm import stack_rows
from .routing import Routing, _gather_rows_op, modality_of_rows

__all__ = ["restore_with_bias"]


def restore_with_bias(x: Tensor, bias: Tensor | Sequence[Tensor], routing: Routing) -> Tensor:
    """`Routing.restore` of `x_r + b_m`, where m is the modality of sorted row r.

    Args:
        x: (T, N), rows sorted by modality, any floating type.
        bias: (M, N), or M tensors (N,).

    Returns:
        (T, N) in the order of positions, fp32, or fp64 where x or the bias is.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_shape("x", x, (routing.total, None))
    check_dtype("x", x)
    rows = stack_rows("bias", bias, routing, x.shape[1])
    check_same_device(routing=routing.order, x=x, bias=rows)
    sizes = list(routing.sizes)
    return _restore_op(x, rows, routing.order, routing.inverse, routing.offsets, sizes)


@torch.library.custom_op("weft::restore_with_bias", mutates_args=())
def _restore_op(
    x: Tensor, bias: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, sizes: list[int]
) -> Tensor:
    wide = wide_dtype(x, bias)
    modality = modality_of_rows(offsets, x.shape[0])[inverse]
    return bias.to(wide).index_select(0, modality).add_(x.index_select(0, inverse))


@_restore_op.register_fake
def _(
    x: Tensor, bias: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, sizes: list[int]
) -> Tensor:
    return torch.empty(x.shape, dtype=wide_dtype(x, bias), device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, order, inverse, _, ctx.sizes = inputs
    ctx.save_for_backward(order, inverse)
    ctx.dtypes = (x.dtype, bias.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    order, inverse = ctx.saved_tensors
    rows = _gather_rows_op(grad.contiguous(), order, inverse)
    sums = _row_sums_op(rows, ctx.sizes)
    return rows.to(ctx.dtypes[0]), sums.to(ctx.dtypes[1]), None, None, None, None


_restore_op.register_autograd(_backward, setup_context=_keep)
