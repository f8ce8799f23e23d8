"""One position of the selective scan, for decoding: the same recurrence, with the state in and out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..checks import check_dtype, check_same_device, check_shape
from .reference import ScanInputs, advance, spread_groups, step_sizes

__all__ = ["selective_scan_step"]


def selective_scan_step(
    state: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """What `selective_scan` does at one position, from the state before it.

    Args:
        state: (B, D, N), as `selective_scan` returns it; zeros at the start of a document.
        u, delta, z: (B, D).
        A: (D, N), negative.
        B, C: (B, N), or (B, G, N).
        D, delta_bias: (D,).

    Returns:
        out (B, D) in the type of `u`, and the new state, a new tensor of the type of `state` or wider: fp32, or fp64
        where any argument is. Plain torch operations: differentiable, and free to compile.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check(state, u, delta, A, B, C, D, z, delta_bias)
    if B.dim() == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    inputs = ScanInputs(
        u[:, None],
        delta[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        None,
        delta_bias,
        None,
        delta_softplus,
    )
    wide = torch.promote_types(inputs.wide, state.dtype)
    dt = step_sizes(inputs)[:, 0].to(wide)
    x = u.to(wide)
    B, C = (spread_groups(m.to(wide), inputs.group_channels) for m in (B, C))
    state = advance(state.to(wide), dt, dt * x, A.to(wide), B)
    y = (state * C).sum(-1)
    if D is not None:
        y = y + D.to(wide) * x
    if z is not None:
        y = y * silu(z.to(wide))
    return y.to(u.dtype), state


def _check(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    check_shape("u", u, (None, None))
    batch, channels = u.shape
    check_shape("delta", delta, (batch, channels))
    check_shape("A", A, (channels, None))
    states = A.shape[1]
    check_shape("state", state, (batch, channels, states))
    if B.dim() == 3:
        check_shape("B", B, (batch, None, states))
        if B.shape[1] == 0 or channels % B.shape[1]:
            raise ValueError(
                f"B has {B.shape[1]} groups, expected a divisor of the {channels} channels"
            )
    else:
        check_shape("B", B, (batch, states))
    check_shape("C", C, tuple(B.shape))
    named = {"u": u, "state": state, "delta": delta, "A": A, "B": B, "C": C}
    optional = {"D": (D, (channels,)), "z": (z, (batch, channels))}
    optional["delta_bias"] = (delta_bias, (channels,))
    for name, (tensor, shape) in optional.items():
        if tensor is not None:
            check_shape(name, tensor, shape)
            named[name] = tensor
    for name, tensor in named.items():
        check_dtype(name, tensor)
    check_same_device(**named)
