"""Small labelled image sets that any machine can make, for debug recipes and tests.

    builtin:digits          scikit-learn's 1797 handwritten digits: 10 classes, greyscale, 8 or 16 pixels a side
    builtin:photos          crops of scikit-learn's two photographs; those held out lie in the right third of each
    builtin:shapes-images   drawn; set=shapes: a gradient with a circle, square or triangle; set=levels: pictures of three
                            degrees of complexity

Parameters follow the name: builtin:photos:size=64,images=2000,seed=1. Image i is a function of them and of i, but for the
photographs, where the first ones are those held out.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError, LaunchError
from ..interleaved.builtin import DIGIT_IMAGES, DIGIT_NAMES, load_digits, read_parameters

__all__ = [
    "IMAGE_BUILTINS",
    "BuiltinImages",
    "MadeImage",
    "load_photographs",
    "open_image_builtin",
    "to_png",
]

LARGEST_HELD_OUT_SHARE = 10


class MadeImage(NamedTuple):
    """A picture, its class, what it shows in words, and whether it may be held out."""

    name: str
    pixels: NDArray[np.uint8]
    label: int
    caption: str
    may_be_held_out: bool = True


class BuiltinImages(Protocol):
    """Pictures that are made, not read.

    Attributes:
        count: how many there are.
        classes: names of the classes.
        identity: JSON-able; what their content depends on.
    """

    count: int
    classes: tuple[str, ...]
    identity: dict[str, Any]

    def images(self, start: int, stop: int, held_out: int) -> Iterator[MadeImage]:
        """Images [start, stop).

        Args:
            held_out: how many are wanted out of training.
        """


class Digits:
    """Handwritten digits."""

    classes = DIGIT_NAMES

    def __init__(self, size: int = 8, images: int = DIGIT_IMAGES) -> None:
        if size not in (8, 16):
            raise DataError(f"builtin:digits: size={size}; there are 8 and 16 pixels a side")
        self.count, self._size = min(images, DIGIT_IMAGES), size
        self.identity = {"builtin": "digits", "version": 1, "images": self.count, "size": size}

    def images(self, start: int, stop: int, held_out: int) -> Iterator[MadeImage]:
        from PIL import Image

        pictures, labels = load_digits()
        for i in range(start, stop):
            pixels = pictures[i]
            if self._size != 8:
                image = Image.fromarray(pixels[:, :, 0])
                larger = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
                pixels = np.asarray(larger)[:, :, None]
            yield MadeImage(f"digit-{i}", pixels, labels[i], DIGIT_NAMES[labels[i]])


class Photos:
    """Crops of a Chinese temple and of a flower; the classes are the photographs."""

    classes = ("china", "flower")

    def __init__(self, size: int = 64, images: int = 2000, seed: int = 0) -> None:
        if not 1 <= size <= 200 or images < 1:
            raise DataError(
                f"builtin:photos: size={size}, images={images} cannot be cut out; size is 1 to 200 pixels"
            )
        self.count, self._size, self._seed = images, size, seed
        self.identity = {
            "builtin": "photos",
            "version": 1,
            "size": size,
            "images": images,
            "seed": seed,
            "scikit-learn": importlib.metadata.version("scikit-learn"),
        }

    def images(self, start: int, stop: int, held_out: int) -> Iterator[MadeImage]:
        photographs = load_photographs()
        kept = min(held_out, self.count // LARGEST_HELD_OUT_SHARE)
        for i in range(start, stop):
            label, draw = i % 2, np.random.default_rng([self._seed, i])
            photograph = photographs[label]
            height, width = photograph.shape[:2]
            border, is_kept = width * 2 // 3, i < kept
            first, last = (border, width) if is_kept else (0, border)
            top = int(draw.integers(height - self._size + 1))
            left = int(draw.integers(first, last - self._size + 1))
            pixels = photograph[top : top + self._size, left : left + self._size]
            name = f"{self.classes[label]}-{top}-{left}"
            caption = f"a crop of a photograph of {self.classes[label]}"
            yield MadeImage(name, pixels, label, caption, is_kept)


def load_photographs() -> list[NDArray[np.uint8]]:
    """(427, 640, 3) each: china.jpg and flower.jpg of scikit-learn.

    Raises:
        LaunchError: scikit-learn is missing.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise LaunchError(
            "builtin:photos needs the scikit-learn package; install it with: pip install 'weft[images]'"
        ) from error
    return [np.asarray(sklearn.datasets.load_sample_image(f"{n}.jpg")) for n in Photos.classes]


class ShapesImages:
    """Drawn pictures.

    set=shapes: a colour gradient, `complexity` shapes and noise; the class is the shape drawn last (circle, square, triangle).
    set=levels: a colour gradient (class 0), 6 x `complexity` rectangles on it (1), a grid of small glyphs (2), with the
    shares that `gradients`, `rectangles` and `glyphs` have.

    Args:
        size: pixels a side.
        noise: of set=shapes: standard deviation, where black is 0 and white is 1.
    """

    SETS: ClassVar = {
        "shapes": ("circle", "square", "triangle"),
        "levels": ("gradient", "rectangles", "glyphs"),
    }

    def __init__(
        self,
        set: str = "shapes",
        size: int = 32,
        images: int = 4000,
        seed: int = 0,
        complexity: float = 1.0,
        noise: float = 0.03,
        gradients: float = 1.0,
        rectangles: float = 1.0,
        glyphs: float = 1.0,
    ) -> None:
        shares = np.array([gradients, rectangles, glyphs])
        if set not in self.SETS:
            raise DataError(f"builtin:shapes-images: set={set}; there is {', '.join(self.SETS)}")
        if size < 16 or images < 1 or complexity < 0 or noise < 0 or shares.min() < 0:
            raise DataError(
                f"builtin:shapes-images: size={size}, images={images}, complexity={complexity}, noise={noise} cannot be drawn; "
                "size is at least 16 pixels, the others are not negative"
            )
        if shares.sum() == 0:
            raise DataError("builtin:shapes-images: gradients, rectangles and glyphs are all 0")
        self.count, self._size, self._seed, self._set = images, size, seed, set
        self._complexity, self._noise = complexity, noise
        self._shares = np.cumsum(shares / shares.sum())
        self.classes = self.SETS[set]
        own = {"noise": noise} if set == "shapes" else {"shares": shares.tolist()}
        self.identity = {
            "builtin": "shapes-images",
            "version": 1,
            "set": set,
            "size": size,
            "images": images,
            "seed": seed,
            "complexity": complexity,
            **own,
        }

    def images(self, start: int, stop: int, held_out: int) -> Iterator[MadeImage]:
        for i in range(start, stop):
            draw = np.random.default_rng([self._seed, i])
            picture, label = (self._shapes if self._set == "shapes" else self._levels)(draw)
            pixels = np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
            yield MadeImage(f"shape-{i}", pixels, label, f"a drawn {self.classes[label]}")

    def _gradient(self, draw: np.random.Generator) -> NDArray[np.float64]:
        """(size, size, 3) from one colour to another."""
        first, last = draw.random((2, 3))
        angle = draw.uniform(0, 2 * np.pi)
        y, x = np.mgrid[: self._size, : self._size] / (self._size - 1) - 0.5
        along = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2) + 0.5
        found: NDArray[np.float64] = first + along[..., None] * (last - first)
        return found

    def _shapes(self, draw: np.random.Generator) -> tuple[NDArray[np.float64], int]:
        picture, label = self._gradient(draw), 0
        for _ in range(max(1, round(self._complexity))):
            label = int(draw.integers(3))
            radius = draw.uniform(0.15, 0.3) * self._size
            cy, cx = draw.uniform(radius, self._size - radius, 2)
            y, x = np.mgrid[: self._size, : self._size] - np.array([cy, cx])[:, None, None]
            inside = (
                np.hypot(x, y) <= radius,
                np.maximum(abs(x), abs(y)) <= radius * 0.85,
                (y <= radius * 0.7) & (y >= 2 * abs(x) - radius),
            )[label]
            picture[inside] = draw.random(3)
        return picture + draw.normal(0, self._noise, picture.shape), label

    def _levels(self, draw: np.random.Generator) -> tuple[NDArray[np.float64], int]:
        label = int(np.searchsorted(self._shares, draw.random(), side="right"))
        picture = self._gradient(draw)
        if label == 1:
            for _ in range(round(6 * self._complexity)):
                height, width = draw.integers(4, 12, 2)
                top = int(draw.integers(self._size - height + 1))
                left = int(draw.integers(self._size - width + 1))
                picture[top : top + height, left : left + width] = draw.random(3)
        if label == 2:
            dark, light = draw.random(3) * 0.4, 0.6 + draw.random(3) * 0.4
            side = -(-self._size // 4)
            alphabet = np.random.default_rng(4).random((16, 4, 4)) < 0.5
            glyphs = alphabet[draw.integers(16, size=(side, side))]
            on = glyphs.transpose(0, 2, 1, 3).reshape(side * 4, side * 4)
            picture = np.where(on[: self._size, : self._size, None], light, dark)
        return picture, label


IMAGE_BUILTINS: dict[str, Any] = {
    "digits": Digits,
    "photos": Photos,
    "shapes-images": ShapesImages,
}


def open_image_builtin(path: str) -> BuiltinImages:
    """The images that `builtin:NAME` or `builtin:NAME:key=value,...` names.

    Raises:
        DataError: an unknown name, or a parameter that it has not.
    """
    name = path.removeprefix("builtin:").partition(":")[0]
    if name not in IMAGE_BUILTINS:
        raise DataError(
            f"no built-in images {name!r}; there is {', '.join(IMAGE_BUILTINS)} (text and captions need data.images=null)"
        )
    maker = IMAGE_BUILTINS[name]
    made: BuiltinImages = maker(**read_parameters(path, maker))
    return made


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W, 1 or 3) as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(stream, format="PNG")
    return stream.getvalue()
