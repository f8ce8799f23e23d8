"""`selective_scan` and the two custom ops behind it.

The states that the backward starts from are an output of the forward op, so that compilation and activation
checkpointing see them as what they are. Nothing here looks at the values of a tensor on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_documents, check_dtype, check_same_device, check_shape
from ..faces import pick_face
from .cpu import backward_cpu, forward_cpu
from .reference import (
    Gradients,
    ScanInputs,
    backward_reference,
    forward_reference,
    kept_shape,
    kept_states,
)

__all__ = ["document_starts", "selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space model S6, restarted at every document of a packed batch.

    For each row and channel, with a state h of N numbers:

        dt_t  = delta_t + delta_bias, through softplus where `delta_softplus`
        h_t   = exp(dt_t A) h_{t-1} + dt_t u_t B_t
        out_t = (sum_n C_t h_t + D u_t) * silu(z_t)

    h_{t-1} is replaced by exact zeros at the first token of a document: nothing passes, not even a NaN, in either
    direction. Source: Gu and Dao, arXiv 2312.00752, section 3.2 and algorithm 2, with the Euler step for B.

    Args:
        u, delta, z: (B, L, D), channels contiguous (copied where they are not).
        A: (D, N), negative: -exp(A_log).
        B, C: (B, L, N), or (B, L, G, N) where each of G groups of D/G channels has its own.
        D, delta_bias: (D,).
        delta_softplus: step sizes are softplus(delta + delta_bias).
        cu_seqlens: (documents + 1,) int32 borders in the B*L positions laid end to end, each row's included.
        position_ids: (B, L) or (B*L,), int64 or int32, position inside the document; a document starts at each 0.
        initial_state: (B, D, N), what a row continues from. It counts where the row's first token does not start
            a document: always without borders, where position_ids begin above 0, and never with cu_seqlens,
            which has a border at every row. Where it does not count its gradient is zero. None is zeros.
        return_final_state: give the state behind the last position too.

    All tensors of any floating type; arithmetic and states are fp32, or fp64 where any input but `initial_state` is.

    Returns:
        out (B, L, D) in the type of `u`, contiguous; with `return_final_state` also (B, D, N), fp32 or fp64. Both are
        differentiable (once).

    Raises:
        ValueError: shapes, types or devices that do not fit; both cu_seqlens and position_ids; borders that do not
        fit (values are looked at on the CPU only).
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    starts = document_starts(u.shape[0], u.shape[1], cu_seqlens, position_ids, u.device)
    if B.dim() == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    if initial_state is not None:
        wide = ScanInputs(u, delta, A, B, C, D, z, delta_bias, starts, delta_softplus).wide
        initial_state = initial_state.to(wide)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep_states = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    out, final, _ = _forward_op(
        u, delta, A, B, C, D, z, delta_bias, starts, initial_state, delta_softplus, keep_states
    )
    return (out, final) if return_final_state else out


def document_starts(
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """(B, L) bool, True at the first token of each document; None where no borders are given.

    Raises:
        ValueError: both are given, or they do not fit.
    """
    check_documents(batch, length, cu_seqlens, position_ids)
    check_same_device(
        u=torch.empty(0, device=device), cu_seqlens=cu_seqlens, position_ids=position_ids
    )
    if position_ids is not None:
        return position_ids.reshape(batch, length) == 0
    if cu_seqlens is None:
        return None
    # One position more, for borders that are padded with the total length.
    total = batch * length
    starts = torch.zeros(total + 1, dtype=torch.bool, device=device)
    starts = starts.index_fill(0, cu_seqlens.long(), True)[:total].view(batch, length).clone()
    starts[:, :1] = True
    return starts


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    check_shape("u", u, (None, None, None))
    batch, length, channels = u.shape
    check_shape("delta", delta, (batch, length, channels))
    check_shape("A", A, (channels, None))
    states = A.shape[1]
    if states == 0:
        raise ValueError(f"A has shape ({channels}, 0), expected at least one state")
    if B.dim() == 4:
        check_shape("B", B, (batch, length, None, states))
        if B.shape[2] == 0 or channels % B.shape[2]:
            raise ValueError(
                f"B has {B.shape[2]} groups, expected a divisor of the {channels} channels"
            )
    else:
        check_shape("B", B, (batch, length, states))
    check_shape("C", C, tuple(B.shape))
    optional: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    for name, (tensor, shape) in optional.items():
        if tensor is not None:
            check_shape(name, tensor, shape)
            named[name] = tensor
    for name, tensor in named.items():
        check_dtype(name, tensor)
    check_same_device(**named)


@torch.library.custom_op("weft::selective_scan_forward", mutates_args=())
def _forward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, starts, delta_softplus)
    if u.numel() == 0:
        return _forward_of_nothing(inputs, initial_state, keep_states)
    face = pick_face(u)
    if face == "triton":
        from .triton import forward_triton

        out, final, kept = forward_triton(inputs, initial_state, keep_states)
    elif face == "cpu":
        out, final, kept = forward_cpu(inputs, initial_state, keep_states)
    else:
        out, final, kept = forward_reference(inputs, initial_state, keep_states)
    return out, final, inputs.empty((0,)) if kept is None else kept


def _forward_of_nothing(
    inputs: ScanInputs, initial_state: Tensor | None, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Without a position the state passes unchanged."""
    u = inputs.u
    final = inputs.zeros((u.shape[0], *inputs.A.shape))
    if initial_state is not None:
        final.copy_(initial_state)
    states = kept_states(inputs, initial_state) if keep_states else inputs.empty((0,))
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), final, states


@_forward_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, starts, delta_softplus)
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        inputs.empty((u.shape[0], *A.shape)),
        inputs.empty(kept_shape(inputs) if keep_states else (0,)),
    )


@torch.library.custom_op("weft::selective_scan_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    grad_final: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
) -> list[Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, starts, delta_softplus)
    if u.numel() == 0:
        found = _backward_of_nothing(inputs, grad_final)
    else:
        grad_out = grad_out.contiguous()
        face = pick_face(u)
        if face == "triton":
            from .triton import backward_triton

            found = backward_triton(inputs, states, grad_out, grad_final)
        elif face == "cpu":
            found = backward_cpu(inputs, states, grad_out, grad_final)
        else:
            found = backward_reference(inputs, states, grad_out, grad_final)
    # Absent inputs have empty gradients: an op's results are tensors, and none of them another.
    return [
        inputs.empty((0,))
        if tensor is None or gradient is None
        else gradient.to(tensor.dtype).contiguous()
        for tensor, gradient in zip((*inputs.differentiable, states), found, strict=True)
    ]


def _backward_of_nothing(inputs: ScanInputs, grad_final: Tensor | None) -> Gradients:
    initial = inputs.zeros((inputs.u.shape[0], *inputs.A.shape))
    if grad_final is not None:
        initial.copy_(grad_final)

    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros_like(x)

    du, ddelta, dA, dB, dC = (torch.zeros_like(x) for x in inputs[:5])
    D, z, bias = zeros(inputs.D), zeros(inputs.z), zeros(inputs.delta_bias)
    return Gradients(du, ddelta, dA, dB, dC, D, z, bias, initial)


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
) -> list[Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, starts, delta_softplus)
    gradients = [
        inputs.empty((0,)) if x is None else torch.empty(x.shape, dtype=x.dtype, device=u.device)
        for x in inputs.differentiable
    ]
    return [*gradients, inputs.empty((u.shape[0], *A.shape))]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, ctx.delta_softplus, _ = inputs
    _, _, states = output
    ctx.has_initial_state = initial_state is not None
    ctx.mark_non_differentiable(states)
    # A gradient of zeros for `states` would be as large as they are.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, starts, states = ctx.saved_tensors
    u = tensors[0]
    if grad_out is None:
        grad_out = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
    *found, initial = _backward_op(
        grad_out, grad_final, *tensors, starts, states, ctx.delta_softplus
    )
    given = [None if x is None else gradient for x, gradient in zip(tensors, found, strict=True)]
    return (*given, None, initial if ctx.has_initial_state else None, None, None)


_forward_op.register_autograd(_backward, setup_context=_keep_for_backward)
