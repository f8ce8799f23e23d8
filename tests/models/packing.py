"""Packed batches for model tests."""

from __future__ import annotations

import torch
from weft.models.batch import IGNORED, PackedBatch


def packed(tokens: torch.Tensor, lengths: list[int], row_length: int) -> PackedBatch:
    """`tokens` (T,) cut into documents of `lengths`; row borders must be among their ends."""
    borders = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    targets = torch.cat([tokens[1:], torch.tensor([IGNORED])]).clone()
    targets[borders[1:] - 1] = IGNORED
    rows = len(tokens) // row_length
    return PackedBatch(
        tokens=tokens,
        targets=targets,
        position_ids=positions,
        cu_seqlens=borders.int(),
        max_seqlen=max(lengths),
        row_length=row_length,
        sample_ids=tuple(range(rows)),
        source_ids=(0,) * rows,
        target_count=int((targets != IGNORED).sum()),
    )
