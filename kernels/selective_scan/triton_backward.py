"""All gradients of a scan in one pass over its chunks, last one first. See `triton_parts`."""

# A language of its own: tuples grow, a pointer moves, None is a type; nothing unpacks into a tuple.
# ruff: noqa: RUF005
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import (
    LN2,
    advance,
    chunk,
    first_tokens,
    gate_rows,
    is_set,
    of_channels,
    place,
    row,
    sigmoid,
    softplus_slope,
    uniform,
    where_row,
)

__all__ = ["backward_kernel", "reduction_asm"]


def reduction_asm(count: int, pack: int) -> tuple[str, str]:
    """PTX that sums `count` values over the lanes of a warp and `pack` registers a lane: (code, constraints).

    Halves of the values are exchanged for halves of the lanes until a lane has one value: count - 1 shuffles, where sums
    one by one take 5 * count. Lane l ends with the sum of value l // (32 // count), in every one of its registers.
    """
    values = [[f"${pack + i * pack + j}" for j in range(pack)] for i in range(count)]
    code = [f".reg .f32 r<{count}>, keep, send, got;", ".reg .pred high;", ".reg .b32 lane, bit;"]
    code.append("mov.u32 lane, %laneid;")
    for i, parts in enumerate(values):
        code.append(f"mov.f32 r{i}, {parts[0]};")
        code += [f"add.f32 r{i}, r{i}, {part};" for part in parts[1:]]
    left, offset = count, 16
    while left > 1:
        left //= 2
        code += [f"and.b32 bit, lane, {offset};", "setp.ne.b32 high, bit, 0;"]
        for i in range(left):
            code += [
                f"selp.f32 keep, r{i + left}, r{i}, high;",
                f"selp.f32 send, r{i}, r{i + left}, high;",
                f"shfl.sync.bfly.b32 got, send, {offset}, 31, -1;",
                f"add.f32 r{i}, keep, got;",
            ]
        offset //= 2
    while offset:
        code += [f"shfl.sync.bfly.b32 got, r0, {offset}, 31, -1;", "add.f32 r0, r0, got;"]
        offset //= 2
    code += [f"mov.f32 ${j}, r0;" for j in range(pack)]
    return "{\n" + "\n".join(code) + "\n}", ",".join(["=f"] * pack + ["f"] * (count * pack))


@triton.jit
def _store_sums(
    values,
    p_sums,
    o_lane,
    m_lane,
    T: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PACK: tl.constexpr,
):
    """Sums over the channels of T vectors to p_sums, one a position."""
    if ASM is None:
        for t in tl.static_range(T):
            tl.store(p_sums + t, tl.sum(values[t]))
    else:
        # Volatile: the shuffles must stay where the whole warp is.
        sums = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, values, dtype=tl.float32, is_pure=False, pack=PACK
        )
        tl.store(p_sums + o_lane, sums, mask=m_lane)


@triton.jit
def _gradients(
    rs,
    es,
    ys,
    dts,
    xs,
    dys,
    bits,
    p_A,
    p_B,
    p_C,
    p_h,
    p_q,
    p_dA,
    p_sums,
    s_which,
    o_lane,
    m_lane,
    i_d,
    m_d,
    s_n,
    s_m,
    N: tl.constexpr,
    T: tl.constexpr,
    RESETS: tl.constexpr,
    NEEDS_Y: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PACK: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    """Every state forward over T positions from p_h, then its gradient back, in place in p_q.

    Adds to the rows of r = sum_n g B, of e = sum_n g (a h_before) A and of y, and to p_dA.
    """
    A = tl.load(p_A + i_d, mask=m_d, other=0.0)
    h = tl.load(p_h + i_d, mask=m_d, other=0.0)
    bs = uniform(p_B, T, USES_PTX)
    cs = uniform(p_C, T, USES_PTX)
    for n in range(N):
        o = tl.minimum(n + 1, N - 1)
        next_A = tl.load(p_A + o * s_n + i_d, mask=m_d, other=0.0)
        next_h = tl.load(p_h + o * s_n + i_d, mask=m_d, other=0.0)
        next_bs = uniform(p_B + o * s_m, T, USES_PTX)
        next_cs = uniform(p_C + o * s_m, T, USES_PTX)
        # Needed on the way back only, and there by then.
        q = tl.load(p_q + n * s_n + i_d, mask=m_d, other=0.0)
        dA = tl.load(p_dA + n * s_n + i_d, mask=m_d, other=0.0)
        decays, decayed, dCs, new_ys = (), (), (), ()
        for t in tl.static_range(T):
            a = tl.exp2(dts[t] * A)
            # Kept, not found again as h - x B: that difference has no digits left where a is small.
            ah = a * h
            if RESETS:
                ah = tl.where(is_set(bits, t), 0.0, ah)
            h = ah + xs[t] * bs[t]
            decays, decayed, dCs = decays + (a,), decayed + (ah,), dCs + (dys[t] * h,)
            if NEEDS_Y:
                new_ys = new_ys + (ys[t] + h * cs[t],)
        # Here, not beside dB: the registers are free again for the way back.
        _store_sums(dCs, p_sums + s_which + n * s_m, o_lane, m_lane, T, ASM, CONSTRAINTS, PACK)
        new_rs, new_es, dBs = (), (), ()
        for t in tl.static_range(T - 1, -1, -1):
            g = cs[t] * dys[t] + q
            q = decays[t] * g
            if RESETS:
                q = tl.where(is_set(bits, t), 0.0, q)
            e = g * decayed[t]
            new_rs = (rs[t] + g * bs[t],) + new_rs
            new_es = (es[t] + e * A,) + new_es
            dA += e * dts[t]
            dBs = (g * xs[t],) + dBs
        tl.store(p_q + n * s_n + i_d, q, mask=m_d)
        tl.store(p_dA + n * s_n + i_d, dA, mask=m_d)
        _store_sums(dBs, p_sums + n * s_m, o_lane, m_lane, T, ASM, CONSTRAINTS, PACK)
        rs, es, ys = new_rs, new_es, new_ys
        A, h, bs, cs = next_A, next_h, next_bs, next_cs
    return rs, es, ys


@triton.jit(do_not_specialize=["length", "batch", "segment_chunks", "segments"])
def backward_kernel(
    p_u,
    p_delta,
    p_z,
    p_dout,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_starts,
    p_states,
    p_scratch,
    p_q,
    p_du,
    p_ddelta,
    p_dz,
    p_dA,
    p_dD,
    p_dbias,
    p_sums,
    s_u_b,
    s_u_t,
    s_delta_b,
    s_delta_t,
    s_z_b,
    s_z_t,
    s_m,
    length,
    batch,
    group_channels,
    groups,
    segment_chunks,
    segments,
    N: tl.constexpr,
    T: tl.constexpr,
    SUB: tl.constexpr,
    BD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TERMS: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    USES_PTX: tl.constexpr,
):
    """All gradients, from the state kept every SUB * T positions.

    p_q (B, segments, G, N, D/G): the gradient of the state behind each segment, at the end that of the one before.
    p_dA (like p_q, zeros), p_dD and p_dbias (B, segments, D): one sum a program. p_sums (G, blocks, 2, B, N, padded L):
    dB and dC of one block of channels. p_scratch (B, segments, G, SUB - 1, N, D/G): states inside the current chunk.
    """
    ACC: tl.constexpr = p_A.dtype.element_ty
    PACK: tl.constexpr = BD // 32
    HAS_STARTS: tl.constexpr = p_starts is not None
    NEEDS_Y: tl.constexpr = p_z is not None
    i_b, i_g, o_g, i_d, m_d = place(group_channels, groups, BD)
    i_segment = tl.program_id(1)
    channels = groups * group_channels
    s_slot = channels * N
    p_u += i_b * s_u_b + o_g
    p_delta += i_b * s_delta_b + o_g
    p_A += o_g * N
    p_B += (i_b * groups + i_g) * N * s_m
    p_C += (i_b * groups + i_g) * N * s_m
    i_part = i_b * segments + i_segment
    p_q += i_part * s_slot + o_g * N
    p_dA += i_part * s_slot + o_g * N
    p_scratch += (i_part * s_slot + o_g * N) * (SUB - 1)
    chunks = tl.cdiv(length, SUB * T)
    p_states += i_b * (chunks + 1) * s_slot + o_g * N
    s_which = batch.to(tl.int64) * N * s_m
    i_block = (i_g * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    p_sums += i_block * 2 * s_which + i_b * N * s_m
    o_lane, m_lane = i_d, m_d
    if ASM is not None:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [i_d], dtype=tl.int32, is_pure=True, pack=1
        )
        EACH: tl.constexpr = 32 // T
        o_lane = lane // EACH
        # All registers of a lane hold its sum; the first one writes it.
        is_first = lane * 0 + 1
        if PACK == 2:
            is_first = tl.inline_asm_elementwise(
                "mov.u32 $0, 1; mov.u32 $1, 0;",
                "=r,=r,r,r",
                [i_d],
                dtype=tl.int32,
                is_pure=True,
                pack=2,
            )
        if PACK == 4:
            is_first = tl.inline_asm_elementwise(
                "mov.u32 $0, 1; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;",
                "=r,=r,=r,=r,r,r,r,r",
                [i_d],
                dtype=tl.int32,
                is_pure=True,
                pack=4,
            )
        m_lane = (lane % EACH == 0) & (is_first != 0)
    bias = of_channels(p_bias, o_g, i_d, m_d, BD, ACC)
    skip = of_channels(p_D, o_g, i_d, m_d, BD, ACC)
    dD, dbias = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    first = i_segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    for i in range(last - first):
        k = last - 1 - i
        p_kept = p_states + tl.cast(k, tl.int64) * s_slot
        p_before = p_kept
        for j in range(SUB - 1):
            o_t = tl.cast((k * SUB + j) * T, tl.int64)
            count = length - (k * SUB + j) * T
            dts, xs, _ = chunk(p_u + o_t * s_u_t, s_u_t, p_delta + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
            bits = 0
            if HAS_STARTS:
                bits = first_tokens(p_starts + i_b * length + o_t, count, T)
            p_after = p_scratch + j * group_channels * N
            advance((), dts, xs, bits, p_A, p_B + o_t, None, p_before, p_after, i_d, m_d, m_d, group_channels, s_m, N, T, HAS_STARTS, USES_PTX)  # fmt: skip
            p_before = p_after
        for i_sub in range(SUB):
            j = SUB - 1 - i_sub
            if j == 0:
                p_h = p_kept
            else:
                p_h = p_scratch + (j - 1) * group_channels * N
            o_t = tl.cast((k * SUB + j) * T, tl.int64)
            count = length - (k * SUB + j) * T
            dts, xs, us = chunk(p_u + o_t * s_u_t, s_u_t, p_delta + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
            o_out = (i_b * length + o_t) * channels + o_g
            o_z = i_b * s_z_b + o_g + o_t * s_z_t
            dys = gate_rows(
                p_dout + o_out, channels, p_z, o_z, s_z_t, i_d, group_channels, count, T, ACC
            )
            bits = 0
            if HAS_STARTS:
                bits = first_tokens(p_starts + i_b * length + o_t, count, T)
            rs, es, ys = (), (), ()
            for t in tl.static_range(T):
                rs, es = rs + (tl.zeros([BD], ACC),), es + (tl.zeros([BD], ACC),)
                if NEEDS_Y:
                    ys = ys + (skip * us[t],)
            if HAS_STARTS:
                if bits != 0:
                    rs, es, ys = _gradients(rs, es, ys, dts, xs, dys, bits, p_A, p_B + o_t, p_C + o_t, p_h, p_q, p_dA, p_sums + o_t, s_which, o_lane, m_lane, i_d, m_d, group_channels, s_m, N, T, True, NEEDS_Y, ASM, CONSTRAINTS, PACK, USES_PTX)  # fmt: skip
                else:
                    rs, es, ys = _gradients(rs, es, ys, dts, xs, dys, bits, p_A, p_B + o_t, p_C + o_t, p_h, p_q, p_dA, p_sums + o_t, s_which, o_lane, m_lane, i_d, m_d, group_channels, s_m, N, T, False, NEEDS_Y, ASM, CONSTRAINTS, PACK, USES_PTX)  # fmt: skip
            else:
                rs, es, ys = _gradients(rs, es, ys, dts, xs, dys, bits, p_A, p_B + o_t, p_C + o_t, p_h, p_q, p_dA, p_sums + o_t, s_which, o_lane, m_lane, i_d, m_d, group_channels, s_m, N, T, False, NEEDS_Y, ASM, CONSTRAINTS, PACK, USES_PTX)  # fmt: skip
            for t in tl.static_range(T):
                u = row(p_u + o_t * s_u_t, t, s_u_t, i_d, group_channels, count, ACC)
                raw = (
                    row(p_delta + o_t * s_delta_t, t, s_delta_t, i_d, group_channels, count, ACC)
                    + bias
                )
                m = where_row(t < count, i_d, group_channels)
                o = o_out + t * channels + i_d
                tl.store(p_du + o, skip * dys[t] + dts[t] * rs[t], mask=m)
                draw = es[t] * LN2 + u * rs[t]
                if SOFTPLUS:
                    draw *= softplus_slope(raw)
                draw = tl.where(t < count, draw, 0.0)
                tl.store(p_ddelta + o, draw, mask=m)
                dD += dys[t] * u
                dbias += draw
                if NEEDS_Y:
                    z = row(p_z + o_z, t, s_z_t, i_d, group_channels, count, ACC)
                    dout = row(p_dout + o_out, t, channels, i_d, group_channels, count, ACC)
                    s = sigmoid(z)
                    tl.store(p_dz + o, dout * ys[t] * s * (1.0 + z * (1.0 - s)), mask=m)
    o_part = i_part * channels + o_g + i_d
    if p_D is not None:
        tl.store(p_dD + o_part, dD, mask=m_d)
    if p_bias is not None:
        tl.store(p_dbias + o_part, dbias, mask=m_d)
