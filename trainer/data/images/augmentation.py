"""Image files to squares of pixels, and what is random in that: a function of (seed, sample).

Arrays are (H, W, C) uint8. Only the square that is kept is resized, not the whole of a large photograph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..interleaved.images import decode_image
from .config import ImagesConfig

__all__ = ["CENTER", "View", "decode_file", "draw_view", "fit_view", "sample_generator"]

STREAM = 0x1A6E5
"""Keeps what the data draw for an image apart from what a task draws for it."""


@dataclass(frozen=True)
class View:
    """A square of a picture.

    Args:
        shorter: length of the picture's shorter side once it is resized; None is that of the square.
        top, left: where the square lies, as a share of the room there is: 0 is at the border, 0.5 in the middle.
        flip: mirrored.
    """

    shorter: int | None = None
    top: float = 0.5
    left: float = 0.5
    flip: bool = False


CENTER = View()


def sample_generator(seed: int, sample: int, purpose: int = 0) -> np.random.Generator:
    """What the data draw for a sample of a run: 0 the view, 1 the ratio."""
    entropy = np.random.SeedSequence([seed & (2**64 - 1), sample, STREAM, purpose])
    return np.random.Generator(np.random.Philox(entropy))


def draw_view(config: ImagesConfig, seed: int, sample: int) -> View:
    """The square of a picture that a sample of a run shows."""
    draw = sample_generator(seed, sample)
    low, high = config.resize or (config.size, config.size)
    shorter = int(draw.integers(low, high + 1))
    top, left, mirror = draw.random(3).tolist()
    if config.crop == "center":
        top = left = 0.5
    return View(shorter, top, left, config.flip and mirror < 0.5)


def decode_file(raw: bytes, name: str, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) of an image file, upright; see `interleaved/images.py` for the kinds that are read.

    Raises:
        DataError: not an image, or a damaged one.
    """
    pixels = decode_image(raw, name)
    return _grey(pixels) if channels == 1 else pixels


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Brightness as Pillow's mode L has it."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def fit_view(pixels: NDArray[np.uint8], size: int, view: View = CENTER) -> NDArray[np.uint8]:
    """(size, size, C) of (H, W, C): the picture resized, the square cut out of it, mirrored where that is asked for."""
    from PIL import Image

    height, width, channels = pixels.shape
    shorter = view.shorter or size
    scale = shorter / min(height, width)
    tall, wide = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    top, left = round(view.top * (tall - size)), round(view.left * (wide - size))
    if (tall, wide) == (height, width):
        square = pixels[top : top + size, left : left + size]
    else:
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        ratio_x, ratio_y = width / wide, height / tall
        box = (left * ratio_x, top * ratio_y, (left + size) * ratio_x, (top + size) * ratio_y)
        resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        square = np.asarray(resized).reshape(size, size, channels)
    return np.ascontiguousarray(square[:, ::-1] if view.flip else square)
