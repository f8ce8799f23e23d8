"""Batches of encoded images, made by hand."""

from __future__ import annotations

import torch
from weft.models.batch import IMAGE_KEYS, IMAGES, PackedBatch


def code_batch(
    codes: torch.Tensor, labels: torch.Tensor, images_a_row: int = 1, first: int = 0
) -> PackedBatch:
    """Codes (I, N) with labels (I,): each image a document of N positions."""
    count, length = codes.shape
    inputs = torch.cat((torch.zeros_like(codes[:, :1]), codes[:, :-1]), 1)
    rows = count // images_a_row
    return PackedBatch(
        tokens=inputs.flatten(),
        targets=codes.flatten(),
        position_ids=torch.arange(length).repeat(count),
        cu_seqlens=torch.arange(0, count * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        row_length=images_a_row * length,
        sample_ids=tuple(range(first, first + rows)),
        source_ids=(0,) * rows,
        target_count=codes.numel(),
        side={"labels": labels},
        host_counts={IMAGES: count},
    )


def latent_batch(
    moments: dict[int, torch.Tensor],
    places: dict[int, list[int]],
    labels: torch.Tensor,
    first: int = 0,
) -> PackedBatch:
    """Latents by ratio: `moments[r]` (n_r, 2C, h, w), and the row of the batch of each."""
    rows = len(labels)
    side = {f"moments_{r}": values for r, values in moments.items()}
    side |= {f"place_{r}": torch.tensor(rows) for r, rows in places.items()}
    side[IMAGE_KEYS] = torch.tensor([[first + row, 0] for row in range(rows)])
    return PackedBatch(
        tokens=labels,
        targets=torch.full((rows,), -100),
        position_ids=torch.zeros(rows, dtype=torch.int64),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32),
        max_seqlen=1,
        row_length=1,
        sample_ids=tuple(range(first, first + rows)),
        source_ids=(0,) * rows,
        target_count=rows,
        side=side,
        host_counts={IMAGES: rows, **{f"images_{r}": len(p) for r, p in places.items()}},
    )
