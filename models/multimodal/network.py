"""Embedding, image stem and heads around a backbone of positions sorted by modality.

T packed positions, M modalities, d model width, V vocabulary, I continuous images of n positions each. Positions are
sorted once a batch; from embedding to heads the residual stream stays sorted, so that every modality is one slice.
Sources: Transfusion, arXiv 2408.11039, section 3; Mixture-of-Transformers, arXiv 2411.04996, algorithm 1.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ...kernels import Routing, linear_cross_entropy, route_by_modality
from ..batch import (
    AFTER_IMAGE,
    CAPTION_TARGETS,
    IGNORED,
    LATENTS,
    NOISE,
    TARGET_MODALITY,
    TIMESTEPS,
    PackedBatch,
    positions_of,
    targets_of,
)
from ..diffusion import Diffusion
from ..errors import ConfigError, DataError
from .settings import MultimodalConfig
from .stem import build_stem

__all__ = ["Backbone", "InterleavedEmbedding", "MultimodalModel", "route_batch"]

CAPTION = "caption"
"""Text with an image before it in its document: scored apart."""


class _Images(NamedTuple):
    """Continuous images of a batch, and their rows (I n, d) as they enter the backbone, with what the stem keeps."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    rows: Tensor
    kept: list[Tensor]


class Backbone(nn.Module, ABC):
    """What a family brings: blocks and a final norm, over rows sorted by modality."""

    blocks: nn.ModuleList

    @abstractmethod
    def context(self, batch: PackedBatch, routing: Routing) -> Any:
        """What all blocks share and is made once a batch, such as a layout of documents."""

    @abstractmethod
    def forward(self, x: Tensor, routing: Routing, context: Any) -> Tensor:
        """(T, d) sorted rows to (T, d), after the final norm."""


class InterleavedEmbedding(nn.Module):
    """Vectors of ids; special ids have a table of their own, so that a base's is never written to."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        self.special_ids = config.special_ids
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.special: nn.Parameter | None = None
        if config.special_ids:
            self.special = nn.Parameter(torch.empty(len(config.special_ids), config.d_model))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., d)."""
        if self.special is None:
            return self.tokens(ids)
        wanted = torch.tensor(self.special_ids, device=ids.device)
        is_one = ids[..., None] == wanted
        # Special ids may lie beyond the table; what is looked up for them is not used.
        is_special = is_one.any(-1)
        plain = self.tokens(ids.masked_fill(is_special, 0))
        own = embedding(is_one.int().argmax(-1), self.special)
        return torch.where(is_special[..., None], own.to(plain.dtype), plain)


class MultimodalModel(nn.Module):
    """One network of a multimodal family."""

    def __init__(self, config: MultimodalConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.embedding = InterleavedEmbedding(config)
        self.stem = None if config.image is None else build_stem(config.image, config.d_model)
        self.backbone = backbone
        self.head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.diffusion: Diffusion | None = None
        if config.image is not None:
            image = config.image
            self.diffusion = Diffusion(image.timesteps, image.schedule, image.prediction)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.tokens.weight if self.head is None else self.head.weight

    def forward(
        self, batch: PackedBatch, output: Literal["losses", "logits", "denoised"] = "losses"
    ) -> Any:
        """Losses, logits, or what the model makes of noised images.

        Args:
            batch: packed; with continuous images also `TIMESTEPS` and `NOISE` (`Task.draw`).
            output: `losses`: sums over counted targets by name, () fp32: `cross_entropy/KIND` and `z_loss`, KIND a modality
                or `caption`; of continuous images `denoising` (I,), a mean over each one's elements, and `timesteps` (I,). `logits`: (T, V) fp32 in the order
                of positions; rows of continuous images mean nothing. `denoised`: (I, C, H, W) fp32 predictions.

        Raises:
            DataError: images that do not fit the configuration.
        """
        routing = route_batch(batch, self.config.modalities)
        x, images = self._embed(batch, routing)
        x = self.backbone(x, routing, self.backbone.context(batch, routing))
        if output == "logits":
            return linear(routing.restore(x), self.head_weight).float()
        if output == "denoised":
            if images is None:
                raise ConfigError("this model has no continuous images; set model.image")
            return self._predict(x, routing, images)
        sums = self._score_ids(batch, x, routing)
        if images is not None:
            assert self.diffusion is not None
            wanted = self.diffusion.target(images.latents, images.noise, images.t)
            error = self._predict(x, routing, images) - wanted
            sums["denoising"] = error.square().mean(dim=(1, 2, 3))
            sums["timesteps"] = images.t
        return sums

    def _embed(self, batch: PackedBatch, routing: Routing) -> tuple[Tensor, _Images | None]:
        """Sorted rows (T, d), and continuous images as they entered."""
        tokens = routing.permute(batch.tokens)
        if self.stem is None or self.diffusion is None:
            return self.embedding(tokens), None
        latents, noise, t = self._images(batch, routing)
        rows, kept = self.stem.down(self.diffusion.noised(latents, noise, t), t)
        start, end = self._image_rows(routing)
        ids = self.embedding(torch.cat((tokens[:start], tokens[end:])))
        rows = rows.to(ids.dtype)
        x = torch.cat((ids[:start], rows, ids[start:]))
        return x, _Images(latents, noise, t, rows, kept)

    def _images(self, batch: PackedBatch, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise (I, C, H, W) and noise levels (I,); none where the batch brings none.

        Raises:
            DataError: of another shape, or without noise.
        """
        image, device = self.config.image, batch.tokens.device
        assert image is not None
        shape = (image.channels, image.size, image.size)
        nothing = torch.zeros((0, *shape), device=device)
        latents = batch.side.get(LATENTS, nothing)
        if tuple(latents.shape[1:]) != shape:
            found, wanted = (" x ".join(map(str, s)) for s in (latents.shape[1:], shape))
            raise DataError(
                f"the data's images are {found} and model.image takes {wanted}; set model.image.channels and size to match"
            )
        start, end = self._image_rows(routing)
        if end - start != len(latents) * image.positions:
            raise DataError(
                f"{len(latents)} images take {end - start} positions in the data, and with model.image.patch={image.patch} "
                f"they are {len(latents) * image.positions}; set it to match"
            )
        if LATENTS not in batch.side:
            return nothing, nothing, torch.zeros(0, dtype=torch.int64, device=device)
        if NOISE not in batch.side:
            raise DataError("the batch's images have no noise; pass it through Task.draw first")
        return latents, batch.side[NOISE], batch.side[TIMESTEPS]

    def _image_rows(self, routing: Routing) -> tuple[int, int]:
        place = self.config.modalities.index("image")
        start = sum(routing.sizes[:place])
        return start, start + routing.sizes[place]

    def _predict(self, x: Tensor, routing: Routing, images: _Images) -> Tensor:
        """(I, C, H, W) fp32, what the model makes of each image."""
        assert self.stem is not None
        start, end = self._image_rows(routing)
        return self.stem.up(x[start:end], images.rows, images.kept, images.t).float()

    def _score_ids(self, batch: PackedBatch, x: Tensor, routing: Routing) -> dict[str, Tensor]:
        """Cross-entropy by kind of target: rows are sorted by it once more, so that each kind is a slice."""
        targets = routing.permute(batch.targets)
        config = self.config
        if TARGET_MODALITY not in batch.side:
            entropy, z = linear_cross_entropy(
                x, self.head_weight, targets, config.loss_chunk_tokens
            )
            return {"cross_entropy/text": entropy, "z_loss": z}
        kinds, sizes = self._kinds(batch, routing)
        if config.image is not None:
            start, end = self._image_rows(routing)
            x, targets, kinds = (
                torch.cat((rows[:start], rows[end:])) for rows in (x, targets, kinds)
            )
        sorting = route_by_modality(kinds, len(sizes), list(sizes.values()))
        x, targets = sorting.permute(x), sorting.permute(targets)
        ends = itertools.accumulate(sizes.values())
        sums: dict[str, Tensor] = {}
        squares: list[Tensor] = []
        for (kind, size), end in zip(sizes.items(), ends, strict=True):
            rows = slice(end - size, end)
            entropy, square = linear_cross_entropy(
                x[rows], self.head_weight, targets[rows], config.loss_chunk_tokens
            )
            sums[f"cross_entropy/{kind}"] = entropy
            squares.append(square)
        sums["z_loss"] = torch.stack(squares).sum()
        return sums

    def _kinds(self, batch: PackedBatch, routing: Routing) -> tuple[Tensor, dict[str, int]]:
        """(T,) uint8, kind of each sorted row's target, and how many rows each kind has; uncounted rows go with text."""
        modalities, counts = self.config.modalities, batch.host_counts
        kinds = batch.side[TARGET_MODALITY]
        is_counted = batch.targets != IGNORED
        is_caption = is_counted & (kinds == 0) & batch.side[AFTER_IMAGE]
        kinds = torch.where(is_caption, len(modalities), kinds.masked_fill(~is_counted, 0))
        others = {m: counts.get(targets_of(m), 0) for m in modalities[1:]}
        sizes = {**others, CAPTION: counts.get(CAPTION_TARGETS, 0)}
        rows = sum(counts.get(positions_of(m), 0) for m in self.config.id_modalities)
        return routing.permute(kinds.to(torch.uint8)), {
            "text": rows - sum(sizes.values()),
            **sizes,
        }


def route_batch(batch: PackedBatch, modalities: tuple[str, ...]) -> Routing:
    """The batch's positions sorted by modality; those of a batch without modalities are text.

    Raises:
        DataError: the batch has a modality that the model has no weights for.
    """
    total, device = len(batch.tokens), batch.tokens.device
    counts = batch.host_counts
    sizes = [counts.get(positions_of(m), 0) for m in modalities]
    if batch.modality is None:
        sizes = [total, *[0] * (len(modalities) - 1)]
    elif sum(sizes) != total:
        extra = [
            name.removesuffix("_positions")
            for name, count in counts.items()
            if name.endswith("_positions")
            and count
            and name.removesuffix("_positions") not in modalities
        ]
        raise DataError(
            f"the data have {', '.join(extra) or 'positions of no known modality'} and model.modalities is "
            f"{', '.join(modalities)}; add it there, or leave that data out"
        )
    if sizes.count(0) < len(sizes) - 1:
        assert batch.modality is not None
        return route_by_modality(batch.modality, len(modalities), sizes)
    # One modality: sorted already.
    order = torch.arange(total, device=device)
    ends = torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32).to(
        device, non_blocking=True
    )
    return Routing(order, order, ends, sizes)
