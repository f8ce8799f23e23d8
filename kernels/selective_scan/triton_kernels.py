"""The Triton kernels of the selective scan; `triton` launches them.

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

__all__ = ["backward_kernel", "combine_kernel", "forward_kernel", "local_kernel", "reduction_asm"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1: one instruction and a product, where a division checks its range."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(x):
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
def _softplus_slope(x):
    return tl.where(x > SOFTPLUS_THRESHOLD, 1.0, _sigmoid(x))


@triton.jit
def _uniform(p_row, T: tl.constexpr, USES_PTX: tl.constexpr):
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
def _where(is_row, i_d, channels):
    """Mask of a block's channels, none of them where not `is_row`: the interpreter can't spread a bool over a vector."""
    return i_d < tl.where(is_row, channels, 0)


@triton.jit
def _row(p_rows, t: tl.constexpr, s_t, i_d, channels, count, ACC: tl.constexpr):
    """Row t of a chunk in the accumulator's type, zeros behind the last position."""
    return tl.load(p_rows + t * s_t + i_d, mask=_where(t < count, i_d, channels), other=0.0).to(ACC)


@triton.jit
def _chunk(
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
        us = us + (_row(p_u, t, s_u, i_d, channels, count, ACC),)
        raws = raws + (_row(p_delta, t, s_delta, i_d, channels, count, ACC),)
    dts, xs = (), ()
    for t in tl.static_range(T):
        raw = raws[t] + bias
        dt = _softplus(raw, TERMS) if SOFTPLUS else raw
        dt = tl.where(t < count, dt, 0.0)
        dts = dts + (dt,)
        xs = xs + (dt * us[t],)
    return dts, xs, us


@triton.jit
def _first_tokens(p_starts, count, T: tl.constexpr):
    """Bit t is set where position t of the chunk starts a document."""
    bits = 0
    for t in tl.static_range(T):
        is_start = tl.load(p_starts + t, mask=t < count, other=0).to(tl.int32)
        bits = bits | (is_start << t)
    return bits


@triton.jit
def _is_set(bits, t: tl.constexpr):
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
    bs = _uniform(p_B, T, USES_PTX)
    cs = ()
    if p_C is not None:
        cs = _uniform(p_C, T, USES_PTX)
    for n in tl.range(N, loop_unroll_factor=2):
        o = tl.minimum(n + 1, N - 1)
        next_A = tl.load(p_A + o * s_n + i_d, mask=m_d, other=0.0)
        next_h = tl.load(p_in + o * s_n + i_d, mask=m_d, other=0.0)
        next_bs = _uniform(p_B + o * s_m, T, USES_PTX)
        next_cs = ()
        if p_C is not None:
            next_cs = _uniform(p_C + o * s_m, T, USES_PTX)
        new_ys = ()
        for t in tl.static_range(T):
            if RESETS:
                h = tl.where(_is_set(bits, t), 0.0, h)
            h = tl.exp2(dts[t] * A) * h + xs[t] * bs[t]
            if p_C is not None:
                new_ys = new_ys + (ys[t] + h * cs[t],)
        tl.store(p_out + n * s_n + i_d, h, mask=m_out)
        A, h, bs, cs, ys = next_A, next_h, next_bs, next_cs, new_ys
    return ys


@triton.jit
def _advance(
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
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)
    i_segment = tl.program_id(1)
    i_b = (tl.program_id(2) // groups).to(tl.int64)
    i_g = tl.program_id(2) % groups
    m_d = i_d < group_channels
    channels = groups * group_channels
    o_g = i_g * group_channels
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
    bias = tl.zeros([BD], ACC)
    if p_bias is not None:
        bias = tl.load(p_bias + o_g + i_d, mask=m_d, other=0.0).to(ACC)
    skip = tl.zeros([BD], ACC)
    if p_D is not None:
        skip = tl.load(p_D + o_g + i_d, mask=m_d, other=0.0).to(ACC)
    first = i_segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    for k in range(first, last):
        o_t = tl.cast(k * T, tl.int64)
        count = length - k * T
        dts, xs, us = _chunk(p_u + o_t * s_u_t, s_u_t, p_delta + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
        ys = ()
        for t in tl.static_range(T):
            ys = ys + (skip * us[t],)
        bits = 0
        if p_starts is not None:
            bits = _first_tokens(p_starts + i_b * length + o_t, count, T)
        if KEEP:
            p_in = p_states + tl.cast(k, tl.int64) * s_slot
            p_next = p_in + s_slot
            # The first state of the next segment is already there, from the combination of the segments.
            m_next = _where((k + 1 < last) | (last == chunks), i_d, group_channels)
        else:
            p_in = p_states + i_segment.to(tl.int64) * s_slot
            p_next = p_in
            m_next = m_d
        ys = _advance(ys, dts, xs, bits, p_A, p_B + o_t, p_C + o_t, p_in, p_next, i_d, m_d, m_next, group_channels, s_m, N, T, p_starts is not None, USES_PTX)  # fmt: skip
        for t in tl.static_range(T):
            y = ys[t]
            if p_z is not None:
                z = _row(
                    p_z + i_b * s_z_b + o_g + o_t * s_z_t, t, s_z_t, i_d, group_channels, count, ACC
                )
                y *= z * _sigmoid(z)
            tl.store(
                p_out + o_t * channels + t * channels + i_d,
                y,
                mask=_where(t < count, i_d, group_channels),
            )


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
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)
    i_segment = tl.program_id(1)
    i_b = (tl.program_id(2) // groups).to(tl.int64)
    i_g = tl.program_id(2) % groups
    m_d = i_d < group_channels
    channels = groups * group_channels
    o_g = i_g * group_channels
    p_A += o_g * N
    p_B += (i_b * groups + i_g) * N * s_m
    o_slot = (i_b * segments + i_segment) * channels * N + o_g * N
    p_local += o_slot
    p_decay += o_slot
    bias = tl.zeros([BD], ACC)
    if p_bias is not None:
        bias = tl.load(p_bias + o_g + i_d, mask=m_d, other=0.0).to(ACC)
    first = i_segment * segment_chunks
    last = tl.minimum(first + segment_chunks, tl.cdiv(length, T))
    total = tl.zeros([BD], ACC)
    all_bits = 0
    for i in range(last - first):
        k = (last - 1 - i) if ADJOINT else (first + i)
        o_t = tl.cast(k * T, tl.int64)
        count = length - k * T
        dts, xs, _ = _chunk(p_u + i_b * s_u_b + o_g + o_t * s_u_t, s_u_t, p_delta + i_b * s_delta_b + o_g + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
        bits = 0
        if p_starts is not None:
            bits = _first_tokens(p_starts + i_b * length + o_t, count, T)
            all_bits = all_bits | bits
        for t in tl.static_range(T):
            total += dts[t]
        if ADJOINT:
            p_dout = p_out_grad + (i_b * length + o_t) * channels + o_g
            dys = _gate_rows(p_dout, channels, p_z, i_b * s_z_b + o_g + o_t * s_z_t, s_z_t, i_d, group_channels, count, T, ACC)  # fmt: skip
            _adjoint(dys, dts, bits, p_A, p_B + o_t, p_local, i_d, m_d, group_channels, s_m, N, T, p_starts is not None, USES_PTX)  # fmt: skip
        else:
            _advance((), dts, xs, bits, p_A, p_B + o_t, None, p_local, p_local, i_d, m_d, m_d, group_channels, s_m, N, T, p_starts is not None, USES_PTX)  # fmt: skip
    for n in range(N):
        A = tl.load(p_A + n * group_channels + i_d, mask=m_d, other=0.0)
        decay = tl.exp2(total * A)
        if p_starts is not None:
            decay = tl.where(all_bits != 0, 0.0, decay)
        tl.store(p_decay + n * group_channels + i_d, decay, mask=m_d)


@triton.jit
def _gate_rows(
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
        dy = _row(p_dout, t, s_dout, i_d, channels, count, ACC)
        if p_z is not None:
            z = _row(p_z + o_z, t, s_z, i_d, channels, count, ACC)
            dy *= z * _sigmoid(z)
        dys = dys + (dy,)
    return dys


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
        cs = _uniform(p_C + n * s_m, T, USES_PTX)
        for t in tl.static_range(T - 1, -1, -1):
            q = tl.exp2(dts[t] * A) * (cs[t] * dys[t] + q)
            if HAS_STARTS:
                q = tl.where(_is_set(bits, t), 0.0, q)
        tl.store(p_q + n * s_n + i_d, q, mask=m_d)


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
    bs = _uniform(p_B, T, USES_PTX)
    cs = _uniform(p_C, T, USES_PTX)
    for n in range(N):
        o = tl.minimum(n + 1, N - 1)
        next_A = tl.load(p_A + o * s_n + i_d, mask=m_d, other=0.0)
        next_h = tl.load(p_h + o * s_n + i_d, mask=m_d, other=0.0)
        next_bs = _uniform(p_B + o * s_m, T, USES_PTX)
        next_cs = _uniform(p_C + o * s_m, T, USES_PTX)
        # Needed on the way back only, and there by then.
        q = tl.load(p_q + n * s_n + i_d, mask=m_d, other=0.0)
        dA = tl.load(p_dA + n * s_n + i_d, mask=m_d, other=0.0)
        decays, decayed, dCs, new_ys = (), (), (), ()
        for t in tl.static_range(T):
            a = tl.exp2(dts[t] * A)
            # Kept, not found again as h - x B: that difference has no digits left where a is small.
            ah = a * h
            if RESETS:
                ah = tl.where(_is_set(bits, t), 0.0, ah)
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
                q = tl.where(_is_set(bits, t), 0.0, q)
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
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)
    i_segment = tl.program_id(1)
    i_b = (tl.program_id(2) // groups).to(tl.int64)
    i_g = tl.program_id(2) % groups
    m_d = i_d < group_channels
    channels = groups * group_channels
    o_g = i_g * group_channels
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
    bias, skip = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    if p_bias is not None:
        bias = tl.load(p_bias + o_g + i_d, mask=m_d, other=0.0).to(ACC)
    if p_D is not None:
        skip = tl.load(p_D + o_g + i_d, mask=m_d, other=0.0).to(ACC)
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
            dts, xs, _ = _chunk(p_u + o_t * s_u_t, s_u_t, p_delta + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
            bits = 0
            if HAS_STARTS:
                bits = _first_tokens(p_starts + i_b * length + o_t, count, T)
            p_after = p_scratch + j * group_channels * N
            _advance((), dts, xs, bits, p_A, p_B + o_t, None, p_before, p_after, i_d, m_d, m_d, group_channels, s_m, N, T, HAS_STARTS, USES_PTX)  # fmt: skip
            p_before = p_after
        for i_sub in range(SUB):
            j = SUB - 1 - i_sub
            if j == 0:
                p_h = p_kept
            else:
                p_h = p_scratch + (j - 1) * group_channels * N
            o_t = tl.cast((k * SUB + j) * T, tl.int64)
            count = length - (k * SUB + j) * T
            dts, xs, us = _chunk(p_u + o_t * s_u_t, s_u_t, p_delta + o_t * s_delta_t, s_delta_t, bias, i_d, group_channels, count, T, SOFTPLUS, TERMS, ACC)  # fmt: skip
            o_out = (i_b * length + o_t) * channels + o_g
            o_z = i_b * s_z_b + o_g + o_t * s_z_t
            dys = _gate_rows(
                p_dout + o_out, channels, p_z, o_z, s_z_t, i_d, group_channels, count, T, ACC
            )
            bits = 0
            if HAS_STARTS:
                bits = _first_tokens(p_starts + i_b * length + o_t, count, T)
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
                u = _row(p_u + o_t * s_u_t, t, s_u_t, i_d, group_channels, count, ACC)
                raw = (
                    _row(p_delta + o_t * s_delta_t, t, s_delta_t, i_d, group_channels, count, ACC)
                    + bias
                )
                m = _where(t < count, i_d, group_channels)
                o = o_out + t * channels + i_d
                tl.store(p_du + o, skip * dys[t] + dts[t] * rs[t], mask=m)
                draw = es[t] * LN2 + u * rs[t]
                if SOFTPLUS:
                    draw *= _softplus_slope(raw)
                draw = tl.where(t < count, draw, 0.0)
                tl.store(p_ddelta + o, draw, mask=m)
                dD += dys[t] * u
                dbias += draw
                if NEEDS_Y:
                    z = _row(p_z + o_z, t, s_z_t, i_d, group_channels, count, ACC)
                    dout = _row(p_dout + o_out, t, channels, i_d, group_channels, count, ACC)
                    s = _sigmoid(z)
                    tl.store(p_dz + o, dout * ys[t] * s * (1.0 + z * (1.0 - s)), mask=m)
    o_part = i_part * channels + o_g + i_d
    if p_D is not None:
        tl.store(p_dD + o_part, dD, mask=m_d)
    if p_bias is not None:
        tl.store(p_dbias + o_part, dbias, mask=m_d)
