"""What preparing images depends on beside the files, small enough to send to worker processes; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ImageJob"]


@dataclass(frozen=True)
class ImageJob:
    """How images are read.

    Args:
        classes: names of the classes where folders or built-in sets name them; None where the data have numbers.
        image_key, label_key, caption_key: columns of Parquet.
        held_out: how many images are wanted out of training, for built-in sets that choose them themselves.
    """

    classes: tuple[str, ...] | None
    image_key: str
    label_key: str
    caption_key: str
    held_out: int
