"""The selective scan as defined: one step after the other, forward and backward, exact in float64.

Everything else in this folder is compared with this file. B rows, L positions, D channels in G groups of D/G that
share their input and output matrices, N states a channel; `wide` is the type of all arithmetic (fp32 or fp64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ..faces import wide_dtype

__all__ = [
    "SPACING",
    "Gradients",
    "ScanInputs",
    "advance",
    "backward_reference",
    "behind_gate",
    "channels_last",
    "forward_reference",
    "gate_gradient",
    "kept_shape",
    "kept_states",
    "scan_reference",
    "spread_groups",
    "step_sizes",
    "step_slopes",
]

SPACING = 16
"""Positions from one kept state to the next. More saves memory and repeats more of the forward in the backward."""

SOFTPLUS_THRESHOLD = 20.0
"""Above it softplus(x) is x, as in torch."""


class ScanInputs(NamedTuple):
    """What a scan reads, beside its initial state.

    u, delta, z: (B, L, D). A: (D, N). B, C: (B, L, G, N). D, delta_bias: (D,). starts: (B, L) bool, True at the
    first token of a document.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    starts: Tensor | None
    delta_softplus: bool

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(*(x for x in self.differentiable if x is not None))

    @property
    def group_channels(self) -> int:
        return self.u.shape[2] // self.B.shape[2]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias)

    def empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), dtype=self.wide, device=self.u.device)

    def zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=self.wide, device=self.u.device)


class Gradients(NamedTuple):
    """One for each of `ScanInputs.differentiable`, shaped like it, and the initial state's, (B, D, N)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor


def step_sizes(inputs: ScanInputs) -> Tensor:
    """dt (B, L, D): the step sizes after bias and softplus."""
    raw = _raw_step_sizes(inputs)
    return softplus(raw, threshold=SOFTPLUS_THRESHOLD) if inputs.delta_softplus else raw


def _raw_step_sizes(inputs: ScanInputs) -> Tensor:
    raw = inputs.delta.to(inputs.wide)
    return raw if inputs.delta_bias is None else raw + inputs.delta_bias.to(inputs.wide)


def step_slopes(inputs: ScanInputs) -> Tensor | None:
    """d dt / d raw (B, L, D), None where it is 1."""
    if not inputs.delta_softplus:
        return None
    raw = _raw_step_sizes(inputs)
    return torch.sigmoid(raw).masked_fill_(raw > SOFTPLUS_THRESHOLD, 1.0)


def advance(state: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """exp(dt A) state + x B for one position.

    Args:
        state: (B, D, N); dt, x: (B, D), x = dt u; A: (D, N); B: (B, D, N).
    """
    return torch.exp(dt[..., None] * A) * state + x[..., None] * B


def spread_groups(matrix: Tensor, group_channels: int) -> Tensor:
    """(..., G, N) of groups to (..., D, N) of channels."""
    return matrix.repeat_interleave(group_channels, dim=-2)


def channels_last(states: Tensor) -> Tensor:
    """(B, G, N, D/G) as states are kept, to (B, D, N) as they are handed out; a copy."""
    batch, groups, size, channels = states.shape
    rows = states.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    return rows.view(batch, groups * channels, size)


def kept_shape(inputs: ScanInputs, every: bool = True) -> tuple[int, int, int, int, int]:
    """(B, slots, G, N, D/G): a slot every SPACING positions and the final one, or a single slot."""
    batch, length, channels = inputs.u.shape
    groups, states = inputs.B.shape[2:]
    slots = -(-length // SPACING) + 1 if every else 1
    return batch, slots, groups, states, channels // groups


def kept_states(inputs: ScanInputs, initial_state: Tensor | None, every: bool = True) -> Tensor:
    """Memory of `kept_shape` for the states that the backward starts from, slot 0 filled.

    Slot k is the state before position k * SPACING, the last slot the final state.
    """
    groups = inputs.B.shape[2]
    memory = inputs.empty(kept_shape(inputs, every))
    if initial_state is None:
        memory[:, 0].zero_()
    else:
        memory[:, 0].copy_(_channels_first(initial_state, groups))
    return memory


def _channels_first(state: Tensor, groups: int) -> Tensor:
    """(..., D, N) to (..., G, N, D/G); a view where it can be."""
    return state.unflatten(-2, (groups, state.shape[-2] // groups)).transpose(-1, -2)


def scan_reference(
    inputs: ScanInputs, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The definition, differentiable by autograd.

    Returns:
        out (B, L, D) in the type of u, the final state (B, D, N), and the state before each position.
    """
    u, _, A, _, _, D, z, _, starts, _ = inputs
    wide, group_channels = inputs.wide, inputs.group_channels
    dt = step_sizes(inputs)
    x = dt * u.to(wide)
    A = A.to(wide)
    if initial_state is None:
        state = inputs.zeros((u.shape[0], *A.shape))
    else:
        state = initial_state.to(wide)
    before, rows = [], []
    for t in range(u.shape[1]):
        before.append(state)
        if starts is not None:
            # Selected, not multiplied by zero: a NaN of the document before must not survive.
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        B_t = spread_groups(inputs.B[:, t].to(wide), group_channels)
        C_t = spread_groups(inputs.C[:, t].to(wide), group_channels)
        state = advance(state, dt[:, t], x[:, t], A, B_t)
        rows.append((state * C_t).sum(-1))
    y = torch.stack(rows, dim=1) if rows else u.to(wide)
    if D is not None:
        y = y + D.to(wide) * u.to(wide)
    if z is not None:
        y = y * silu(z.to(wide))
    return y.to(u.dtype), state, before


def forward_reference(
    inputs: ScanInputs, initial_state: Tensor | None, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state (B, D, N), kept states or None)."""
    out, final, before = scan_reference(inputs, initial_state)
    if not keep_states:
        return out, final, None
    states = kept_states(inputs, initial_state)
    for slot, state in enumerate([*before[::SPACING], final]):
        states[:, slot].copy_(_channels_first(state, inputs.B.shape[2]))
    return out, final, states


def behind_gate(inputs: ScanInputs, grad_out: Tensor) -> Tensor:
    """dy, the gradient of y in out = y silu(z)."""
    grad_out = grad_out.to(inputs.wide)
    return grad_out if inputs.z is None else grad_out * silu(inputs.z.to(inputs.wide))


def gate_gradient(z: Tensor, grad_out: Tensor, y: Tensor) -> Tensor:
    """dz in out = y silu(z); `y` has the type of all arithmetic."""
    z, grad_out = z.to(y.dtype), grad_out.to(y.dtype)
    s = torch.sigmoid(z)
    return grad_out * y * s * (1 + z * (1 - s))


def backward_reference(
    inputs: ScanInputs, states: Tensor, grad_out: Tensor, grad_final: Tensor | None
) -> Gradients:
    """All gradients, by the adjoint recurrence g_t = C_t dy_t + a_{t+1} g_{t+1}, one step after the other."""
    u, _, A, B, C, D, z, _, starts, _ = inputs
    wide, group_channels, groups = inputs.wide, inputs.group_channels, B.shape[2]
    initial = channels_last(states[:, 0])
    length = u.shape[1]
    # The output before the gate, and the state before each position.
    y, final, before = scan_reference(
        inputs._replace(z=None, u=u.to(wide), delta=inputs.delta.to(wide)), initial
    )
    dy = behind_gate(inputs, grad_out)
    dt = step_sizes(inputs)
    u, A = u.to(wide), A.to(wide)
    x = dt * u
    dx, ddt = torch.zeros_like(u), torch.zeros_like(u)
    dA = torch.zeros_like(A)
    dB, dC = inputs.zeros(B.shape), inputs.zeros(C.shape)
    # q is the gradient of the state that a position hands to the next one.
    q = torch.zeros_like(initial) if grad_final is None else grad_final.to(wide)
    after = [*before[1:], final]
    for t in reversed(range(length)):
        a = torch.exp(dt[:, t, :, None] * A)
        decayed = a * before[t]
        B_t = spread_groups(B[:, t].to(wide), group_channels)
        C_t = spread_groups(C[:, t].to(wide), group_channels)
        g = C_t * dy[:, t, :, None] + q
        q = a * g
        if starts is not None:
            is_start = starts[:, t, None, None]
            q, decayed = q.masked_fill(is_start, 0.0), decayed.masked_fill(is_start, 0.0)
        e = g * decayed
        dC[:, t] = (after[t] * dy[:, t, :, None]).unflatten(1, (groups, -1)).sum(2)
        dB[:, t] = (g * x[:, t, :, None]).unflatten(1, (groups, -1)).sum(2)
        dx[:, t] = (g * B_t).sum(-1)
        ddt[:, t] = (e * A).sum(-1)
        dA += (e * dt[:, t, :, None]).sum(0)
    du = dt * dx
    ddt += u * dx
    slopes = step_slopes(inputs)
    if slopes is not None:
        ddt *= slopes
    if D is not None:
        du += D.to(wide) * dy
    return Gradients(
        u=du,
        delta=ddt,
        A=dA,
        B=dB,
        C=dC,
        D=None if D is None else (dy * u).sum((0, 1)),
        z=None if z is None else gate_gradient(z, grad_out, y),
        delta_bias=None if inputs.delta_bias is None else ddt.sum((0, 1)),
        initial_state=q,
    )
