"""FlexAttention between bytes and patches: a block mask from patch starts, and the call.

The keys of a query are one interval, so which blocks of 128 x 128 are needed and which are full follows from the
intervals' ends: N + (N / 128) (M / 128) work instead of the N * M of `create_block_mask`. Build one mask a batch and
direction, outside of compiled blocks, and share it among layers and heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..flex_blocks import FLEX_BLOCK, flex_attend, ordered_blocks
from .segment_pool import check_segments

__all__ = ["decoder_block_mask", "encoder_block_mask", "flex_patch_attention", "patch_block_mask"]


def patch_block_mask(first: Tensor, end: Tensor, keys: int, block: int = FLEX_BLOCK) -> Any:
    """flex_attention's BlockMask where query i sees the keys from `first[i]` up to `end[i]`.

    Args:
        first, end: (N,) int32 or int64 within 0 to `keys`; an empty interval sees nothing.
        keys: M.
        block: side of a block.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no queries or keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    check_shape("first", first, (None,))
    check_shape("end", end, tuple(first.shape))
    for name, tensor in (("first", first), ("end", end)):
        check_dtype(name, tensor, (torch.int32, torch.int64))
    check_same_device(first=first, end=end)
    queries = first.shape[0]
    if queries == 0 or keys < 1:
        raise ValueError(
            f"first has {queries} queries and keys is {keys}, expected at least one of each"
        )

    rows, columns = -(-queries // block), -(-keys // block)
    sees = first < end
    # Each query adds 1 from its first block of keys on and takes it back after its last.
    steps = torch.zeros(rows, columns + 1, dtype=torch.int32, device=first.device)
    row = torch.arange(queries, device=first.device) // block
    begin = torch.where(sees, first // block, columns).long()
    finish = torch.where(sees, (end - 1) // block + 1, columns).long()
    one = sees.int()
    flat = steps.view(-1)
    flat.scatter_add_(0, row * (columns + 1) + begin, one)
    flat.scatter_add_(0, row * (columns + 1) + finish, -one)
    needed = steps.cumsum(1)[:, :-1] > 0

    # Full: all queries of the row see the whole block. Queries that do not exist see nothing.
    padding = rows * block - queries
    latest = torch.nn.functional.pad(torch.where(sees, first, keys), (0, padding), value=keys)
    earliest = torch.nn.functional.pad(torch.where(sees, end, 0), (0, padding), value=0)
    edge = torch.arange(columns, device=first.device) * block
    is_full = (latest.view(rows, block).amax(1)[:, None] <= edge) & (
        earliest.view(rows, block).amin(1)[:, None] >= edge + block
    )

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < end[query])

    return BlockMask.from_kv_blocks(
        *ordered_blocks(needed & ~is_full),
        *ordered_blocks(needed & is_full),
        BLOCK_SIZE=block,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def encoder_block_mask(starts: Tensor, lengths: Tensor, vectors: int, total: int) -> Any:
    """Mask of `patch_encoder_attention`: vector j * K + c sees the bytes of patch j.

    Args:
        starts, lengths: (P,) int32.
        vectors: K.
        total: T.

    Raises:
        ValueError: as in `patch_block_mask`.
    """
    check_segments(starts, lengths)
    first = starts.repeat_interleave(vectors)
    return patch_block_mask(first, first + lengths.repeat_interleave(vectors), total)


def decoder_block_mask(patch_ids: Tensor, vectors: int, patches: int) -> Any:
    """Mask of `patch_decoder_attention`: byte t sees the K vectors of `patch_ids[t]`; ids out of range see nothing.

    Args:
        patch_ids: (T,) int32.
        vectors: K.
        patches: P.

    Raises:
        ValueError: as in `patch_block_mask`.
    """
    is_known = (patch_ids >= 0) & (patch_ids < patches)
    first = torch.where(is_known, patch_ids * vectors, 0)
    return patch_block_mask(first, torch.where(is_known, first + vectors, 0), patches * vectors)


def flex_patch_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    """Either cross-attention by FlexAttention; no gradient on the CPU.

    Args:
        q: (N, H, hd).
        k, v: (M, H, hd).
        block_mask: from `encoder_block_mask` or `decoder_block_mask`.

    Returns:
        (N, H, hd); 0 for a query that sees nothing.

    Raises:
        ValueError: shapes that do not fit the mask, or a gradient asked for on the CPU.
    """
    check_shape("q", q, (block_mask.seq_lengths[0], None, None))
    check_shape("k", k, (block_mask.seq_lengths[1], *q.shape[1:]))
    check_shape("v", v, tuple(k.shape))
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            f"q is on {q.device}, where FlexAttention has no gradient; use patch_encoder_attention or "
            "patch_decoder_attention"
        )
    return flex_attend(q, k, v, block_mask)
