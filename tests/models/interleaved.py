"""Packed batches of text and continuous images, written as strings, and networks to run them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from weft.models.batch import (
    AFTER_IMAGE,
    CAPTION_TARGETS,
    IGNORED,
    IMAGE_FIRST,
    IMAGE_KEYS,
    IMAGE_SPANS,
    IMAGES,
    LATENTS,
    NOISE,
    TARGET_MODALITY,
    TIMESTEPS,
    PackedBatch,
)
from weft.models.initialise import initialise_module
from weft.models.multimodal.settings import ImageConfig
from weft.models.multimodal.task import MultimodalTask

IMAGE = ImageConfig(channels=2, size=4, patch=2, time_width=8)
POSITIONS = IMAGE.positions


def interleaved(
    documents: Sequence[str], *, vocabulary: int, seed: int = 0, sample: int = 0
) -> PackedBatch:
    """One row of documents such as `tt(i)t`: t is text, ( BOI, i an image, ) EOI; BOI and EOI are the ids after the
    vocabulary. Nothing is scored where BOI or a patch is input or target. Images have noise and noise levels.
    """
    generator = torch.Generator().manual_seed(seed)
    boi, eoi = vocabulary, vocabulary + 1
    tokens, modality, after, spans, positions, lengths, first = [], [], [], [], [], [], []
    for document in documents:
        start, seen, mine = len(tokens), False, len(spans)
        for place, kind in enumerate(document):
            if kind == "i":
                spans.append((len(tokens), len(tokens) + POSITIONS))
                tokens += [boi] * POSITIONS
                modality += [1] * POSITIONS
                after += [seen] * POSITIONS
                seen = True
                first.append("t" in document[place:])
                continue
            drawn = int(torch.randint(vocabulary, (1,), generator=generator))
            tokens.append({"(": boi, ")": eoi}.get(kind, drawn))
            modality.append(0)
            after.append(seen)
        lengths.append(len(tokens) - start)
        positions += range(lengths[-1])
        assert len(spans) - mine == document.count("i")
    total = len(tokens)
    ends = torch.tensor(lengths).cumsum(0)
    ids = torch.tensor(tokens)
    targets = ids.roll(-1)
    silent = torch.tensor(modality, dtype=torch.bool)
    targets[silent | silent.roll(-1) | (ids == boi) | (targets >= vocabulary)] = IGNORED
    targets[ends - 1] = IGNORED
    counted = targets != IGNORED
    is_after = torch.tensor(after)
    counts = {
        "text_positions": total - sum(modality),
        "image_positions": sum(modality),
        "text_targets": int(counted.sum()),
        "image_targets": 0,
        CAPTION_TARGETS: int((counted & is_after).sum()),
        IMAGES: len(spans),
    }
    shape = (len(spans), IMAGE.channels, IMAGE.size, IMAGE.size)
    side = {
        TARGET_MODALITY: torch.zeros(total, dtype=torch.uint8),
        AFTER_IMAGE: is_after,
        IMAGE_SPANS: torch.tensor(spans, dtype=torch.int32).reshape(-1, 2),
        LATENTS: torch.randn(shape, generator=generator),
        IMAGE_FIRST: torch.tensor(first, dtype=torch.bool),
        IMAGE_KEYS: torch.tensor([(sample, i) for i in range(len(spans))]).reshape(-1, 2),
        NOISE: torch.randn(shape, generator=generator),
        TIMESTEPS: torch.randint(1000, (len(spans),), generator=generator),
    }
    return PackedBatch(
        tokens=ids,
        targets=targets,
        position_ids=torch.tensor(positions),
        cu_seqlens=torch.cat((torch.zeros(1), ends)).int(),
        max_seqlen=max(lengths),
        row_length=total,
        sample_ids=(sample,),
        source_ids=(0,),
        target_count=int(counted.sum()),
        modality=torch.tensor(modality, dtype=torch.uint8),
        host_counts=counts,
        side=side,
    )


def with_side(batch: PackedBatch, **changes: torch.Tensor) -> PackedBatch:
    return replace(batch, side={**batch.side, **changes})


def build(task: MultimodalTask, seed: int = 3) -> Any:
    """The network with start values; the way out of the stem, which starts at zero, with others."""
    with torch.device("meta"):
        model = task.build_model()
    model.to_empty(device="cpu")
    initialise_module(model, "model", task, seed)
    if task.config.image is not None:
        nn.init.normal_(model.stem.output.weight, std=0.1)
    return model
