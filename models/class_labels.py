"""Class labels of images: which of them a model does not see in training, and which are generated.

Whatever is random here is a function of (seed, key), so that neither ranks nor batches change it.
Source: Ho and Salimans, arXiv 2207.12598 (labels dropped for classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .batch import IMAGE_KEYS, PackedBatch
from .errors import ConfigError, DataError

__all__ = ["LABEL_DROPPED", "check_labels", "image_keys", "labels_of_samples"]

LABEL_DROPPED = "label_dropped"
"""Side tensor that `Task.draw` of class-conditional models adds: (I,) bool, whether training hides the image's class."""


def check_labels(labels: Tensor, classes: int) -> None:
    """Labels (I,) on the CPU.

    Raises:
        DataError: one is no class of the model.
    """
    if not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise DataError(
            f"the data have class {low if low < 0 else high} and the model knows 0 to {classes - 1}; "
            "set model.classes to the number of classes, or encode the data with the labels meant for it"
        )


def image_keys(batch: PackedBatch, images: int) -> list[tuple[int, int]]:
    """(sample id, number of the image in its row) of each image of a batch: the data's own, or by row."""
    if IMAGE_KEYS in batch.side:
        return [(sample, number) for sample, number in batch.side[IMAGE_KEYS].tolist()]
    a_row = images // batch.rows
    return [(sample, number) for sample in batch.sample_ids for number in range(a_row)]


def labels_of_samples(
    indices: Sequence[int],
    classes: int,
    seed: int,
    how: Literal["balanced", "random"] = "balanced",
) -> Tensor:
    """The class of each image to generate, from its index alone.

    Args:
        how: `balanced` goes through the classes in turn, `random` draws one for each index.

    Returns:
        (I,) int64.

    Raises:
        ConfigError: an index is negative.
    """
    if any(index < 0 for index in indices):
        raise ConfigError(f"image {min(indices)}: indices of images to generate start at 0")
    if how == "balanced":
        return torch.tensor([index % classes for index in indices], dtype=torch.int64)
    # A stream of its own: an image's noise must not follow from how its class was chosen.
    drawn = [
        np.random.default_rng(np.random.SeedSequence([seed, index, classes])).integers(classes)
        for index in indices
    ]
    return torch.tensor(drawn, dtype=torch.int64)
