"""Losses by modality, noise, and start values that families of text, images and speech share.

Objectives: next token on ids of any modality; and lambda times the denoising loss on continuous images, both divided by
global counts (Transfusion, arXiv 2408.11039, equation 4).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import (
    CAPTION_TARGETS,
    IMAGE_FIRST,
    IMAGE_KEYS,
    IMAGES,
    LATENTS,
    NOISE,
    TIMESTEPS,
    PackedBatch,
    positions_of,
    targets_of,
)
from ..task import InitSpec, LossOutput, LossTerm, Task
from .network import CAPTION, Backbone, MultimodalModel
from .settings import MultimodalConfig

__all__ = ["MultimodalTask", "image_generator", "with_noise"]

NOISE_BUCKETS = 4
"""Denoising losses are also reported by quarter of the noise levels."""
POSITION_STD = 0.02


def image_generator(seed: int, sample: int, image: int) -> np.random.Generator:
    """What is drawn for one image of a run, wherever it is drawn."""
    entropy = np.random.SeedSequence([seed & (2**64 - 1), sample, image])
    return np.random.Generator(np.random.Philox(entropy))


class MultimodalTask(Task):
    """One network, `model`; a family says how its backbone is built, started and grouped."""

    def __init__(self, config: MultimodalConfig) -> None:
        self.config = config
        with torch.device("meta"):
            parameters = dict(self.build_model().named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}

    @abstractmethod
    def build_backbone(self) -> Backbone:
        """The family's backbone, uninitialised."""

    @abstractmethod
    def backbone_init(self, name: str) -> InitSpec:
        """How a parameter of the backbone, or of the embedding or head, starts; `name` as in the network."""

    def build_model(self) -> MultimodalModel:
        return MultimodalModel(self.config, self.build_backbone())

    def build_networks(self) -> dict[str, nn.Module]:
        return {"model": self.build_model()}

    def init_spec(self, name: str) -> InitSpec:
        own = name.partition("/")[2]
        return self._stem_init(own) if own.startswith("stem.") else self.backbone_init(own)

    def _stem_init(self, name: str) -> InitSpec:
        """Linear and convolution layers start as torch's do, what leaves the stem at zero."""
        layer, _, kind = name.rpartition(".")
        if layer == "stem.position":
            return InitSpec("normal", std=POSITION_STD)
        if layer == "stem.output":
            return InitSpec("constant", value=0.0)
        if "norm" in layer.rpartition(".")[2]:
            return InitSpec("constant", value=1.0 if kind == "weight" else 0.0)
        fan_in = math.prod(self.shapes[f"{layer}.weight"][1:])
        return InitSpec("uniform", std=fan_in**-0.5)

    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        model = networks["model"]
        assert isinstance(model, MultimodalModel)
        return list(model.backbone.blocks)

    @property
    def _noise_buckets(self) -> list[str]:
        return [f"images_noise_{i}" for i in range(NOISE_BUCKETS)]

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        found = {"tokens": batch.target_count}
        if len(self.config.modalities) > 1:
            names = [positions_of(m) for m in self.config.modalities]
            names += [targets_of(m) for m in self.config.modalities]
            names += [CAPTION_TARGETS, IMAGES]
            if self.config.image is not None:
                names += self._noise_buckets
            found |= {name: batch.host_counts.get(name, 0) for name in names}
            if batch.modality is None:
                found[positions_of("text")] = len(batch.tokens)
                found[targets_of("text")] = batch.target_count
        return found

    def draw(self, batch: PackedBatch, seed: int) -> PackedBatch:
        """Noise levels and noise of continuous images, from (seed, sample, number of the image in its row)."""
        image = self.config.image
        if image is None or LATENTS not in batch.side:
            return batch
        latents = batch.side[LATENTS]
        keys = batch.side[IMAGE_KEYS].tolist()
        first = batch.side[IMAGE_FIRST].tolist()
        noise = np.empty(tuple(latents.shape), np.float32)
        levels = np.empty(len(keys), np.int64)
        for place, ((sample, number), is_first) in enumerate(zip(keys, first, strict=True)):
            generator = image_generator(seed, sample, number)
            limit = image.first_limit if is_first and image.first_limit else image.timesteps
            levels[place] = generator.integers(limit)
            generator.standard_normal(out=noise[place], dtype=np.float32)
        return with_noise(batch, torch.from_numpy(levels), torch.from_numpy(noise), image.timesteps)

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        sums = networks["model"](batch)
        kinds = {
            name.partition("/")[2]: total
            for name, total in sums.items()
            if name.startswith("cross_entropy/")
        }
        terms = {
            "cross_entropy": LossTerm(torch.stack(list(kinds.values())).sum(), "tokens"),
            "z_loss": LossTerm(sums["z_loss"], "tokens", weight=self.config.z_loss),
        }
        metrics: dict[str, LossTerm] = {}
        if len(self.config.modalities) > 1:
            metrics |= self._metrics_of_ids(kinds)
        if self.config.image is not None:
            errors = sums["denoising"]
            weight = self.config.image.loss_weight
            terms["denoising"] = LossTerm(errors.sum(), IMAGES, weight=weight)
            metrics |= self._metrics_of_noise(errors, sums["timesteps"])
        return LossOutput(terms, metrics)

    def _metrics_of_ids(self, kinds: dict[str, Tensor]) -> dict[str, LossTerm]:
        """Losses by modality of the target; those after an image are in the text's and stand apart too."""
        nothing = torch.zeros_like(kinds["text"])
        caption = kinds.get(CAPTION, nothing)
        found = {"text_loss": LossTerm(kinds["text"] + caption, targets_of("text"))}
        found["caption_loss"] = LossTerm(caption, CAPTION_TARGETS)
        for modality in self.config.id_modalities[1:]:
            total = kinds.get(modality, nothing)
            found[f"{modality}_loss"] = LossTerm(total, targets_of(modality))
        return found

    def _metrics_of_noise(self, errors: Tensor, t: Tensor) -> dict[str, LossTerm]:
        """The denoising loss by quarter of the noise levels, the quietest first."""
        assert self.config.image is not None
        bucket = t * NOISE_BUCKETS // self.config.image.timesteps
        return {
            f"denoising_{i}": LossTerm(errors.masked_fill(bucket != i, 0).sum(), name)
            for i, name in enumerate(self._noise_buckets)
        }


def with_noise(batch: PackedBatch, levels: Tensor, noise: Tensor, timesteps: int) -> PackedBatch:
    """The batch with its images at these noise levels.

    Args:
        levels: (I,) int64, on the CPU.
        noise: (I, C, H, W) fp32.
        timesteps: noise levels there are.
    """
    buckets = torch.bincount(levels * NOISE_BUCKETS // timesteps, minlength=NOISE_BUCKETS)
    counts = {f"images_noise_{i}": int(count) for i, count in enumerate(buckets.tolist())}
    return replace(
        batch,
        host_counts={**batch.host_counts, **counts},
        side={**batch.side, TIMESTEPS: levels, NOISE: noise},
    )
