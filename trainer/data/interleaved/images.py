"""Pictures as arrays: decoded from files with Pillow, cut to a square, and written as a grid.

Arrays are (H, W, C) uint8 with C 1 (greyscale) or 3 (RGB).
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError, LaunchError

__all__ = ["decode_image", "fit_image", "write_image_grid"]

GRID_COLUMNS = 8
SMALLEST_TILE = 64
"""Pixels a side to which small pictures are enlarged in a grid, so that they can be looked at."""


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise LaunchError(
            "images need the pillow package; install it with: pip install 'weft[images]'"
        ) from error
    return PIL


def decode_image(raw: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image file, turned upright; what is transparent shows white.

    Args:
        name: for messages.

    Raises:
        DataError: not an image, or a damaged one.
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(io.BytesIO(raw)) as image:
            image.load()
            return np.asarray(_to_rgb(pillow, pillow.ImageOps.exif_transpose(image)))
    except (OSError, ValueError, SyntaxError, pillow.Image.DecompressionBombError) as error:
        is_unknown = isinstance(error, pillow.UnidentifiedImageError)
        reason = "no known image format" if is_unknown else str(error).splitlines()[0]
        raise DataError(
            f"{name} is not an image that can be read: {reason}; fetch it again or take its document out"
        ) from error


def _to_rgb(pillow: Any, image: Any) -> Any:
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits a pixel: Pillow's own conversion clips instead of scaling.
        deep = np.asarray(image, np.float64)
        shallow = deep / 257 if deep.max(initial=0) > 255 else deep
        return pillow.Image.fromarray(shallow.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return pillow.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def fit_image(pixels: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """(size, size, channels) of (H, W, C): the middle square, resized.

    Args:
        channels: 1 or 3.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == size and square.shape[2] == channels:
        return square
    pillow = _pillow()
    image = pillow.Image.fromarray(square[:, :, 0] if square.shape[2] == 1 else square)
    image = image.convert("L" if channels == 1 else "RGB")
    if side != size:
        image = image.resize((size, size), pillow.Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels)


def write_image_grid(
    images: NDArray[np.uint8], path: Path, columns: int = GRID_COLUMNS, gap: int = 2
) -> None:
    """Write (N, H, W, C) pictures as one PNG, row by row; small ones are enlarged without smoothing."""
    pillow = _pillow()
    count, height, width, _ = images.shape
    factor = max(1, math.ceil(SMALLEST_TILE / max(height, width)))
    columns = min(columns, max(1, count))
    rows = -(-count // columns)
    tile_height, tile_width = height * factor + gap, width * factor + gap
    sheet = np.full((rows * tile_height + gap, columns * tile_width + gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * tile_height + gap, column * tile_width + gap
        large = image.repeat(factor, axis=0).repeat(factor, axis=1)
        sheet[top : top + height * factor, left : left + width * factor] = large
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.Image.fromarray(sheet).save(path, format="PNG")
