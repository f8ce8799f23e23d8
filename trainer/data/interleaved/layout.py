"""What is known of the images of prepared data: their shape, the positions they take, the statistics of their latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from .config import ImageConfig

__all__ = ["ImageLayout", "LatentStatistics", "image_grid", "join_layouts"]

SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class LatentStatistics:
    """Sums over latents, so that parts can be joined.

    Args:
        count: elements.
        total, squares: sums of the elements and of their squares.
        minimum, maximum: the extremes.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def of(cls, values: NDArray[Any]) -> LatentStatistics:
        wide = values.astype(np.float64)
        return cls(
            wide.size,
            float(wide.sum()),
            float(np.square(wide).sum()),
            float(wide.min()),
            float(wide.max()),
        )

    @classmethod
    def join(cls, parts: Iterable[LatentStatistics]) -> LatentStatistics:
        """Of all parts together, the same for any order of them."""
        held = [part for part in parts if part.count]
        return cls(
            sum(part.count for part in held),
            math.fsum(part.total for part in held),
            math.fsum(part.squares for part in held),
            min((part.minimum for part in held), default=math.inf),
            max((part.maximum for part in held), default=-math.inf),
        )

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / max(1, self.count) - self.mean**2))

    def dump(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "squares": self.squares,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> LatentStatistics:
        return cls(*(data[name] for name in ("count", "total", "squares", "minimum", "maximum")))


@dataclass(frozen=True)
class ImageLayout:
    """The images of a run.

    Args:
        kind: `latents` or `codes`.
        shape: (C, H, W) of latents; (h, w) of codes.
        grid: (rows, columns) of the positions of one image.
        codec: identity of what encoded them; None where the data brought latents or codes.
        shift, scale: a model sees (latent - shift) * scale; a decoder gets value / scale + shift.
        minimum, maximum: of latents as a model sees them, to clip what it predicts.
    """

    kind: str
    shape: tuple[int, ...]
    grid: tuple[int, int]
    codec: Mapping[str, Any] | None = None
    shift: float = 0.0
    scale: float = 1.0
    minimum: float = -math.inf
    maximum: float = math.inf

    @property
    def positions(self) -> int:
        """Positions of one image, without those that open and close it."""
        return self.grid[0] * self.grid[1]

    def to_model(self, latents: NDArray[Any]) -> NDArray[np.float32]:
        """Latents as stored to those a model sees, of the same shape."""
        return (latents.astype(np.float32) - np.float32(self.shift)) * np.float32(self.scale)

    def from_model(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """The inverse of `to_model`: what a codec decodes."""
        return values.astype(np.float32) / np.float32(self.scale) + np.float32(self.shift)


def image_grid(kind: str, shape: tuple[int, ...], patch_size: int, name: str) -> tuple[int, int]:
    """(rows, columns) of an image's positions.

    Raises:
        DataError: latents that patches do not divide.
    """
    if kind == "codes":
        return shape[0], shape[1]
    _, height, width = shape
    if height % patch_size or width % patch_size:
        raise DataError(
            f"{name}: latents of {height} x {width} do not divide into patches of {patch_size} x {patch_size}; set "
            "data.interleaved.image.patch_size to a divisor of both, or another image size"
        )
    return height // patch_size, width // patch_size


def join_layouts(found: Mapping[str, Mapping[str, Any]], config: ImageConfig) -> ImageLayout | None:
    """The layout of all sources together; None where none has images.

    Args:
        found: `image` of each source's manifest, by the name of the source.
        config: its scale, shift and clip; None of them is what the latents of all sources measure together.

    Raises:
        DataError: the images of two sources differ in shape or in what encoded them.
    """
    if not found:
        return None
    (first, image), *others = found.items()
    for name, other in others:
        for key in ("kind", "shape", "grid", "codec"):
            if other[key] != image[key]:
                raise DataError(
                    f"images of sources {first!r} and {name!r} differ in {key}: {_short(image[key])} and {_short(other[key])}; "
                    "prepare them with the same codec and size"
                )
    shape, grid = tuple(image["shape"]), (image["grid"][0], image["grid"][1])
    if image["kind"] == "codes":
        return ImageLayout("codes", shape, grid, image["codec"])
    joined = LatentStatistics.join(LatentStatistics.load(i["statistics"]) for i in found.values())
    shift = joined.mean if config.shift is None else config.shift
    scale = 1 / max(joined.std, SMALLEST_STD) if config.scale is None else config.scale
    measured = (joined.minimum - shift) * scale, (joined.maximum - shift) * scale
    return ImageLayout(
        "latents", shape, grid, image["codec"], shift, scale, *(config.clip or measured)
    )


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(part)[:12] for part in value.values())
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
