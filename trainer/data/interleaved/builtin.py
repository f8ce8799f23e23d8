"""Small real datasets of images, captions and speech that any machine can make, for debug recipes and tests.

    builtin:digits-captions    scikit-learn's 1797 handwritten digits of 8 x 8 pixels; a caption is the digit's name
    builtin:shapes             drawn shapes; a caption is brightness, shape and place
    builtin:spoken-digits      the digit's name, spoken by espeak-ng, and the handwritten digit

Parameters follow the name: builtin:shapes:size=16,images=8000,seed=1. Document i is a function of them and of i.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError, LaunchError
from .config import InterleavedConfig
from .documents import InterleavedDocument, Part

__all__ = [
    "DIGIT_IMAGES",
    "DIGIT_NAMES",
    "INTERLEAVED_BUILTINS",
    "BuiltinDocuments",
    "load_digits",
    "open_builtin",
    "read_parameters",
]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_IMAGES = 1797
BRIGHTNESSES = {"dim": 3, "mid": 5, "bright": 6}
SHAPES = ("disc", "box", "cross", "stripe")
PLACES = ("top left", "top right", "bottom left", "bottom right")
GREYS = 8
"""Levels of brightness a drawn pixel may have; noise adds one."""


class BuiltinDocuments(Protocol):
    """Documents that are made, not read.

    Attributes:
        count: how many there are.
        identity: JSON-able; what their content depends on, versions of libraries included.
    """

    count: int
    identity: dict[str, Any]

    def documents(
        self, start: int, stop: int, config: InterleavedConfig
    ) -> Iterator[InterleavedDocument]:
        """Documents [start, stop)."""

    def files(self) -> dict[str, bytes]:
        """Files to keep beside the dataset, by name, once all documents were made."""


class DigitsWithCaptions:
    """A digit's name and its picture.

    Args:
        pictures: 0 leaves the names alone, the text that a base of these captions learns.
    """

    def __init__(self, images: int = DIGIT_IMAGES, pictures: int = 1) -> None:
        self.count = min(images, DIGIT_IMAGES)
        self._with_pictures = bool(pictures)
        self.identity = {"builtin": "digits-captions", "version": 1, "images": self.count}
        if not pictures:
            self.identity["pictures"] = 0

    def documents(
        self, start: int, stop: int, config: InterleavedConfig
    ) -> Iterator[InterleavedDocument]:
        pictures, labels = load_digits()
        for i in range(start, stop):
            name = f"digit {i}"
            parts = [Part("text", DIGIT_NAMES[labels[i]].encode(), name)]
            if self._with_pictures:
                parts.append(Part("image", pictures[i], name))
            yield InterleavedDocument(name.encode(), tuple(parts))

    def files(self) -> dict[str, bytes]:
        return {}


def load_digits() -> tuple[NDArray[np.uint8], list[int]]:
    """(1797, 8, 8, 1) pictures and what they show.

    Raises:
        LaunchError: scikit-learn is missing.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise LaunchError(
            "builtin digits need the scikit-learn package; install it with: pip install 'weft[images]'"
        ) from error
    found = sklearn.datasets.load_digits()
    pictures = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return pictures[..., None], found.target.tolist()


class ShapesWithCaptions:
    """One shape in a corner: what it is, how bright, and where.

    Args:
        size: pixels a side.
        noise: share of the pixels that are one level brighter.
    """

    def __init__(
        self, size: int = 8, images: int = 4000, seed: int = 0, noise: float = 0.15
    ) -> None:
        if size < 6 or not 0 <= noise <= 1 or images < 1:
            raise DataError(
                f"builtin:shapes: size={size}, images={images}, noise={noise} cannot be drawn; size is at least 6 pixels, "
                "noise a share from 0 to 1"
            )
        self.count, self._size, self._seed, self._noise = images, size, seed, noise
        self.identity = {
            "builtin": "shapes",
            "version": 1,
            "size": size,
            "images": images,
            "seed": seed,
            "noise": noise,
        }

    def documents(
        self, start: int, stop: int, config: InterleavedConfig
    ) -> Iterator[InterleavedDocument]:
        for i in range(start, stop):
            name = f"shape {i}"
            draw = np.random.default_rng([self._seed, i])
            brightness = list(BRIGHTNESSES)[draw.integers(len(BRIGHTNESSES))]
            shape, place = SHAPES[draw.integers(len(SHAPES))], int(draw.integers(len(PLACES)))
            levels = self._draw(shape, place, BRIGHTNESSES[brightness])
            levels += draw.random(levels.shape) < self._noise
            pixels = np.rint(levels * (255 / (GREYS - 1))).astype(np.uint8)[..., None]
            caption = f"{brightness} {shape} {PLACES[place]}"
            yield InterleavedDocument(
                name.encode(),
                (Part("text", caption.encode(), name), Part("image", pixels, name)),
            )

    def _draw(self, shape: str, place: int, level: int) -> NDArray[np.int64]:
        """(size, size) levels of brightness."""
        side = round(self._size * 5 / 8)
        centre = (side - 1) / 2
        y, x = np.mgrid[:side, :side] - centre
        thick = max(1, side // 5)
        inside = {
            "disc": np.hypot(x, y) <= side / 2,
            "box": np.maximum(abs(x), abs(y)) > centre - thick,
            "cross": np.minimum(abs(x), abs(y)) < thick / 2 + 0.01,
            "stripe": np.floor((y + centre) / thick) % 2 == 0,
        }[shape]
        levels = np.zeros((self._size, self._size), np.int64)
        top = 0 if place < 2 else self._size - side
        left = 0 if place % 2 == 0 else self._size - side
        levels[top : top + side, left : left + side] = inside * level
        return levels

    def files(self) -> dict[str, bytes]:
        return {}


class SpokenDigits:
    """A digit's name as text and as speech, and its picture where images are wanted.

    Text comes first in even documents, speech in odd ones. Utterances differ in voice, speed and pitch; several documents
    share one, held-out documents among them.

    Args:
        utterances: of each digit.
    """

    def __init__(self, images: int = DIGIT_IMAGES, utterances: int = 40) -> None:
        from .speech import espeak_version

        self.count = min(images, DIGIT_IMAGES)
        self._utterances = utterances
        self._codebook = b""
        self.identity = {
            "builtin": "spoken-digits",
            "version": 1,
            "images": self.count,
            "utterances": utterances,
            "espeak": espeak_version(),
            "scikit-learn": importlib.metadata.version("scikit-learn"),
        }

    def documents(
        self, start: int, stop: int, config: InterleavedConfig
    ) -> Iterator[InterleavedDocument]:
        from .speech import encode_utterances

        pictures, labels = load_digits()
        spoken, self._codebook = encode_utterances(
            DIGIT_NAMES, self._utterances, config.speech.codes
        )
        has_images = "image" in config.modalities
        for i in range(start, stop):
            name = f"spoken digit {i}"
            text = Part("text", DIGIT_NAMES[labels[i]].encode(), name)
            speech = Part("speech_codes", spoken[labels[i]][i % self._utterances], name)
            image = (Part("image", pictures[i], name),) if has_images else ()
            first = (text, speech) if i % 2 == 0 else (speech, text)
            yield InterleavedDocument(name.encode(), (*first, *image))

    def files(self) -> dict[str, bytes]:
        return {"speech_codebook.npy": self._codebook}


INTERLEAVED_BUILTINS: dict[str, Any] = {
    "digits-captions": DigitsWithCaptions,
    "shapes": ShapesWithCaptions,
    "spoken-digits": SpokenDigits,
}


def open_builtin(path: str) -> BuiltinDocuments:
    """The documents that `builtin:NAME` or `builtin:NAME:key=value,...` names.

    Raises:
        DataError: an unknown name, or a parameter that it has not.
        LaunchError: a program or package it needs is missing.
    """
    name = path.removeprefix("builtin:").partition(":")[0]
    maker = INTERLEAVED_BUILTINS[name]
    return maker(**read_parameters(path, maker))  # type: ignore[no-any-return]


def read_parameters(path: str, maker: Any) -> dict[str, Any]:
    """What stands behind the name in `builtin:NAME:key=value,...`, as the types of the maker's defaults.

    Raises:
        DataError: a parameter that the maker has not, or no number where one belongs.
    """
    name, _, rest = path.removeprefix("builtin:").partition(":")
    known = _parameters(maker)
    given: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise DataError(f"{path}: no parameter {key!r}; {name} has {', '.join(known)}")
        try:
            given[key] = type(known[key])(value)
        except ValueError as error:
            raise DataError(f"{path}: {key} is {value!r}, not a number") from error
    return given


def _parameters(maker: Any) -> dict[str, Any]:
    """Names and defaults of what a maker takes."""
    import inspect

    return {name: item.default for name, item in inspect.signature(maker).parameters.items()}
