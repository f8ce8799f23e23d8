"""The scan itself, and the effect of segments on a state, which their combination needs. See `triton_parts`."""

# A language of its own: tuples grow, a pointer moves, None is a type; nothing unpacks into a tuple.
# ruff: noqa: RUF005
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import (
    advance,
    chunk,
    first_tokens,
    gate_rows,
    is_set,
    of_channels,
    place,
    row,
    sigmoid,
    uniform,
    where_row,
)

__all__ = ["combine_kernel", "forward_kernel", "local_kernel"]


@triton.jit(do_not_specialize=["length", "segment_chunks", "segments"])
def forward_kernel(
    p_u,
    p_delta,
    p_z,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_starts,
    p_states,
    p_out,
    s_u_b,
    s_u_t,
    s_delta_b,
    s_delta_t,
    s_z_b,
    s_z_t,
    s_m,
    length,
    group_channels,
    groups,
    segment_chunks,
    segments,
    N: tl.constexpr,
    T: tl.constexpr,
    BD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TERMS: tl.constexpr,
    KEEP: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    """out, and the states: one a chunk of T positions where KEEP, else one a segment, which is updated in place."""
    ACC: tl.constexpr = p_A.dtype.element_ty
    i_b, i_g, o_g, i_d, m_d = place(group_channels, groups, BD)
    i_segment = tl.program_id(1)
    channels = groups * group_channels
    p_u += i_b * s_u_b + o_g
    p_delta += i_b * s_delta_b + o_g
    p_out += i_b * length * channels + o_g
    p_A += o_g * N
    p_B += (i_b * groups + i_g) * N * s_m
    p_C += (i_b * groups + i_g) * N * s_m
    s_slot = channels * N
    chunks = tl.cdiv(length, T)
    slots = chunks + 1 if KEEP else segments
    p_states += i_b * slots * s_slot + o_g * N
    bias = of_channels(p_bias, o_g, i_d, m_d, BD, ACC)
    skip = of_channels(p_D, o_g, i_d, m_d, BD, ACC)
    first = i_segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    for k in range(first, last):
        o_t = tl.cast(k * T, tl.int64)
        count = length - k * T
        dts, xs, us = chunk(p_u + o_t * s_u_t, s_u_t, p_delta + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
        ys = ()
        for t in tl.static_range(T):
            ys = ys + (skip * us[t],)
        bits = 0
        if p_starts is not None:
            bits = first_tokens(p_starts + i_b * length + o_t, count, T)
        if KEEP:
            p_in = p_states + tl.cast(k, tl.int64) * s_slot
            p_next = p_in + s_slot
            # The first state of the next segment is already there, from the combination of the segments.
            m_next = where_row((k + 1 < last) | (last == chunks), i_d, group_channels)
        else:
            p_in = p_states + i_segment.to(tl.int64) * s_slot
            p_next = p_in
            m_next = m_d
        ys = advance(ys, dts, xs, bits, p_A, p_B + o_t, p_C + o_t, p_in, p_next, i_d, m_d, m_next, group_channels, s_m, N, T, p_starts is not None, USES_PTX)  # fmt: skip
        for t in tl.static_range(T):
            y = ys[t]
            if p_z is not None:
                z = row(
                    p_z + i_b * s_z_b + o_g + o_t * s_z_t, t, s_z_t, i_d, group_channels, count, ACC
                )
                y *= z * sigmoid(z)
            tl.store(
                p_out + o_t * channels + t * channels + i_d,
                y,
                mask=where_row(t < count, i_d, group_channels),
            )


@triton.jit
def _adjoint(
    dys,
    dts,
    bits,
    p_A,
    p_C,
    p_q,
    i_d,
    m_d,
    s_n,
    s_m,
    N: tl.constexpr,
    T: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    """The gradient of every state back over T positions, in place in p_q."""
    for n in tl.range(N, loop_unroll_factor=2):
        A = tl.load(p_A + n * s_n + i_d, mask=m_d, other=0.0)
        q = tl.load(p_q + n * s_n + i_d, mask=m_d, other=0.0)
        cs = uniform(p_C + n * s_m, T, USES_PTX)
        for t in tl.static_range(T - 1, -1, -1):
            q = tl.exp2(dts[t] * A) * (cs[t] * dys[t] + q)
            if HAS_STARTS:
                q = tl.where(is_set(bits, t), 0.0, q)
        tl.store(p_q + n * s_n + i_d, q, mask=m_d)


@triton.jit(do_not_specialize=["length", "segment_chunks", "segments"])
def local_kernel(
    p_u,
    p_delta,
    p_z,
    p_out_grad,
    p_A,
    p_B,
    p_bias,
    p_starts,
    p_local,
    p_decay,
    s_u_b,
    s_u_t,
    s_delta_b,
    s_delta_t,
    s_z_b,
    s_z_t,
    s_m,
    length,
    group_channels,
    groups,
    segment_chunks,
    segments,
    N: tl.constexpr,
    T: tl.constexpr,
    BD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TERMS: tl.constexpr,
    ADJOINT: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    """What each segment does to a state, h -> decay h + local; `p_local` (B, segments, G, N, D/G) comes with zeros.

    Forward, local is the segment's final state from zeros. ADJOINT takes the same walk backwards for the gradient of the
    state, q -> decay q + local, with p_B holding C.
    """
    ACC: tl.constexpr = p_A.dtype.element_ty
    i_b, i_g, o_g, i_d, m_d = place(group_channels, groups, BD)
    i_segment = tl.program_id(1)
    channels = groups * group_channels
    p_A += o_g * N
    p_B += (i_b * groups + i_g) * N * s_m
    o_slot = (i_b * segments + i_segment) * channels * N + o_g * N
    p_local += o_slot
    p_decay += o_slot
    bias = of_channels(p_bias, o_g, i_d, m_d, BD, ACC)
    first = i_segment * segment_chunks
    last = tl.minimum(first + segment_chunks, tl.cdiv(length, T))
    total = tl.zeros([BD], ACC)
    all_bits = 0
    for i in range(last - first):
        k = (last - 1 - i) if ADJOINT else (first + i)
        o_t = tl.cast(k * T, tl.int64)
        count = length - k * T
        dts, xs, _ = chunk(p_u + i_b * s_u_b + o_g + o_t * s_u_t, s_u_t, p_delta + i_b * s_delta_b + o_g + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
        bits = 0
        if p_starts is not None:
            bits = first_tokens(p_starts + i_b * length + o_t, count, T)
            all_bits = all_bits | bits
        for t in tl.static_range(T):
            total += dts[t]
        if ADJOINT:
            p_dout = p_out_grad + (i_b * length + o_t) * channels + o_g
            dys = gate_rows(p_dout, channels, p_z, i_b * s_z_b + o_g + o_t * s_z_t, s_z_t, i_d, group_channels, count, T, ACC)  # fmt: skip
            _adjoint(dys, dts, bits, p_A, p_B + o_t, p_local, i_d, m_d, group_channels, s_m, N, T, p_starts is not None, USES_PTX)  # fmt: skip
        else:
            advance((), dts, xs, bits, p_A, p_B + o_t, None, p_local, p_local, i_d, m_d, m_d, group_channels, s_m, N, T, p_starts is not None, USES_PTX)  # fmt: skip
    for n in range(N):
        A = tl.load(p_A + n * group_channels + i_d, mask=m_d, other=0.0)
        decay = tl.exp2(total * A)
        if p_starts is not None:
            decay = tl.where(all_bits != 0, 0.0, decay)
        tl.store(p_decay + n * group_channels + i_d, decay, mask=m_d)


@triton.jit(do_not_specialize=["segments", "segment_slots", "size", "s_out_b"])
def combine_kernel(
    p_local,
    p_decay,
    p_start,
    p_out,
    s_start_b,
    s_out_b,
    segments,
    segment_slots,
    size,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state (or its gradient) that every segment starts from, in the order in which the segments are passed.

    p_local, p_decay: (B, segments, size). p_start: (B, size) at a stride of s_start_b, what the first one starts from.
    p_out: (B, slots, size) at a stride of s_out_b; segment s goes to slot s * segment_slots. A decay of 0 selects.
    """
    i_b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < size
    state = tl.load(p_start + i_b * s_start_b + i, mask=m, other=0.0)
    for j in range(segments):
        s = (segments - 1 - j) if REVERSE else j
        o = (i_b * segments + s) * size + i
        tl.store(
            p_out + i_b * s_out_b + tl.cast(s * segment_slots, tl.int64) * size + i, state, mask=m
        )
        decay = tl.load(p_decay + o, mask=m, other=0.0)
        passed = tl.where(decay == 0.0, 0.0, decay * state)
        state = passed + tl.load(p_local + o, mask=m, other=0.0)
