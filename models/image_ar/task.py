"""Autoregressive image models as a task: cross-entropy of codes, in nats a code and bits an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..batch import IGNORED, IMAGES, PackedBatch
from ..class_labels import LABEL_DROPPED, check_labels, image_keys
from ..errors import DataError
from ..multimodal.task import image_generator
from ..task import InitSpec, LossOutput, LossTerm, ParameterGroup, Task
from .config import Config
from .model import ImageTransformer

__all__ = ["LABELS", "ImageARTask", "build_task"]

LABELS = "labels"
"""Side tensor of encoded images: (I,) int64, the class of each document."""


class ImageARTask(Task):
    """One network, `model`; decay on every matrix, tables included."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build_networks(self) -> dict[str, nn.Module]:
        return {"model": ImageTransformer(self.config)}

    def init_spec(self, name: str) -> InitSpec:
        """Normal, the head zero: the first loss is ln K."""
        if name.endswith("norm.weight"):
            return InitSpec("constant", value=1.0)
        if name == "model/head.weight":
            return InitSpec("constant", value=0.0)
        return InitSpec("normal", std=self.config.init_std)

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        names = [f"model/{name}" for name, _ in networks["model"].named_parameters()]
        norms = tuple(name for name in names if name.endswith("norm.weight"))
        matrices = tuple(name for name in names if not name.endswith("norm.weight"))
        return [
            ParameterGroup("decay", matrices),
            ParameterGroup("no_decay", norms, weight_decay=False),
        ]

    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        return list(networks["model"].blocks)  # type: ignore[arg-type]

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {"tokens": batch.target_count, IMAGES: _image_count(batch)}

    def draw(self, batch: PackedBatch, seed: int) -> PackedBatch:
        """Which images train without their class, from (seed, sample, number of the image).

        Raises:
            DataError: no labels, a label or a code that the model does not know.
        """
        if LABELS not in batch.side:
            raise DataError(
                "the data have no class labels; encode them with weft data encode for model.family=image_ar"
            )
        check_labels(batch.side[LABELS], self.config.classes)
        self._check_codes(batch)
        keys = image_keys(batch, len(batch.side[LABELS]))
        share = self.config.label_dropout
        dropped = [image_generator(seed, *key).random() < share for key in keys]
        return replace(batch, side={**batch.side, LABEL_DROPPED: torch.tensor(dropped)})

    def _check_codes(self, batch: PackedBatch) -> None:
        largest = int(max(batch.tokens.max(), batch.targets.max()))
        counted = batch.targets.masked_fill(batch.targets == IGNORED, 0)
        least = int(min(batch.tokens.min(), counted.min()))
        if least < 0 or largest >= self.config.codebook_size:
            raise DataError(
                f"the data have code {least if least < 0 else largest} and the model knows 0 to {self.config.codebook_size - 1}; "
                "set model.codebook_size to the tokenizer's, or give the codes of another tokenizer"
            )

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        """The loss is nats a code; evaluation hides no class and drops nothing out."""
        is_training = torch.is_grad_enabled() and networks["model"].training
        entropy = networks["model"](
            batch,
            self._labels(batch, is_training),
            drop=self.config.dropout if is_training else 0.0,
        )
        bits = LossTerm(entropy / math.log(2), IMAGES)
        return LossOutput({"cross_entropy": LossTerm(entropy, "tokens")}, {"bits_per_image": bits})

    def _labels(self, batch: PackedBatch, is_training: bool) -> Tensor:
        labels = batch.side[LABELS]
        if not is_training or not self.config.label_dropout:
            return labels
        if LABEL_DROPPED not in batch.side:
            raise DataError(
                "it is not drawn which images hide their class; pass the batch through Task.draw first"
            )
        return labels.masked_fill(batch.side[LABEL_DROPPED], self.config.classes)

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def _image_count(batch: PackedBatch) -> int:
    """Those that count: none of a batch whose targets are all ignored."""
    if not batch.target_count:
        return 0
    return batch.host_counts.get(IMAGES, len(batch.cu_seqlens) - 1)


def build_task(config: Config) -> ImageARTask:
    return ImageARTask(config)
