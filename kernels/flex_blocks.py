"""FlexAttention as the ops here call it: block masks made from intervals of keys, and the call itself.

T positions, H query heads, K key/value heads, hd head width; blocks are `FLEX_BLOCK` positions a side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLEX_BLOCK", "flex_attend", "interval_block_mask", "ordered_blocks"]

FLEX_BLOCK = 128


def interval_block_mask(starts: Tensor, ends: Tensor, visible: Callable[..., Tensor]) -> Any:
    """flex_attention's BlockMask of queries that each see one run of keys, itself among them.

    The keys that a block of queries sees are then one run as well, so that the least start and
    the last end of a block say which key blocks it needs, without any T x T mask.

    Args:
        starts, ends: (T,) integers; query i sees keys starts[i] to ends[i] - 1.
        visible: the same as a mask_mod, for the blocks that are seen in part.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = starts.shape[0]
    count, padding = -(-total // FLEX_BLOCK), -total % FLEX_BLOCK
    # What fills the last block changes no bound of it, and keeps it from being seen in whole.
    starts = torch.nn.functional.pad(starts, (0, padding), value=total).view(count, FLEX_BLOCK)
    ends = torch.nn.functional.pad(ends, (0, padding), value=0).view(count, FLEX_BLOCK)
    (least, latest), (earliest, most) = starts.aminmax(dim=1), ends.aminmax(dim=1)
    first = torch.arange(count, device=starts.device) * FLEX_BLOCK
    last = first + FLEX_BLOCK
    needed = (last > least[:, None]) & (first < most[:, None])
    full = (first >= latest[:, None]) & (last <= earliest[:, None])
    return BlockMask.from_kv_blocks(
        *ordered_blocks(needed & ~full),
        *ordered_blocks(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(total, total),
    )


def ordered_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their indices first, for flex_attention."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    """flex_attention of one sequence.

    Args:
        q: (N, H, hd).
        k, v: (M, K, hd), H a multiple of K.
        block_mask: a BlockMask of N queries and M keys.

    Returns:
        (N, H, hd).
    """
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled block the outer compilation covers it; on the CPU only the plain form has
    # a gradient.
    attend: Callable[..., Any] = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled_flex()
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    out = attend(queries, keys, values, block_mask=block_mask, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
