"""The one batch that every model eats: a flat packed sequence of positions with document boundaries.

Dimensions: T positions of all rows laid end to end, D documents, R rows of S positions (T = R * S),
I images. Rows of a stream of text are full; rows of whole documents end in one document of padding
that carries no loss. Documents never cross a row, and attention, scans and convolutions all stop at
`cu_seqlens`. Side tensors carry what is not a token (image latents, noise levels, patch starts);
their names are the constants here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .modalities import MODALITIES

__all__ = [
    "AFTER_IMAGE",
    "CAPTION_TARGETS",
    "IGNORED",
    "IMAGES",
    "IMAGE_FIRST",
    "IMAGE_KEYS",
    "IMAGE_SPANS",
    "LATENTS",
    "MODALITIES",
    "NEXT_STARTS_PATCH",
    "NOISE",
    "PIXELS",
    "RATIO",
    "STAND_IN",
    "TARGET_MODALITY",
    "TIMESTEPS",
    "PackedBatch",
    "images_at",
    "positions_of",
    "targets_of",
]

IGNORED = -100
"""Target id of a position that carries no loss."""
NEXT_STARTS_PATCH = "next_starts_patch"
"""Side tensor of stored patches: (T,) bool, whether the byte after each position starts a patch. The first position of
a document always starts one; asked about the byte *after*, the last position of a row has an answer too."""

TARGET_MODALITY = "target_modality"
"""Side tensor of interleaved data: (T,) uint8, modality of the id each position predicts; 0 where it predicts none."""
PIXELS = "pixels"
"""Side tensor of image runs: (R, C, S, S) uint8, one picture a row, cropped and mirrored."""
RATIO = "ratio"
"""Side tensor of image runs with several ratios: (R,) uint8, index of each image's ratio, 0 the finest. Host counts
`images_8` and so on say how many there are."""
AFTER_IMAGE = "after_image"
"""Side tensor of interleaved data: (T,) bool, whether an image of its document ends at or before the position."""
IMAGE_SPANS = "image_spans"
"""Side tensor of interleaved data: (I, 2) int32, flat positions [start, stop) of each image, ascending. Of images as
codes too; whether a model attends in both directions inside them is its own affair."""
LATENTS = "latents"
"""Side tensor of continuous images: (I, C, H, W) fp32, scaled to unit variance."""
IMAGE_FIRST = "image_first"
"""Side tensor of continuous images: (I,) bool, whether scored text of its document follows the image."""
IMAGE_KEYS = "image_keys"
"""Side tensor of continuous images: (I, 2) int64, sample id and number of the image in its row: what noise is drawn
from. An image keeps its key on any number of ranks and in any micro-batch."""
TIMESTEPS = "timesteps"
"""Side tensor that `Task.draw` of a diffusion task adds: (I,) int64."""
NOISE = "noise"
"""Side tensor that `Task.draw` of a diffusion task adds: (I, C, H, W) fp32."""

IMAGES = "images"
"""Host count: images of the batch, codes included."""
STAND_IN = "stand_in"
"""Host count: 1 in a batch of a rank that has nothing left to evaluate: its `target_count` is 0, and what the model makes of
it is thrown away."""
CAPTION_TARGETS = "caption_targets"
"""Host count: counted text targets with an image before them in their document."""


def images_at(ratio: int) -> str:
    """Name of the host count of images at a ratio, in pixels a side of a latent's place."""
    return f"images_{ratio}"


def positions_of(modality: str) -> str:
    """Name of the host count of a modality's positions: the size of its routed part."""
    return f"{modality}_positions"


def targets_of(modality: str) -> str:
    """Name of the host count of counted targets that are of a modality."""
    return f"{modality}_targets"


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Args:
        tokens: (T,) int64, ids.
        targets: (T,) int64, the id each position predicts, `IGNORED` where it predicts nothing.
        position_ids: (T,) int64, position inside its own document piece, starting at 0.
        cu_seqlens: (D + 1,) int32, starts at 0, ends at T, strictly increasing, includes every row border.
        max_seqlen: longest document piece, a host integer.
        row_length: S; T is a multiple of it.
        sample_ids: (R,) host integers: the global index of each row in the order of the run.
        source_ids: (R,) host integers: the index of the data source of each row.
        target_count: number of targets that are not `IGNORED`, a host integer, so that no device sync is needed.
        target_bytes: number of raw bytes the counted targets stand for (0 where the vocabulary does not say).
        modality: (T,) uint8, of the input: an index into the run's modalities, 0 for text (the ids that open and
            close an image among it); None where all is text.
        side: tensors keyed by name; their first dimension is what the name's constant or their model documents.
        host_counts: integers that are known on the host, so that no device sync is needed: of interleaved data
            `positions_of` and `targets_of` each modality, `CAPTION_TARGETS`, `IMAGES`.
    """

    tokens: Tensor
    targets: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    row_length: int
    sample_ids: tuple[int, ...]
    source_ids: tuple[int, ...]
    target_count: int
    target_bytes: int = 0
    modality: Tensor | None = None
    side: dict[str, Tensor] = field(default_factory=dict)
    host_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.sample_ids)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with `change` applied to every tensor."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            values[item.name] = change(value) if isinstance(value, Tensor) else value
        values["side"] = {name: change(value) for name, value in self.side.items()}
        return PackedBatch(**values)

    def with_targets(self, targets: Tensor, modalities: Sequence[str]) -> PackedBatch:
        """The same batch with other targets, counted anew.

        Args:
            targets: (T,) int64, on the CPU as the batch is.
            modalities: the run's own, in their order.
        """
        is_counted = targets != IGNORED
        counts = dict(self.host_counts)
        if TARGET_MODALITY in self.side:
            kinds = self.side[TARGET_MODALITY]
            for place, name in enumerate(modalities):
                counts[targets_of(name)] = int((is_counted & (kinds == place)).sum())
            after = is_counted & (kinds == 0) & self.side[AFTER_IMAGE]
            counts[CAPTION_TARGETS] = int(after.sum())
        return dataclasses.replace(
            self, targets=targets, target_count=int(is_counted.sum()), host_counts=counts
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy to `device`; asynchronous when the source is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self.map_tensors(lambda tensor: tensor.pin_memory())
