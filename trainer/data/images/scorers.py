"""How complex a picture is, without a language model: bytes of its JPEG, and what is left when blocks are averaged.

Both follow detail, not what people look at: small faces and letters score low, foliage high. They need nothing and are what
training starts from; a trained tokenizer's own gain ranks better (`gain`), and a language model reads captions (`llm_scorer.py`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ....models.errors import ConfigError
from .augmentation import decode_file

__all__ = ["JPEGScorer", "Picture", "ResidualScorer", "Scorer", "open_proxy", "residual"]

WORKING_SIZE = 256
QUALITY = 75


class Picture(NamedTuple):
    """An image to score: its name in the source, its file, and what it shows in words."""

    id: str
    raw: bytes
    caption: str | None


class Scorer(Protocol):
    """Says how complex images are.

    Attributes:
        at_once: images it wants together.
    """

    at_once: int

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able: `name`, `version`, and all settings that change a score."""

    def score(self, pictures: Sequence[Picture]) -> list[float | None]:
        """One score each, larger is more complex; None where nothing can be said."""


def _working_pixels(picture: Picture, size: int) -> NDArray[np.uint8]:
    """(H, W, 3), the shorter side of `size` pixels: without one size for all, resolution would decide."""
    from PIL import Image

    pixels = decode_file(picture.raw, picture.id, 3)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    if scale == 1:
        return pixels
    shape = max(size, round(width * scale)), max(size, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC))


class JPEGScorer:
    """Bits a pixel of the picture as JPEG, less those of a flat one, which are its header.

    Args:
        size: pixels of the shorter side that all pictures are brought to.
    """

    at_once = 16

    def __init__(self, size: int = WORKING_SIZE) -> None:
        self._size = size

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "proxy", "version": 1, "size": self._size, "quality": QUALITY}

    def score(self, pictures: Sequence[Picture]) -> list[float | None]:
        return [jpeg_bits(_working_pixels(picture, self._size)) for picture in pictures]


def jpeg_bits(pixels: NDArray[np.uint8]) -> float:
    """Bits a pixel above a flat picture's of (H, W, 3)."""
    height, width = pixels.shape[:2]
    own = _jpeg_bytes(pixels) - _flat_bytes(height, width)
    return max(0.0, 8 * own / (height * width))


def _jpeg_bytes(pixels: NDArray[np.uint8]) -> int:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=QUALITY, subsampling="4:2:0")
    return stream.tell()


@lru_cache(maxsize=256)
def _flat_bytes(height: int, width: int) -> int:
    return _jpeg_bytes(np.full((height, width, 3), 128, np.uint8))


class ResidualScorer:
    """Mean squared difference, in values from -1 to 1, between the picture and its blocks' means.

    Args:
        block: pixels a side of a block.
        size: pixels of the shorter side that all pictures are brought to.
    """

    at_once = 16

    def __init__(self, block: int, size: int = WORKING_SIZE) -> None:
        self._block, self._size = block, size

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "residual", "version": 1, "size": self._size, "block": self._block}

    def score(self, pictures: Sequence[Picture]) -> list[float | None]:
        return [residual(_working_pixels(p, self._size), self._block) for p in pictures]


def residual(pixels: NDArray[np.uint8], block: int) -> float:
    """Of (H, W, C); what is left over of the last blocks is not counted."""
    height, width = (side // block * block for side in pixels.shape[:2])
    values = pixels[:height, :width].astype(np.float64) / 127.5 - 1
    blocks = values.reshape(height // block, block, width // block, block, -1)
    return float(np.square(blocks - blocks.mean(axis=(1, 3), keepdims=True)).mean())


def open_proxy(name: str, size: int, block: int) -> Scorer:
    """The scorer of this name.

    Raises:
        ConfigError: unknown, or blocks larger than pictures.
    """
    if name == "proxy":
        return JPEGScorer(size)
    if name != "residual" or block > size:
        raise ConfigError(f"no scorer {name!r} with blocks of {block} at {size} pixels")
    return ResidualScorer(block, size)
