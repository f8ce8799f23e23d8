"""Triton kernels of `patch_boundaries`: two launches, no atomics, every block of positions in parallel.

The first kernel summarises each block as far as it can without knowing what came before: up to its first start made by
the rule, a block only holds cuts of a patch that is too long, and those have a closed form once the start of that
patch is known. The second kernel has each program scan the summaries of the blocks before it (a few hundred numbers),
which costs less than a third launch, and then writes its block.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .patch_boundaries_plain import Numbers

__all__ = ["launch_patch_boundaries"]

BLOCK = 1024
LONG_BLOCK = 4096
LONG = 1 << 20
"""Positions from which blocks are long, so that their summaries stay few."""


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _divides(divisor, number):
    """Of numbers from 0 on: a signed remainder takes more instructions, and registers for its signs."""
    # A divisor of 1 arrives as a constant, which has no methods.
    return tl.cast(number, tl.uint32) % tl.cast(divisor, tl.uint32) == 0


@triton.jit
def _is_space_like(byte):
    is_digit = (byte >= 48) & (byte <= 57)
    is_letter = ((byte >= 65) & (byte <= 90)) | ((byte >= 97) & (byte <= 122))
    is_continuation = (byte >= 128) & (byte <= 191)
    return ~(is_digit | is_letter | is_continuation)


@triton.jit
def _opens_next(
    p_position,
    p_entropy,
    p_tokens,
    o_t,
    m_t,
    threshold,
    rise,
    stride,
    forced_starts,
    byte_offset,
    SCHEME: tl.constexpr,
):
    """Whether the byte after each position starts a patch by the rule; false where the position is masked."""
    position = tl.minimum(tl.load(p_position + o_t, mask=m_t, other=0).to(tl.int32), o_t)
    m_before = m_t & (o_t >= 1)
    if SCHEME == "stride":
        opens = (position + 2 - forced_starts) % stride == 0
    elif SCHEME == "space":
        byte = tl.load(p_tokens + o_t, mask=m_t, other=0).to(tl.int32) - byte_offset
        before = tl.load(p_tokens + o_t - 1, mask=m_before, other=0).to(tl.int32) - byte_offset
        follows_space = (position >= 1) & _is_space_like(before)
        opens = (byte < 0) | (_is_space_like(byte) & ~follows_space)
    else:
        b_entropy = tl.load(p_entropy + o_t, mask=m_t, other=0.0).to(tl.float32)
        opens = b_entropy > threshold
        if SCHEME != "entropy":
            b_before = tl.load(p_entropy + o_t - 1, mask=m_before, other=0.0).to(tl.float32)
            has_risen = (position >= 1) & (b_entropy - b_before > rise)
            if SCHEME == "rise":
                opens = has_risen
            else:
                opens = opens & has_risen
    return m_t & (opens | (position + 1 < forced_starts))


@triton.jit
def _is_first(p_position, o_t, m_t):
    position = tl.load(p_position + o_t, mask=m_t, other=1).to(tl.int32)
    return m_t & ((position == 0) | (o_t == 0))


@triton.jit
def summarise_kernel(
    p_position,
    p_entropy,
    p_tokens,
    p_summary,
    T,
    BLOCKS,
    threshold,
    rise,
    stride,
    max_length,
    forced_starts,
    byte_offset,
    SCHEME: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Four numbers a block: first and last start by the rule, starts from the first of them on, those of them up to
    the last start of a document."""
    i_block = tl.program_id(0)
    o_t = i_block * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    is_first = _is_first(p_position, o_t, m_t)
    by_rule = is_first | _opens_next(
        p_position, p_entropy, p_tokens, o_t - 1, m_t & (o_t >= 1),
        threshold, rise, stride, forced_starts, byte_offset, SCHEME,
    )  # fmt: skip
    is_start = by_rule
    if HAS_LIMIT:
        rule_start = tl.associative_scan(tl.where(by_rule, o_t, -1), 0, _later)
        is_cut = _divides(max_length, o_t - rule_start)
        is_start = by_rule | (m_t & (rule_start >= 0) & is_cut)
    document = tl.max(tl.where(is_first, o_t, -1), 0)
    tl.store(p_summary + i_block, tl.min(tl.where(by_rule, o_t, T), 0))
    tl.store(p_summary + BLOCKS + i_block, tl.max(tl.where(by_rule, o_t, -1), 0))
    tl.store(p_summary + 2 * BLOCKS + i_block, tl.sum(is_start.to(tl.int32), 0))
    in_documents = is_start & (o_t <= document)
    tl.store(p_summary + 3 * BLOCKS + i_block, tl.sum(in_documents.to(tl.int32), 0))


@triton.jit
def boundaries_kernel(
    p_position,
    p_entropy,
    p_tokens,
    p_summary,
    p_is_start,
    p_patch,
    p_decoder,
    p_starts,
    p_ends,
    p_count,
    p_overflow,
    T,
    P,
    BLOCKS,
    threshold,
    rise,
    stride,
    max_length,
    forced_starts,
    byte_offset,
    SCHEME: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    i_block = tl.program_id(0)

    # What comes in from the blocks before this one.
    o_b = tl.arange(0, SUMMARIES)
    m_b = o_b < i_block
    b_first = tl.load(p_summary + o_b, mask=m_b, other=0)
    b_last = tl.load(p_summary + BLOCKS + o_b, mask=m_b, other=-1)
    b_made = tl.load(p_summary + 2 * BLOCKS + o_b, mask=m_b, other=0)
    b_document = tl.load(p_summary + 3 * BLOCKS + o_b, mask=m_b, other=0)
    b_head = tl.zeros([SUMMARIES], tl.int32)
    if HAS_LIMIT:
        b_open = tl.load(p_summary + BLOCKS + o_b - 1, mask=m_b & (o_b >= 1), other=-1)
        b_open = tl.associative_scan(b_open, 0, _later)
        # Cuts of the open patch before the block's first start by the rule; all differences are >= 0.
        b_begin = o_b * BLOCK
        b_end = tl.minimum(b_first, b_begin + BLOCK)
        b_cuts = (b_end - 1 - b_open) // max_length - (b_begin - 1 - b_open) // max_length
        b_head = tl.where(m_b & (o_b >= 1), b_cuts, 0)
    b_made += b_head
    b_before = tl.cumsum(b_made, 0) - b_made
    made_before = tl.sum(b_made, 0)
    rule_before = tl.max(b_last, 0)
    has_document = m_b & (b_document > 0)
    first_before = tl.max(tl.where(has_document, b_before + b_head + b_document - 1, -1), 0)

    o_t = i_block * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    is_first = _is_first(p_position, o_t, m_t)
    by_rule = is_first | _opens_next(
        p_position, p_entropy, p_tokens, o_t - 1, m_t & (o_t >= 1),
        threshold, rise, stride, forced_starts, byte_offset, SCHEME,
    )  # fmt: skip
    will_start = _opens_next(
        p_position, p_entropy, p_tokens, o_t, m_t,
        threshold, rise, stride, forced_starts, byte_offset, SCHEME,
    )  # fmt: skip
    is_start = by_rule
    if HAS_LIMIT:
        rule_start = tl.associative_scan(tl.where(by_rule, o_t, -1), 0, _later)
        rule_start = tl.maximum(rule_start, rule_before)
        is_start = by_rule | (m_t & _divides(max_length, o_t - rule_start))
        will_start = will_start | (m_t & _divides(max_length, o_t + 1 - rule_start))
    ordinal = made_before + tl.cumsum(is_start.to(tl.int32), 0) - 1
    first_patch = tl.associative_scan(tl.where(is_first, ordinal, -1), 0, _later)
    first_patch = tl.maximum(first_patch, first_before)

    has_room = m_t & (first_patch < P)
    patch = tl.minimum(ordinal, P - 1)
    is_last = (o_t + 1 == T) | _is_first(p_position, o_t + 1, o_t + 1 < T)
    is_start = is_start & (ordinal < P)
    splits = will_start & (ordinal + 1 < P)
    reads_own = splits | (will_start & is_last)
    before = tl.where(patch > first_patch, patch - 1, -1)
    decoder = tl.where(has_room, tl.where(reads_own, patch, before), -1)
    tl.store(p_is_start + o_t, is_start, mask=m_t)
    tl.store(p_patch + o_t, tl.where(has_room, patch, P), mask=m_t)
    tl.store(p_decoder + o_t, decoder, mask=m_t)
    tl.store(p_starts + patch, o_t, mask=m_t & is_start)
    tl.store(p_ends + patch, o_t + 1, mask=has_room & (is_last | splits))
    made = ordinal + 1
    o_zero = tl.zeros([BLOCK], tl.int32)
    tl.store(p_count + o_zero, tl.minimum(made, P), mask=o_t == T - 1)
    tl.store(p_overflow + o_zero, tl.maximum(made - P, 0), mask=o_t == T - 1)


def launch_patch_boundaries(
    position_ids: Tensor,
    entropy: Tensor | None,
    tokens: Tensor | None,
    scheme: str,
    numbers: Numbers,
    outputs: tuple[Tensor, ...],
) -> None:
    threshold, rise, stride, max_length, forced_starts, byte_offset = numbers
    total, max_patches = position_ids.shape[0], outputs[3].shape[0]
    block = LONG_BLOCK if total > LONG else BLOCK
    blocks = triton.cdiv(total, block)
    summary = torch.empty(4 * blocks, dtype=torch.int32, device=position_ids.device)
    # Absent tensors are never read; a pointer has to be given all the same.
    sources = [
        position_ids if tensor is None else tensor.contiguous()
        for tensor in (position_ids, entropy, tokens)
    ]
    rule = (threshold, rise, max(1, stride), max(1, max_length), forced_starts, byte_offset)
    constants = {"SCHEME": scheme, "HAS_LIMIT": max_length > 0, "BLOCK": block}
    with torch.cuda.device_of(position_ids):
        summarise_kernel[(blocks,)](*sources, summary, total, blocks, *rule, **constants)
        boundaries_kernel[(blocks,)](
            *sources,
            summary,
            *outputs,
            total,
            max_patches,
            blocks,
            *rule,
            **constants,
            SUMMARIES=triton.next_power_of_2(blocks),
        )
