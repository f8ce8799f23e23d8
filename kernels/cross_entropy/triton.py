"""The two halves of the loss in Triton: one pass over the logits each.

Each row's sum of exponentials is gathered over blocks of the vocabulary against a running maximum. The gradient needs no
sums, as the logsumexp of every token is kept; it may overwrite the logits. Rows of ignored tokens are not read.
Names: `i_` index, `o_` offsets, `p_` pointer, `m_` mask, `b_` value of a tile.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..faces import wide_dtype
from .reference import IGNORED, keep_counted

__all__ = [
    "TILES",
    "gradient_kernel",
    "keep_counted",
    "logits_grad",
    "losses_kernel",
    "tile_of",
    "token_losses",
]

WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tile(NamedTuple):
    """Tokens and vocabulary entries of a tile, warps of a program."""

    tokens: int
    entries: int
    warps: int


TILES = {512: Tile(8, 512, 4), 4096: Tile(1, 4096, 8)}
"""By the largest vocabulary they hold whole; larger ones are walked in the last."""


@triton.jit
def losses_kernel(
    p_logits, p_targets, p_entropy, p_log_partition, T, V,
    BT: tl.constexpr, BV: tl.constexpr, IGNORED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    b_target = tl.load(p_targets + o_t, mask=o_t < T, other=IGNORED)
    m_counted = b_target != IGNORED
    p_rows = p_logits + o_t[:, None] * V
    b_max = tl.full([BT], float("-inf"), WIDE)
    b_shift = tl.zeros([BT], WIDE)
    b_sum = tl.zeros([BT], WIDE)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_x = m_counted[:, None] & (o_v < V)[None, :]
        b_x = tl.load(p_rows + o_v[None, :], mask=m_x, other=float("-inf")).to(WIDE)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        # Infinite maxima, equal ones above all, must not meet in a difference: inf - inf is NaN.
        b_scale = tl.where(b_max == b_new, 1.0, tl.exp(b_max - b_new))
        b_shift = tl.where(tl.abs(b_new) == float("inf"), 0.0, b_new)
        b_sum = b_sum * b_scale + tl.sum(tl.exp(b_x - b_shift[:, None]), 1)
        b_max = b_new
    b_log_partition = b_shift + tl.log(b_sum)
    m_known = m_counted & (b_target >= 0) & (b_target < V)
    b_on_target = tl.load(p_logits + o_t * V + b_target, mask=m_known, other=0).to(WIDE)
    # A target outside the vocabulary makes the sum NaN: nobody can look at it on the host.
    b_entropy = tl.where(m_known, b_log_partition - b_on_target, float("nan"))
    b_entropy = tl.where(m_counted, b_entropy, 0.0)
    tl.store(p_entropy + o_t, b_entropy, mask=o_t < T)
    tl.store(p_log_partition + o_t, tl.where(m_counted, b_log_partition, 0.0), mask=o_t < T)


@triton.jit
def gradient_kernel(
    p_logits, p_targets, p_log_partition, p_entropy_grad, p_square_grad, p_out, T, V, blocks_v,
    BT: tl.constexpr, BV: tl.constexpr, IGNORED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_t = (i_program // blocks_v).to(tl.int64) * BT + tl.arange(0, BT)
    o_v = (i_program % blocks_v) * BV + tl.arange(0, BV)
    b_target = tl.load(p_targets + o_t, mask=o_t < T, other=IGNORED)
    m_counted = b_target != IGNORED
    b_z = tl.load(p_log_partition + o_t, mask=o_t < T, other=0)
    b_entropy_grad = tl.load(p_entropy_grad).to(WIDE)
    b_factor = b_entropy_grad + 2 * tl.load(p_square_grad).to(WIDE) * b_z
    o_x = o_t[:, None] * V + o_v[None, :]
    m_v = (o_v < V)[None, :]
    b_x = tl.load(p_logits + o_x, mask=m_counted[:, None] & m_v, other=0).to(WIDE)
    b_grad = b_factor[:, None] * tl.exp(b_x - b_z[:, None])
    m_target = o_v[None, :] == b_target[:, None]
    b_grad = tl.where(m_target, b_grad - b_entropy_grad, b_grad)
    b_grad = tl.where(m_counted[:, None], b_grad, 0)
    tl.store(p_out + o_x, b_grad.to(p_out.dtype.element_ty), mask=(o_t < T)[:, None] & m_v)


def tile_of(vocabulary: int) -> Tile:
    fitting = [size for size in TILES if vocabulary <= size]
    return TILES[min(fitting, default=max(TILES))]


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As in `reference.py`; contiguous tensors."""
    tokens, vocabulary = logits.shape
    entropies = logits.new_empty(tokens, dtype=wide_dtype(logits))
    log_partition = torch.empty_like(entropies)
    tile = tile_of(vocabulary)
    with torch.cuda.device_of(logits):
        losses_kernel[(triton.cdiv(tokens, tile.tokens),)](
            logits, targets, entropies, log_partition, tokens, vocabulary,
            BT=tile.tokens, BV=tile.entries, IGNORED=IGNORED, WIDE=WIDE[entropies.dtype],
            num_warps=tile.warps,
        )  # fmt: skip
    return entropies, log_partition


def logits_grad(
    logits: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    entropy_grad: Tensor,
    square_grad: Tensor,
    out: Tensor,
) -> Tensor:
    """As in `reference.py`; contiguous tensors."""
    tokens, vocabulary = logits.shape
    tile = tile_of(vocabulary)
    blocks_v = triton.cdiv(vocabulary, tile.entries)
    with torch.cuda.device_of(logits):
        gradient_kernel[(triton.cdiv(tokens, tile.tokens) * blocks_v,)](
            logits, targets, log_partition, entropy_grad, square_grad, out, tokens, vocabulary,
            blocks_v, BT=tile.tokens, BV=tile.entries, IGNORED=IGNORED,
            WIDE=WIDE[log_partition.dtype], num_warps=tile.warps,
        )  # fmt: skip
    return out
