"""`causal_conv1d` and its step for decoding: argument checks, the registered op, and which face runs it.

The backward recomputes the pre-activation from the inputs, which are all that is kept. The final state is a
second output of the op, so that its gradient joins that of the last inputs in place.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..checks import check_documents, check_dtype, check_same_device, check_shape
from ..faces import pick_face, wide_dtype
from . import cpu, reference

__all__ = ["causal_conv1d", "causal_conv1d_step"]

WIDTHS = (2, 3, 4)


@torch.library.custom_op("weft::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
    wants_state: bool,
) -> tuple[Tensor, Tensor]:
    before = weight.shape[1] - 1
    last = x.new_empty(0)
    if wants_state:
        last = reference.last_inputs(x, state, positions, before)
    if x.numel() == 0:
        return x.new_empty(x.shape), last
    weight, bias, state, positions = _contiguous(weight, bias, state, positions)
    face = pick_face(x)
    if face == "triton":
        from . import triton

        x = x if x.stride(2) == 1 else x.contiguous()
        return triton.conv_forward(x, weight, bias, state, positions, has_silu), last
    path = reference if face == "reference" else cpu
    out = path.conv_forward(x, weight, bias, state, positions, has_silu)
    return out.contiguous(), last


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
    wants_state: bool,
) -> tuple[Tensor, Tensor]:
    rows, length, channels = x.shape
    last = (rows, weight.shape[1] - 1, channels) if wants_state else (0,)
    return x.new_empty(rows, length, channels), x.new_empty(last)


@torch.library.custom_op("weft::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    grad: Tensor,
    last_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state; the last two empty where there is none."""
    before = weight.shape[1] - 1
    dx, dweight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    dbias = weight.new_zeros(0) if bias is None else bias.new_zeros(bias.shape)
    dstate = x.new_zeros(0) if state is None else state.new_zeros(state.shape)
    if x.numel():
        weight, bias, state, positions = _contiguous(weight, bias, state, positions)
        face = pick_face(x)
        if face == "triton":
            from . import triton

            x = x if x.stride(2) == 1 else x.contiguous()
            args = (grad.contiguous(), x, weight, bias, state, positions, has_silu)
            dx, found, wide_dweight, wide_dbias = triton.conv_backward(*args)
            dstate = dstate if found is None else found
        else:
            path = reference if face == "reference" else cpu
            args = (grad.contiguous(), x, weight, bias, state, positions, has_silu)
            both, wide_dweight, wide_dbias = path.conv_backward(*args)
            dx = both[:, before:].to(x.dtype, copy=True).contiguous()
            if state is not None:
                dstate = both[:, :before].to(state.dtype, copy=True).contiguous()
        dweight.copy_(wide_dweight)
        if bias is not None:
            dbias.copy_(wide_dbias)
    if last_grad is not None:
        _add_last_grad(last_grad, dx, None if state is None else dstate, positions)
    return dx, dweight, dbias, dstate


@_conv_backward.register_fake
def _(
    grad: Tensor,
    last_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    )


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _add_last_grad(
    last_grad: Tensor, dx: Tensor, dstate: Tensor | None, positions: Tensor | None
) -> None:
    """Add the gradient of the final state to those of the inputs it was made of."""
    before, length = last_grad.shape[1], dx.shape[1]
    if positions is not None:
        last_grad = reference.keep_last_document(last_grad, positions)
    from_x = min(before, length)
    dx[:, length - from_x :] += last_grad[:, before - from_x :]
    if dstate is not None and from_x < before:
        dstate[:, from_x:] += last_grad[:, : before - from_x]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.has_silu, ctx.wants_state = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor, last_grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, positions = ctx.saved_tensors
    dx, dweight, dbias, dstate = torch.ops.weft.causal_conv1d_backward(
        grad,
        last_grad if ctx.wants_state else None,
        x,
        weight,
        bias,
        state,
        positions,
        ctx.has_silu,
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if state is None else dstate,
        None,
        None,
        None,
    )


_conv.register_autograd(_gradient, setup_context=_setup)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`out[t] = act(bias + sum_j weight[:, j] * x[t - W + 1 + j])`, each channel by itself, inside documents.

    Without `cu_seqlens` and `position_ids` no document starts in a row, and the inputs before it are the
    initial state. Where layers share a batch, `position_ids` is the cheaper of the two: the kernels read it as it is.
    Source: the short convolution of Gu and Dao (arXiv 2312.00752), section 3.4 and figure 3.

    Args:
        x: (B, L, D), any floating type; fp64 is computed in fp64, all else in fp32.
        weight: (D, W), W from 2 to 4; the last column meets the current token.
        bias: (D,).
        activation: None or `silu`.
        cu_seqlens: (documents + 1,) int32, borders in the B * L tokens laid end to end, every row border included.
        position_ids: (B, L) or (B * L,), int64 or int32; 0 starts a document, other values say nothing.
        initial_state: (B, W - 1, D), the inputs before the row, oldest first; zeros without it. It counts only where
            the row's first token does not start a document.
        return_final_state: return also the inputs that the next token would see.

    Returns:
        (B, L, D) in the type of `x`; with `return_final_state` also (B, W - 1, D) in that type: the last inputs of each
        row (of the initial state, too, where the row is shorter), 0 where they are of an earlier document than the row's last.
        Both are differentiable.

    Raises:
        ValueError: shapes, types or devices that do not fit, another activation, both kinds of borders.
    """
    _check_arguments(x, weight, bias, activation)
    rows, length, channels = x.shape
    if initial_state is not None:
        check_shape("initial_state", initial_state, (rows, weight.shape[1] - 1, channels))
        check_dtype("initial_state", initial_state)
    check_same_device(
        x=x,
        weight=weight,
        bias=bias,
        cu_seqlens=cu_seqlens,
        position_ids=position_ids,
        initial_state=initial_state,
    )
    positions = _positions(rows, length, cu_seqlens, position_ids)
    out, last = torch.ops.weft.causal_conv1d(
        x, weight, bias, initial_state, positions, activation == "silu", return_final_state
    )
    return (out, last) if return_final_state else out


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d` after the W - 1 inputs of `state`, in plain torch.

    Args:
        state: (B, W - 1, D), oldest first: a final state, or zeros where a document starts.
        x: (B, D).
        weight, bias, activation: as in `causal_conv1d`.

    Returns:
        (B, D) in the type of `x`, and the next state, (B, W - 1, D) in the type of `state`.

    Raises:
        ValueError: shapes, types or devices that do not fit, or another activation.
    """
    check_shape("x", x, (None, None))
    _check_arguments(x[:, None], weight, bias, activation)
    check_shape("state", state, (x.shape[0], weight.shape[1] - 1, x.shape[1]))
    check_dtype("state", state)
    check_same_device(x=x, weight=weight, bias=bias, state=state)
    next_state = torch.cat([state[:, 1:], x[:, None].to(state.dtype)], dim=1)
    dtype = wide_dtype(x)
    taps = weight.to(dtype).T
    out = (state.to(dtype) * taps[:-1]).sum(1) + x.to(dtype) * taps[-1]
    if bias is not None:
        out = out + bias.to(dtype)
    return (silu(out) if activation == "silu" else out).to(x.dtype), next_state


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    check_shape("x", x, (None, None, None))
    check_dtype("x", x)
    check_shape("weight", weight, (x.shape[2], None))
    check_dtype("weight", weight)
    if weight.shape[1] not in WIDTHS:
        raise ValueError(f"weight has {weight.shape[1]} taps, expected 2, 3 or 4")
    if bias is not None:
        check_shape("bias", bias, (x.shape[2],))
        check_dtype("bias", bias)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}, expected None or 'silu'")


def _positions(
    rows: int, length: int, cu_seqlens: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """(B, L) integers, 0 where a document starts; None where none does."""
    check_documents(rows, length, cu_seqlens, position_ids)
    if position_ids is not None:
        return position_ids.view(rows, length) if position_ids.dim() == 1 else position_ids
    if cu_seqlens is None:
        return None
    flags = torch.ones(rows * length + 1, dtype=torch.int32, device=cu_seqlens.device)
    return flags.index_fill(0, cu_seqlens.long(), 0)[:-1].view(rows, length)
