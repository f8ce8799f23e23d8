"""One linear map for each modality over rows sorted by modality: a matrix product a slice.

T rows of K channels, M modalities, N outputs. Every product writes its slice of one result, so
nothing is split or joined. A modality without rows gets a gradient of exact zeros, so that the
collectives of all ranks match; a frozen weight gets none, and its product is not computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import autocast_dtype
from .routing import Routing

__all__ = ["routed_linear", "routed_linear_unsorted"]

Weights = Tensor | Sequence[Tensor]

GROUPED_ALIGNMENT = 8
"""grouped_mm wants rows of 16 bytes: channels in multiples of this many 16-bit values."""


def routed_linear(
    x: Tensor,
    weights: Weights,
    routing: Routing,
    bias: Weights | None = None,
    *,
    grouped: bool = False,
) -> Tensor:
    """`y_r = W_m x_r + b_m`, where m is the modality of sorted row r.

    Source: arXiv 2411.04996, algorithm 1; arXiv 2501.16295 for the projections of Mamba.
    Under autocast everything is cast to its type first, as by `torch.nn.functional.linear`.

    Args:
        x: (T, K), rows sorted by modality (`Routing.permute`).
        weights: (M, N, K), or M tensors (N, K), which may be frozen one by one.
        bias: (M, N), or M tensors (N,). The sum is rounded to the type of x: add what must be exact
            in a wider type, as the bias of Mamba's time steps, after this.
        grouped: use one `grouped_mm` instead of a product for each slice. It needs bfloat16,
            weights in one tensor, K and N multiples of 8, and no bias. Two or three slices of
            thousands of rows are as fast; it is for many modalities, or few rows of each.

    Returns:
        (T, N).

    Raises:
        ValueError: shapes, types or devices that do not fit, or a case `grouped` does not take.
    """
    _check_weights(x, weights, routing, bias)
    if routing.is_identity and not grouped:
        return _linear_of_one(x, weights, routing, bias)
    x, weights, bias = _autocast(x, weights, bias)
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    check_dtype("x", x)
    for tensor in (*matrices, *biases):
        if tensor.dtype != x.dtype:
            raise ValueError(f"weights are {_short(tensor)} and x is {_short(x)}; cast one of them")
    if grouped:
        _check_grouped(x, weights, bias)
    return _routed_linear_op(x, matrices, biases, list(routing.sizes), routing.offsets, grouped)


def _linear_of_one(x: Tensor, weights: Weights, routing: Routing, bias: Weights | None) -> Tensor:
    """A batch of one modality: torch's own linear map, and gradients of zeros for the weights of the others."""
    present = next((m for m, size in enumerate(routing.sizes) if size), 0)
    parts = [weights] if bias is None else [weights, bias]
    absent: list[Tensor] = []
    for group in parts:
        if not isinstance(group, Tensor):
            absent += [part for m, part in enumerate(group) if m != present and part.requires_grad]
    x, weight, row = _autocast(x, weights[present], None if bias is None else bias[present])
    check_dtype("x", x)
    assert isinstance(weight, Tensor)
    if weight.dtype != x.dtype:
        raise ValueError(f"weights are {_short(weight)} and x is {_short(x)}; cast one of them")
    out = torch.nn.functional.linear(x, weight, row)  # type: ignore[arg-type]
    return _Reach.apply(out, *absent) if absent and torch.is_grad_enabled() else out


class _Reach(torch.autograd.Function):
    """The first argument; the others get gradients of zeros, of one stored element each."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *absent: Tensor) -> Tensor:
        ctx.absent = [(part.shape, part.dtype) for part in absent]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.absent)
        return grad, *zeros


def routed_linear_unsorted(
    x: Tensor, weights: Weights, routing: Routing, bias: Weights | None = None
) -> Tensor:
    """`routed_linear` of rows in the order of positions; sorts and restores them on each call."""
    return routing.restore(routed_linear(routing.permute(x), weights, routing, bias))


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_weights(x: Tensor, weights: Weights, routing: Routing, bias: Weights | None) -> None:
    check_shape("x", x, (routing.total, None))
    n_modalities, channels = routing.n_modalities, x.shape[1]
    check_parts("weights", weights, n_modalities, (None, channels))
    outputs = weights.shape[1] if isinstance(weights, Tensor) else weights[0].shape[0]
    if not isinstance(weights, Tensor):
        check_parts("weights", weights, n_modalities, (outputs, channels))
    if bias is not None:
        check_parts("bias", bias, n_modalities, (outputs,))
    check_same_device(routing=routing.order, x=x)
    for name, parts in (("weights", weights), ("bias", bias)):
        for part in [parts] if isinstance(parts, Tensor) or parts is None else parts:
            check_same_device(**{"x": x, name: part})


def check_parts(
    name: str, parts: Weights, n_modalities: int, shape: tuple[int | None, ...]
) -> None:
    """Raises: ValueError: not one part of `shape` for each modality."""
    if isinstance(parts, Tensor):
        check_shape(name, parts, (n_modalities, *shape))
        return
    if len(parts) != n_modalities:
        raise ValueError(
            f"{name} has {len(parts)} tensors but the routing {n_modalities} modalities"
        )
    for modality, part in enumerate(parts):
        check_shape(f"{name}[{modality}]", part, shape)


def _check_grouped(x: Tensor, weights: Weights, bias: Weights | None) -> None:
    if not isinstance(weights, Tensor) or bias is not None:
        raise ValueError("grouped takes weights in one tensor (M, N, K) and no bias; leave it off")
    if x.dtype != torch.bfloat16:
        raise ValueError(f"grouped takes bfloat16, not {_short(x)}; leave it off")
    if any(size % GROUPED_ALIGNMENT for size in weights.shape[1:]):
        raise ValueError(
            f"grouped takes channels in multiples of {GROUPED_ALIGNMENT}, not weights of shape "
            f"{tuple(weights.shape)}; leave it off"
        )


def _autocast(
    x: Tensor, weights: Weights, bias: Weights | None
) -> tuple[Tensor, Weights, Weights | None]:
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x, weights, bias

    def cast(parts: Weights) -> Weights:
        if isinstance(parts, Tensor):
            return parts.to(dtype)
        return [part.to(dtype) for part in parts]

    return x.to(dtype), cast(weights), None if bias is None else cast(bias)


def _unstack(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """One tensor of `rank` for each modality, whether given apart or stacked in one."""
    if len(tensors) == 1 and tensors[0].dim() == rank + 1:
        return list(tensors[0].unbind(0))
    return list(tensors)


def _slices(sizes: Sequence[int]) -> Iterator[slice]:
    ends = itertools.accumulate(sizes)
    return (slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


@torch.library.custom_op("weft::routed_linear", mutates_args=())
def _routed_linear_op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    sizes: list[int],
    offsets: Tensor,
    grouped: bool,
) -> Tensor:
    matrices, rows = _unstack(weights, 2), _unstack(biases, 1)
    if grouped and x.shape[0]:
        stacked = weights[0].transpose(1, 2)
        return torch.nn.functional.grouped_mm(x.contiguous(), stacked, offs=offsets)
    out = torch.empty((x.shape[0], matrices[0].shape[0]), dtype=x.dtype, device=x.device)
    for modality, part in enumerate(_slices(sizes)):
        if part.start == part.stop:
            continue
        matrix = matrices[modality].t()
        if rows:
            torch.addmm(rows[modality], x[part], matrix, out=out[part])
        else:
            torch.mm(x[part], matrix, out=out[part])
    return out


@_routed_linear_op.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    sizes: list[int],
    offsets: Tensor,
    grouped: bool,
) -> Tensor:
    outputs = weights[0].shape[-2]
    return torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)


@torch.library.custom_op("weft::routed_linear_weight_grad", mutates_args=())
def _weight_grad_op(
    grad: Tensor, x: Tensor, sizes: list[int], wanted: list[int], offsets: Tensor, grouped: bool
) -> Tensor:
    """(W, N, K): gradients of the wanted modalities' weights, zeros where one has no rows."""
    if grouped and x.shape[0]:
        return torch.nn.functional.grouped_mm(grad.t(), x.contiguous(), offs=offsets)
    shape = (len(wanted), grad.shape[1], x.shape[1])
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    parts = list(_slices(sizes))
    for row, modality in enumerate(wanted):
        part = parts[modality]
        if part.start == part.stop:
            out[row].zero_()
        else:
            torch.mm(grad[part].t(), x[part], out=out[row])
    return out


@_weight_grad_op.register_fake
def _(
    grad: Tensor, x: Tensor, sizes: list[int], wanted: list[int], offsets: Tensor, grouped: bool
) -> Tensor:
    shape = (len(wanted), grad.shape[1], x.shape[1])
    return torch.empty(shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("weft::routed_row_sums", mutates_args=())
def _row_sums_op(grad: Tensor, sizes: list[int]) -> Tensor:
    """(M, N): sums over each modality's rows."""
    out = torch.empty((len(sizes), grad.shape[1]), dtype=grad.dtype, device=grad.device)
    for modality, part in enumerate(_slices(sizes)):
        torch.sum(grad[part], 0, out=out[modality])
    return out


@_row_sums_op.register_fake
def _(grad: Tensor, sizes: list[int]) -> Tensor:
    return torch.empty((len(sizes), grad.shape[1]), dtype=grad.dtype, device=grad.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, sizes, offsets, grouped = inputs
    # A frozen weight needs no input kept, and an input without gradient no weight.
    needs_x = any(weight.requires_grad for weight in weights)
    kept_weights = weights if x.requires_grad else []
    ctx.save_for_backward(x if needs_x else None, offsets, *kept_weights)
    ctx.sizes, ctx.grouped = sizes, grouped
    ctx.is_stacked = weights[0].dim() == 3
    ctx.is_bias_stacked = len(biases) == 1 and biases[0].dim() == 2


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, offsets, *weights = ctx.saved_tensors
    needs_x, needs_weights, needs_biases, *_ = ctx.needs_input_grad
    grad, sizes = grad.contiguous(), ctx.sizes
    grad_x, grad_weights = None, [None] * len(needs_weights)
    if needs_x:
        turned = [weight.transpose(-1, -2) for weight in weights]
        grad_x = _routed_linear_op(grad, turned, [], sizes, offsets, ctx.grouped)
    if ctx.is_stacked and needs_weights[0]:
        every = list(range(len(sizes)))
        grad_weights = [_weight_grad_op(grad, x, sizes, every, offsets, ctx.grouped)]
    elif any(needs_weights):
        wanted = [modality for modality, needs in enumerate(needs_weights) if needs]
        found = _weight_grad_op(grad, x, sizes, wanted, offsets, False).unbind(0)
        for modality, part in zip(wanted, found, strict=True):
            grad_weights[modality] = part
    return grad_x, grad_weights, _bias_grads(ctx, grad, needs_biases), None, None, None


def _bias_grads(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    if not any(needs):
        return [None] * len(needs)
    sums = _row_sums_op(grad, ctx.sizes)
    if ctx.is_bias_stacked:
        return [sums]
    return [row if wants else None for row, wants in zip(sums.unbind(0), needs, strict=True)]


_routed_linear_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.weft.routed_linear)
def _flops(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * out_shape[1]


@register_flop_formula(torch.ops.weft.routed_linear_weight_grad)
def _weight_grad_flops(
    grad: Any, x: Any, sizes: Any, wanted: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * sum(sizes[modality] for modality in wanted) * grad[1] * x[1]
