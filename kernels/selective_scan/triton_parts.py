"""What the Triton kernels of the selective scan share; `triton` launches them.

A program is one warp: 32 lanes times one, two or four channels, of one row and one stretch of positions. It takes T
positions at a time as tuples of T row vectors (dt, x = dt u, y ...), and goes through the N states one by one: the
recurrence of a state is then T fused multiply-adds a channel, serial in registers, without a shuffle or a barrier. The
state of a channel lives in memory between chunks, where its own thread alone writes and reads it; at chunk borders it
is also what the backward starts from. Traps:

- One tensor of shape (T, channels) instead of a tuple puts time across lanes: three times the instructions.
- The loads of the next state come before the arithmetic of this one; nothing else hides their latency.
- A document's first token selects zeros for the state. A decay of exactly zero would let a NaN through. Most chunks
  hold no first token, so the loop over states exists twice.
- Everything is converted on load: the interpreter computes with the bits of a bf16, not with its value.
"""

# A language of its own: tuples grow, a pointer moves, None is a type; nothing unpacks into a tuple.
# ruff: noqa: RUF005
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LN2",
    "advance",
    "chunk",
    "first_tokens",
    "gate_rows",
    "is_set",
    "of_channels",
    "place",
    "row",
    "sigmoid",
    "softplus_slope",
    "uniform",
    "where_row",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1: one instruction and a product, where a division checks its range."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    return _reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _softplus(x, TERMS: tl.constexpr):
    """max(x, 0) + log(1 + w), w = exp(-|x|), the logarithm as 2 artanh(w / (2 + w)): no digit lost at small w."""
    w = tl.exp2(tl.abs(x) * -LOG2E)
    s = w * _reciprocal(2.0 + w)
    square = s * s
    series = square * (2.0 / (2 * TERMS + 1)) + 2.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 2, -1, -1):
        series = series * square + 2.0 / (2 * i + 1)
    return tl.where(x > SOFTPLUS_THRESHOLD, x, tl.maximum(x, 0.0) + s * series)


@triton.jit
def softplus_slope(x):
    return tl.where(x > SOFTPLUS_THRESHOLD, 1.0, sigmoid(x))


@triton.jit
def uniform(p_row, T: tl.constexpr, USES_PTX: tl.constexpr):
    """T numbers that are the same for the whole warp; 16-byte loads, which Triton does not make of scalars."""
    row = ()
    if USES_PTX:
        for i in tl.static_range(T // 4):
            row = row + tl.inline_asm_elementwise(
                "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
                "=f,=f,=f,=f,l",
                [(p_row + 4 * i).to(tl.int64, bitcast=True)],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
    else:
        for i in tl.static_range(T):
            row = row + (tl.load(p_row + i),)
    return row


@triton.jit
def where_row(is_row, i_d, channels):
    """Mask of a block's channels, none of them where not `is_row`: the interpreter can't spread a bool over a vector."""
    return i_d < tl.where(is_row, channels, 0)


@triton.jit
def row(p_rows, t: tl.constexpr, s_t, i_d, channels, count, ACC: tl.constexpr):
    """Row t of a chunk in the accumulator's type, zeros behind the last position."""
    return tl.load(p_rows + t * s_t + i_d, mask=where_row(t < count, i_d, channels), other=0.0).to(
        ACC
    )


@triton.jit
def place(group_channels, groups, BD: tl.constexpr):
    """Which part of the scan a program has: (i_b, i_g, o_g, i_d, m_d), channels i_d of group i_g of row i_b.

    o_g is where the group starts in a row of channels, m_d masks those of i_d that it has. i_b is wide: it is multiplied
    by strides.
    """
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)
    i_b = (tl.program_id(2) // groups).to(tl.int64)
    i_g = tl.program_id(2) % groups
    return i_b, i_g, i_g * group_channels, i_d, i_d < group_channels


@triton.jit
def of_channels(p_values, o_g, i_d, m_d, BD: tl.constexpr, ACC: tl.constexpr):
    """One number a channel in the accumulator's type, zeros where there is no such input."""
    values = tl.zeros([BD], ACC)
    if p_values is not None:
        values = tl.load(p_values + o_g + i_d, mask=m_d, other=0.0).to(ACC)
    return values


@triton.jit
def chunk(
    p_u,
    s_u,
    p_delta,
    s_delta,
    bias,
    i_d,
    channels,
    count,
    T: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """(dt, x, u) as tuples of rows; positions behind the last leave every state as it is."""
    us, raws = (), ()
    for t in tl.static_range(T):
        us = us + (row(p_u, t, s_u, i_d, channels, count, ACC),)
        raws = raws + (row(p_delta, t, s_delta, i_d, channels, count, ACC),)
    dts, xs = (), ()
    for t in tl.static_range(T):
        raw = raws[t] + bias
        dt = _softplus(raw, TERMS) if SOFTPLUS else raw
        dt = tl.where(t < count, dt, 0.0)
        dts = dts + (dt,)
        xs = xs + (dt * us[t],)
    return dts, xs, us


@triton.jit
def first_tokens(p_starts, count, T: tl.constexpr):
    """Bit t is set where position t of the chunk starts a document."""
    bits = 0
    for t in tl.static_range(T):
        is_start = tl.load(p_starts + t, mask=t < count, other=0).to(tl.int32)
        bits = bits | (is_start << t)
    return bits


@triton.jit
def is_set(bits, t: tl.constexpr):
    return (bits & (1 << t)) != 0


@triton.jit
def _through_states(
    ys,
    dts,
    xs,
    bits,
    p_A,
    p_B,
    p_C,
    p_in,
    p_out,
    i_d,
    m_d,
    m_out,
    s_n,
    s_m,
    N: tl.constexpr,
    T: tl.constexpr,
    RESETS: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    """Every state over T positions: from p_in to p_out, and y += C h where p_C is given."""
    A = tl.load(p_A + i_d, mask=m_d, other=0.0)
    h = tl.load(p_in + i_d, mask=m_d, other=0.0)
    bs = uniform(p_B, T, USES_PTX)
    cs = ()
    if p_C is not None:
        cs = uniform(p_C, T, USES_PTX)
    for n in tl.range(N, loop_unroll_factor=2):
        o = tl.minimum(n + 1, N - 1)
        next_A = tl.load(p_A + o * s_n + i_d, mask=m_d, other=0.0)
        next_h = tl.load(p_in + o * s_n + i_d, mask=m_d, other=0.0)
        next_bs = uniform(p_B + o * s_m, T, USES_PTX)
        next_cs = ()
        if p_C is not None:
            next_cs = uniform(p_C + o * s_m, T, USES_PTX)
        new_ys = ()
        for t in tl.static_range(T):
            if RESETS:
                h = tl.where(is_set(bits, t), 0.0, h)
            h = tl.exp2(dts[t] * A) * h + xs[t] * bs[t]
            if p_C is not None:
                new_ys = new_ys + (ys[t] + h * cs[t],)
        tl.store(p_out + n * s_n + i_d, h, mask=m_out)
        A, h, bs, cs, ys = next_A, next_h, next_bs, next_cs, new_ys
    return ys


@triton.jit
def advance(
    ys,
    dts,
    xs,
    bits,
    p_A,
    p_B,
    p_C,
    p_in,
    p_out,
    i_d,
    m_d,
    m_out,
    s_n,
    s_m,
    N: tl.constexpr,
    T: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    if HAS_STARTS:
        if p_C is not None:
            if bits != 0:
                ys = _through_states(ys, dts, xs, bits, p_A, p_B, p_C, p_in, p_out, i_d, m_d, m_out, s_n, s_m, N, T, True, USES_PTX)  # fmt: skip
            else:
                ys = _through_states(ys, dts, xs, bits, p_A, p_B, p_C, p_in, p_out, i_d, m_d, m_out, s_n, s_m, N, T, False, USES_PTX)  # fmt: skip
        elif bits != 0:
            # An empty tuple can't be the result of a branch.
            _through_states(ys, dts, xs, bits, p_A, p_B, p_C, p_in, p_out, i_d, m_d, m_out, s_n, s_m, N, T, True, USES_PTX)  # fmt: skip
        else:
            _through_states(ys, dts, xs, bits, p_A, p_B, p_C, p_in, p_out, i_d, m_d, m_out, s_n, s_m, N, T, False, USES_PTX)  # fmt: skip
    else:
        ys = _through_states(ys, dts, xs, bits, p_A, p_B, p_C, p_in, p_out, i_d, m_d, m_out, s_n, s_m, N, T, False, USES_PTX)  # fmt: skip
    return ys


@triton.jit
def gate_rows(
    p_dout,
    s_dout,
    p_z,
    o_z,
    s_z,
    i_d,
    channels,
    count,
    T: tl.constexpr,
    ACC: tl.constexpr,
):
    """dy = dout silu(z) as a tuple of rows."""
    dys = ()
    for t in tl.static_range(T):
        dy = row(p_dout, t, s_dout, i_d, channels, count, ACC)
        if p_z is not None:
            z = row(p_z + o_z, t, s_z, i_d, channels, count, ACC)
            dy *= z * sigmoid(z)
        dys = dys + (dy,)
    return dys
