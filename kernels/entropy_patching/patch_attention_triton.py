"""Triton kernels of the cross-attentions: a patch's K vectors stay in registers while its bytes stream by.

Every byte belongs to one patch, so one program per (patch, block of heads) writes all gradients of both sides, reads
each tensor once and needs no atomics. A patch is walked byte by byte: a single very long one is slow, and the limit on
patch lengths is there for that. The forward of the decoder has no sums over bytes and runs by blocks of bytes.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..faces import wide_dtype

__all__ = ["launch_decoder", "launch_decoder_backward", "launch_encoder", "launch_encoder_backward"]

TILE = 2048
"""Elements of a patch's vectors in one program: 16 a thread for each of the up to four such tiles."""
BYTES = 64
BYTES_TILE = 4096
"""Most bytes of a program of the decoder's forward, and most elements; more spill at 128 channels."""


def bytes_tile(q: Tensor) -> dict[str, int]:
    """Constants of the decoder's forward."""
    d = triton.next_power_of_2(q.shape[2])
    room = BYTES_TILE // (4 if q.dtype == torch.float64 else 1)
    return {"HEAD": q.shape[2], "BYTES": min(BYTES, max(16, room // d)), "D": d}


@triton.jit
def _inverse_root(HEAD: tl.constexpr, WIDE: tl.constexpr):
    """1 / sqrt(hd) in the wide type; a float argument would be fp32."""
    return 1.0 / tl.sqrt(tl.full([1], HEAD, WIDE))


@triton.jit
def _load(pointers, mask, WIDE: tl.constexpr):
    return tl.load(pointers, mask=mask, other=0.0).to(WIDE)


@triton.jit
def encoder_kernel(
    p_q, p_k, p_v, p_start, p_length, p_out, p_lse, H,
    HEAD: tl.constexpr, VECTORS: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_patch = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, C), tl.arange(0, D)
    o_h = tl.program_id(1) * G + tl.arange(0, G)
    o_vector = (i_patch * VECTORS + o_c)[:, None] * H + o_h[None, :]
    m_vector = (o_c < VECTORS)[:, None] & (o_h < H)[None, :]
    o_tile = o_vector[:, :, None] * HEAD + o_d[None, None, :]
    m_tile = m_vector[:, :, None] & (o_d < HEAD)[None, None, :]
    m_byte = (o_h < H)[:, None] & (o_d < HEAD)[None, :]
    start, length = tl.load(p_start + i_patch).to(tl.int64), tl.load(p_length + i_patch)
    o_byte = (start * H + o_h)[:, None] * HEAD + o_d[None, :]
    scale = _inverse_root(HEAD, WIDE)

    b_q = _load(p_q + o_tile, m_tile, WIDE)
    peak = tl.full([C, G], float("-inf"), WIDE)
    total = tl.zeros([C, G], WIDE)
    b_out = tl.zeros([C, G, D], WIDE)
    for _ in range(0, length):
        b_k = _load(p_k + o_byte, m_byte, WIDE)
        b_v = _load(p_v + o_byte, m_byte, WIDE)
        b_s = tl.sum(b_q * b_k[None, :, :], 2) * scale
        new_peak = tl.maximum(peak, b_s)
        keep = tl.exp(peak - new_peak)
        weight = tl.exp(b_s - new_peak)
        total = total * keep + weight
        b_out = b_out * keep[:, :, None] + weight[:, :, None] * b_v[None, :, :]
        peak = new_peak
        o_byte += H * HEAD
    is_empty = total == 0
    total = tl.where(is_empty, 1.0, total)
    b_out = b_out / total[:, :, None]
    b_lse = tl.where(is_empty, 0.0, peak + tl.log(total))
    tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + o_vector, b_lse, mask=m_vector)


@triton.jit
def encoder_backward_kernel(
    p_g, p_q, p_k, p_v, p_out, p_lse, p_start, p_length, p_dq, p_dk, p_dv, H,
    HEAD: tl.constexpr, VECTORS: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_patch = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, C), tl.arange(0, D)
    o_h = tl.program_id(1) * G + tl.arange(0, G)
    o_vector = (i_patch * VECTORS + o_c)[:, None] * H + o_h[None, :]
    m_vector = (o_c < VECTORS)[:, None] & (o_h < H)[None, :]
    o_tile = o_vector[:, :, None] * HEAD + o_d[None, None, :]
    m_tile = m_vector[:, :, None] & (o_d < HEAD)[None, None, :]
    m_byte = (o_h < H)[:, None] & (o_d < HEAD)[None, :]
    start, length = tl.load(p_start + i_patch).to(tl.int64), tl.load(p_length + i_patch)
    o_byte = (start * H + o_h)[:, None] * HEAD + o_d[None, :]
    scale = _inverse_root(HEAD, WIDE)

    b_q = _load(p_q + o_tile, m_tile, WIDE)
    b_g = _load(p_g + o_tile, m_tile, WIDE)
    b_lse = _load(p_lse + o_vector, m_vector, WIDE)
    delta = tl.sum(b_g * _load(p_out + o_tile, m_tile, WIDE), 2)
    b_dq = tl.zeros([C, G, D], WIDE)
    for _ in range(0, length):
        b_k = _load(p_k + o_byte, m_byte, WIDE)
        b_v = _load(p_v + o_byte, m_byte, WIDE)
        b_p = tl.exp(tl.sum(b_q * b_k[None, :, :], 2) * scale - b_lse)
        b_ds = b_p * (tl.sum(b_g * b_v[None, :, :], 2) - delta) * scale
        b_dk = tl.sum(b_ds[:, :, None] * b_q, 0)
        b_dv = tl.sum(b_p[:, :, None] * b_g, 0)
        b_dq += b_ds[:, :, None] * b_k[None, :, :]
        tl.store(p_dk + o_byte, b_dk.to(p_dk.dtype.element_ty), mask=m_byte)
        tl.store(p_dv + o_byte, b_dv.to(p_dv.dtype.element_ty), mask=m_byte)
        o_byte += H * HEAD
    tl.store(p_dq + o_tile, b_dq.to(p_dq.dtype.element_ty), mask=m_tile)


@triton.jit
def decoder_kernel(
    p_q, p_k, p_v, p_patch, p_out, p_lse, T, P, H,
    HEAD: tl.constexpr, VECTORS: tl.constexpr,
    BYTES: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    i_h = tl.program_id(1)
    o_d = tl.arange(0, D)
    m_t, m_d = o_t < T, o_d < HEAD
    patch = tl.load(p_patch + o_t, mask=m_t, other=-1).to(tl.int64)
    reads = m_t & (patch >= 0) & (patch < P)
    o_byte = (o_t * H + i_h)[:, None] * HEAD + o_d[None, :]
    m_read = reads[:, None] & m_d[None, :]
    scale = _inverse_root(HEAD, WIDE)

    b_q = _load(p_q + o_byte, m_read, WIDE)
    peak = tl.full([BYTES], float("-inf"), WIDE)
    total = tl.zeros([BYTES], WIDE)
    b_out = tl.zeros([BYTES, D], WIDE)
    for i_c in tl.static_range(VECTORS):
        o_vector = ((patch * VECTORS + i_c) * H + i_h)[:, None] * HEAD + o_d[None, :]
        b_k = _load(p_k + o_vector, m_read, WIDE)
        b_v = _load(p_v + o_vector, m_read, WIDE)
        b_s = tl.sum(b_q * b_k, 1) * scale
        new_peak = tl.maximum(peak, b_s)
        keep = tl.exp(peak - new_peak)
        weight = tl.exp(b_s - new_peak)
        total = total * keep + weight
        b_out = b_out * keep[:, None] + weight[:, None] * b_v
        peak = new_peak
    # A byte that reads nothing saw vectors of zeros: its result is 0 already.
    b_out = b_out / total[:, None]
    b_lse = tl.where(reads, peak + tl.log(total), 0.0)
    m_out = m_t[:, None] & m_d[None, :]
    tl.store(p_out + o_byte, b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_t * H + i_h, b_lse, mask=m_t)


@triton.jit
def decoder_backward_kernel(
    p_g, p_q, p_k, p_v, p_lse, p_patch, p_first, p_end, p_dq, p_dk, p_dv, H,
    HEAD: tl.constexpr, VECTORS: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_patch = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, C), tl.arange(0, D)
    o_h = tl.program_id(1) * G + tl.arange(0, G)
    o_vector = (i_patch * VECTORS + o_c)[:, None] * H + o_h[None, :]
    m_vector = (o_c < VECTORS)[:, None] & (o_h < H)[None, :]
    o_tile = o_vector[:, :, None] * HEAD + o_d[None, None, :]
    m_tile = m_vector[:, :, None] & (o_d < HEAD)[None, None, :]
    m_byte = (o_h < H)[:, None] & (o_d < HEAD)[None, :]
    first, end = tl.load(p_first + i_patch), tl.load(p_end + i_patch)
    o_head = first.to(tl.int64) * H + o_h
    scale = _inverse_root(HEAD, WIDE)

    b_k = _load(p_k + o_tile, m_tile, WIDE)
    b_v = _load(p_v + o_tile, m_tile, WIDE)
    b_dk = tl.zeros([C, G, D], WIDE)
    b_dv = tl.zeros([C, G, D], WIDE)
    for i_t in range(first, end):
        # A byte of the range that reads nothing counts as zeros, NaN or not, and its gradient is 0.
        heads = tl.where(tl.load(p_patch + i_t) == i_patch, H, 0)
        m_head = o_h < heads
        m_own = m_head[:, None] & (o_d < HEAD)[None, :]
        o_byte = o_head[:, None] * HEAD + o_d[None, :]
        b_q = _load(p_q + o_byte, m_own, WIDE)
        b_g = _load(p_g + o_byte, m_own, WIDE)
        b_lse = _load(p_lse + o_head, m_head, WIDE)
        b_p = tl.exp(tl.sum(b_q[None, :, :] * b_k, 2) * scale - b_lse[None, :])
        b_p = tl.where(m_vector, b_p, 0.0)
        b_dp = tl.sum(b_g[None, :, :] * b_v, 2)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 0)[None, :]) * scale
        b_dk += b_ds[:, :, None] * b_q[None, :, :]
        b_dv += b_p[:, :, None] * b_g[None, :, :]
        b_dq = tl.where(m_own, tl.sum(b_ds[:, :, None] * b_k, 0), 0.0)
        tl.store(p_dq + o_byte, b_dq.to(p_dq.dtype.element_ty), mask=m_byte)
        o_head += H
    tl.store(p_dk + o_tile, b_dk.to(p_dk.dtype.element_ty), mask=m_tile)
    tl.store(p_dv + o_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)


def _wide(tensor: Tensor) -> Any:
    return tl.float64 if wide_dtype(tensor) == torch.float64 else tl.float32


def patch_tiles(vectors: int, heads: int, channels: int) -> tuple[int, dict[str, int]]:
    """Blocks of heads, and the constants of the kernels that hold a patch's vectors."""
    c, d = triton.next_power_of_2(vectors), triton.next_power_of_2(channels)
    group = max(1, min(triton.next_power_of_2(heads), TILE // (c * d)))
    constants = {"HEAD": channels, "VECTORS": vectors, "C": c, "G": group, "D": d}
    return triton.cdiv(heads, group), constants


def launch_encoder(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor
) -> None:
    patches = starts.shape[0]
    blocks, constants = patch_tiles(q.shape[0] // patches, q.shape[1], q.shape[2])
    with torch.cuda.device_of(q):
        encoder_kernel[(patches, blocks)](
            q, k, v, starts, lengths, out, lse, q.shape[1], **constants, WIDE=_wide(q)
        )


def launch_encoder_backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor,
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lengths: Tensor,
) -> None:  # fmt: skip
    patches = starts.shape[0]
    blocks, constants = patch_tiles(q.shape[0] // patches, q.shape[1], q.shape[2])
    with torch.cuda.device_of(q):
        encoder_backward_kernel[(patches, blocks)](
            grad, q, k, v, out, lse, starts, lengths, q_grad, k_grad, v_grad, q.shape[1],
            **constants, WIDE=_wide(q),
        )  # fmt: skip


def launch_decoder(
    out: Tensor, lse: Tensor, vectors: int, q: Tensor, k: Tensor, v: Tensor, patch_ids: Tensor
) -> None:
    T, H, _ = q.shape
    tile = bytes_tile(q)
    with torch.cuda.device_of(q):
        decoder_kernel[(triton.cdiv(T, tile["BYTES"]), H)](
            q, k, v, patch_ids, out, lse, T, k.shape[0] // vectors, H,
            **tile, VECTORS=vectors, WIDE=_wide(q),
        )  # fmt: skip


def launch_decoder_backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, vectors: int,
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, patch_ids: Tensor, first: Tensor, end: Tensor,
) -> None:  # fmt: skip
    blocks, constants = patch_tiles(vectors, q.shape[1], q.shape[2])
    with torch.cuda.device_of(q):
        decoder_backward_kernel[(first.shape[0], blocks)](
            grad, q, k, v, lse, patch_ids, first, end, q_grad, k_grad, v_grad, q.shape[1],
            **constants, WIDE=_wide(q),
        )  # fmt: skip
