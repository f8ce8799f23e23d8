"""Batches of pictures made by hand, and small image tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from weft.models.batch import IGNORED, IMAGE_KEYS, IMAGES, PIXELS, RATIO, PackedBatch, images_at
from weft.models.image_tokenizer.config import Config

SMALL: dict[str, Any] = {
    "size": 16,
    "channels": (8, 8, 16),
    "latent_channels": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "groups": 4,
    "quantizer": {"codes": 32, "width": 4},
}
NESTED: dict[str, Any] = {
    **SMALL,
    "kind": "nested",
    "channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "quant_conv": False,
    "lowest_attention": False,
    "ratios": (2, 4, 8),
    "reconstruction": {"error": "l1", "reduction": "sum"},
}
ADVERSARY: dict[str, Any] = {"width": 8, "layers": 2, "groups": 4, "start_step": 1}
CAUSAL: dict[str, Any] = {"width": 16, "head_width": 8, "ffn_width": 32, "ramp_steps": 0}


def small(base: dict[str, Any] = SMALL, **changes: Any) -> Config:
    return Config(**{**base, **changes})


def pictures(
    rows: Sequence[int], size: int = 16, channels: int = 3, ratios: Sequence[int] | None = None
) -> PackedBatch:
    """One picture a sample number, which it is a function of.

    Args:
        ratios: index of each picture's ratio among 2, 4 and 8.
    """
    pixels = []
    for row in rows:
        generator = torch.Generator().manual_seed(1000 + row)
        coarse = torch.rand(1, channels, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        pixels.append((smooth[0] * 255).round().to(torch.uint8))
    count = len(rows)
    side = {
        PIXELS: torch.stack(pixels),
        IMAGE_KEYS: torch.tensor([[row, 0] for row in rows], dtype=torch.int64),
    }
    counts = {IMAGES: count}
    if ratios is not None:
        side[RATIO] = torch.tensor(ratios, dtype=torch.uint8)
        counts |= {images_at(2 << place): ratios.count(place) for place in range(3)}
    return PackedBatch(
        tokens=torch.tensor(list(rows)) % 10,
        targets=torch.full((count,), IGNORED),
        position_ids=torch.zeros(count, dtype=torch.int64),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32),
        max_seqlen=1,
        row_length=1,
        sample_ids=tuple(rows),
        source_ids=(0,) * count,
        target_count=count,
        side=side,
        host_counts=counts,
    )
