"""The selective scan in a few large torch operations a chunk: what runs without a GPU.

A chunk of positions is worked on at once, time first, as (T, B, G, N, D/G): channels innermost, where every operation
vectorises. Only h = a h + x B takes an operation a position, one that is fused and in place. Decays are never
multiplied up, and nothing is divided by one: both lose everything once dt is large. Shapes as in `reference`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import (
    SPACING,
    Gradients,
    ScanInputs,
    behind_gate,
    channels_last,
    gate_gradient,
    kept_states,
    step_sizes,
    step_slopes,
)

__all__ = ["backward_cpu", "forward_cpu"]

CHUNK_VALUES = 1 << 17
"""Values in each of a chunk's buffers, so that they stay in a core's cache."""
ROW_VALUES = 1 << 15
"""Rows of the batch are taken together while one position of them has fewer values than this."""


class _Walk:
    """Some rows of a scan, time first, with the buffers of one chunk.

    Attributes:
        dt, x: (L, B, G, 1, D/G). A: (G, N, D/G). B, C: (L, B, G, N, 1).
        a, h: buffers (T, B, G, N, D/G) and (T + 1, ...): decays, and the states before, between and after.
    """

    def __init__(self, inputs: ScanInputs) -> None:
        wide, groups = inputs.wide, inputs.B.shape[2]
        self.groups, self.length = groups, inputs.u.shape[1]
        self.step_sizes = step_sizes(inputs)
        self.dt = self.by_time(self.step_sizes)
        self.x = self.by_time(self.step_sizes * inputs.u.to(wide))
        self.A = inputs.A.to(wide).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
        # torch's exp2 is faster than its exp.
        self.A_log2 = self.A * math.log2(math.e)
        self.B, self.C = (m.to(wide).transpose(0, 1)[..., None] for m in (inputs.B, inputs.C))
        self.state_shape = (inputs.u.shape[0], *self.A.shape)
        spacings = CHUNK_VALUES // (SPACING * math.prod(self.state_shape))
        self.size = min(max(1, spacings), -(-self.length // SPACING)) * SPACING
        self.a, self.h = self.buffer(self.size), self.buffer(self.size + 1)
        self.a_rows, self.h_rows = self.a.unbind(0), self.h.unbind(0)
        self.starts = None if inputs.starts is None else inputs.starts.T[..., None, None, None]
        self.start_positions: list[int] = []
        if self.starts is not None:
            self.start_positions = self.starts.flatten(1).any(1).nonzero().flatten().tolist()

    def by_time(self, x: Tensor) -> Tensor:
        """(B, L, D) as (L, B, G, 1, D/G)."""
        return x.unflatten(2, (self.groups, -1)).unsqueeze(3).transpose(0, 1)

    def buffer(self, length: int, states: int | None = None) -> Tensor:
        batch, groups, all_states, channels = self.state_shape
        shape = (length, batch, groups, all_states if states is None else states, channels)
        return torch.empty(shape, dtype=self.A.dtype, device=self.A.device)

    def chunks(self) -> list[tuple[int, int]]:
        firsts = range(0, self.length, self.size)
        return [(first, min(first + self.size, self.length)) for first in firsts]

    def resets(self, first: int, last: int) -> dict[int, Tensor]:
        """Index in the chunk -> (B, 1, 1, 1) bool, for the positions where a row starts a document."""
        assert self.starts is not None or not self.start_positions
        low, high = (bisect.bisect_left(self.start_positions, at) for at in (first, last))
        inside = self.start_positions[low:high]
        return {} if self.starts is None else {at - first: self.starts[at] for at in inside}

    def advance(self, first: int, last: int, state: Tensor, resets: dict[int, Tensor]) -> None:
        """Fill `a` and `h` for the positions of a chunk; `state` is that before the first."""
        count = last - first
        a, after = self.a[:count], self.h[1 : count + 1]
        # First of all: the state may lie in what is written next.
        self.h[0].copy_(state)
        torch.mul(self.dt[first:last], self.A_log2, out=a).exp2_()
        torch.mul(self.x[first:last], self.B[first:last], out=after)
        rows = zip(self.a_rows, self.h_rows, self.h_rows[1 : count + 1], strict=False)
        for t, (decay, before, current) in enumerate(rows):
            if t in resets:
                before = before.masked_fill(resets[t], 0.0)
            current.addcmul_(decay, before)


def _row_groups(inputs: ScanInputs) -> Iterator[tuple[slice, ScanInputs]]:
    batch = inputs.u.shape[0]
    count = max(1, ROW_VALUES // max(1, inputs.A.numel()))
    for first in range(0, batch, count):
        rows = slice(first, min(first + count, batch))
        yield (
            rows,
            inputs._replace(
                u=inputs.u[rows],
                delta=inputs.delta[rows],
                B=inputs.B[rows],
                C=inputs.C[rows],
                z=None if inputs.z is None else inputs.z[rows],
                starts=None if inputs.starts is None else inputs.starts[rows],
            ),
        )


def forward_cpu(
    inputs: ScanInputs, initial_state: Tensor | None, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state (B, D, N), kept states or None)."""
    u = inputs.u
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    kept = kept_states(inputs, initial_state, every=keep_states)
    for rows, some in _row_groups(inputs):
        y = _forward_rows(_Walk(some), kept[rows], keep_states)
        if some.D is not None:
            y.addcmul_(some.D.to(some.wide), some.u.to(some.wide))
        if some.z is not None:
            y.mul_(torch.nn.functional.silu(some.z.to(some.wide)))
        out[rows].copy_(y)
    return out, channels_last(kept[:, -1]), kept if keep_states else None


def _forward_rows(walk: _Walk, kept: Tensor, keep_states: bool) -> Tensor:
    """y (B, L, D) before skip and gate; the states go to `kept`, or the final one alone."""
    y = walk.buffer(walk.length, states=1)
    state = kept[:, 0]
    for first, last in walk.chunks():
        count = last - first
        walk.advance(first, last, state, walk.resets(first, last))
        torch.matmul(walk.C[first:last].mT, walk.h[1 : count + 1], out=y[first:last])
        state = walk.h[count]
        if keep_states:
            slot, inner = first // SPACING, walk.h[SPACING : count + 1 : SPACING]
            kept[:, slot + 1 : slot + 1 + len(inner)].copy_(inner.transpose(0, 1))
    kept[:, -1].copy_(state)
    return y.transpose(0, 1).flatten(2)


def backward_cpu(
    inputs: ScanInputs, states: Tensor, grad_out: Tensor, grad_final: Tensor | None
) -> Gradients:
    u, _, A, B, C, D, z, bias, *_ = inputs
    du, ddelta = inputs.empty(u.shape), inputs.empty(u.shape)
    dz = None if z is None else inputs.empty(u.shape)
    dB, dC, dA = inputs.empty(B.shape), inputs.empty(C.shape), inputs.zeros(A.shape)
    dD = None if D is None else inputs.zeros(D.shape)
    dbias = None if bias is None else inputs.zeros(bias.shape)
    initial = inputs.zeros((u.shape[0], *A.shape))
    if grad_final is not None:
        initial.copy_(grad_final)
    for rows, some in _row_groups(inputs):
        part = _backward_rows(some, states[rows], grad_out[rows], initial[rows])
        du[rows], ddelta[rows], dB[rows], dC[rows] = part.u, part.delta, part.B, part.C
        initial[rows] = part.initial_state
        dA += part.A
        if dz is not None and part.z is not None:
            dz[rows] = part.z
        if dD is not None and part.D is not None:
            dD += part.D
        if dbias is not None and part.delta_bias is not None:
            dbias += part.delta_bias
    return Gradients(du, ddelta, dA, dB, dC, dD, dz, dbias, initial)


def _backward_rows(
    inputs: ScanInputs, kept: Tensor, grad_out: Tensor, grad_final: Tensor
) -> Gradients:
    walk, wide = _Walk(inputs), inputs.wide
    u = inputs.u.to(wide)
    dy = behind_gate(inputs, grad_out)
    dy_rows = walk.by_time(dy)
    # y is only needed for the gradient of the gate, and costs a product a chunk then.
    y = None if inputs.z is None else walk.buffer(walk.length, states=1)
    dx, ddt = walk.buffer(walk.length, states=1), walk.buffer(walk.length, states=1)
    batch, groups, states, channels = walk.state_shape
    dB, dC = (inputs.empty((walk.length, batch, groups, states, 1)) for _ in range(2))
    dA = inputs.zeros(walk.state_shape)
    q = grad_final.unflatten(1, (groups, channels)).mT.contiguous()
    g_buffer = walk.buffer(walk.size)
    g_rows = g_buffer.unbind(0)
    for first, last in reversed(walk.chunks()):
        count, here = last - first, slice(first, last)
        resets = walk.resets(first, last)
        walk.advance(first, last, kept[:, first // SPACING], resets)
        a, g = walk.a[:count], g_buffer[:count]
        before, after = walk.h[:count], walk.h[1 : count + 1]
        if y is not None:
            torch.matmul(walk.C[here].mT, after, out=y[here])
        torch.matmul(after, dy_rows[here].mT, out=dC[here])
        torch.mul(dy_rows[here], walk.C[here], out=g)
        q = _adjoint(walk.a_rows[:count], g_rows[:count], q, resets)
        torch.matmul(g, walk.x[here].mT, out=dB[here])
        torch.matmul(walk.B[here].mT, g, out=dx[here])
        e = a.mul_(before).mul_(g)
        for t, is_start in resets.items():
            e[t].masked_fill_(is_start, 0.0)
        part = ddt[here].zero_()
        for n in range(states):
            part[..., 0, :].addcmul_(e[..., n, :], walk.A[:, n])
        for e_t, dt_t in zip(e.unbind(0), walk.dt[here].unbind(0), strict=True):
            dA.addcmul_(e_t, dt_t)
    dz = None
    if y is not None and inputs.z is not None:
        full = y.transpose(0, 1).flatten(2)
        if inputs.D is not None:
            full = full.addcmul_(inputs.D.to(wide), u)
        dz = gate_gradient(inputs.z, grad_out, full)
    dx_rows, draw = dx.transpose(0, 1).flatten(2), ddt.transpose(0, 1).flatten(2)
    draw = draw.addcmul_(u, dx_rows)
    slopes = step_slopes(inputs)
    if slopes is not None:
        draw = draw.mul_(slopes)
    du = walk.step_sizes * dx_rows
    if inputs.D is not None:
        du.addcmul_(inputs.D.to(wide), dy)
    return Gradients(
        u=du,
        delta=draw,
        A=dA.sum(0).mT.flatten(0, 1),
        B=dB[..., 0].transpose(0, 1),
        C=dC[..., 0].transpose(0, 1),
        D=None if inputs.D is None else (dy * u).sum((0, 1)),
        z=dz,
        delta_bias=None if inputs.delta_bias is None else draw.sum((0, 1)),
        initial_state=channels_last(q),
    )


def _adjoint(
    a_rows: tuple[Tensor, ...], g_rows: tuple[Tensor, ...], q: Tensor, resets: dict[int, Tensor]
) -> Tensor:
    """g_t += a_{t+1} g_{t+1} in place, from `q` behind the last row; gives a_0 g_0, for the chunk before."""
    g_rows[-1].add_(q)
    for t in range(len(g_rows) - 1, 0, -1):
        if t in resets:
            g_rows[t - 1].add_((a_rows[t] * g_rows[t]).masked_fill_(resets[t], 0.0))
        else:
            g_rows[t - 1].addcmul_(a_rows[t], g_rows[t])
    q = a_rows[0] * g_rows[0]
    return q.masked_fill_(resets[0], 0.0) if 0 in resets else q
