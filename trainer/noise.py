"""Noise put on text, to see how much a model depends on its usual spelling; imports no torch.

The kinds are those of the Byte Latent Transformer's robustness tests (arXiv 2412.09871, section 6.1), which defines them in a
sentence each. A character is a Unicode code point; a byte that is no UTF-8 counts as one and stays as it is. What is drawn depends
on the seed and the text, and on nothing else: a document gets the same noise in every run, on any rank, in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from ..models.errors import ConfigError

__all__ = ["KINDS", "Noise", "noises"]


@dataclass(frozen=True)
class Noise:
    """One kind of noise; apply it to a document.

    Args:
        kind: one of KINDS.
        level: share of the characters that are touched; `random-case`: that become upper case. None where the kind touches all.
        max_repeats: `repeat`: a chosen character is followed by one to so many copies of itself, each number as likely. (The paper:
            "up to a maximum of four times".)
        seed: of what is drawn.
    """

    kind: str
    level: float | None = None
    max_repeats: int = 4
    seed: int = 0

    def __call__(self, document: bytes) -> bytes:
        """The document with noise."""
        text = document.decode("utf-8", errors="surrogateescape")
        noisy = _FUNCTIONS[self.kind](text, self, _generator(self, document))
        return noisy.encode("utf-8", errors="surrogateescape")

    def as_dict(self) -> dict[str, Any]:
        """What matters to this kind; JSON-able."""
        found = asdict(self)
        if self.kind != "repeat":
            del found["max_repeats"]
        return found


def noises(
    kind: str, level: float | None = None, *, max_repeats: int = 4, seed: int = 0
) -> list[Noise]:
    """The noise of a name, or of every name for `all`.

    Args:
        level: None is the paper's.

    Raises:
        ConfigError: an unknown kind, a level for `all` or for a kind that has none, or one outside [0, 1].
    """
    names = list(KINDS) if kind == "all" else [kind]
    if kind not in (*KINDS, "all"):
        raise ConfigError(f"there is no noise {kind!r}; there is all, {', '.join(KINDS)}")
    if level is not None and (kind == "all" or KINDS[kind] is None):
        levelled = ", ".join(name for name, usual in KINDS.items() if usual is not None)
        raise ConfigError(f"noise {kind} takes no level, found {level}; these do: {levelled}")
    if level is not None and not 0 <= level <= 1:
        raise ConfigError(f"the noise level is {level}, expected a share of the characters, 0 to 1")
    return [
        Noise(name, KINDS[name] if level is None else level, max_repeats, seed) for name in names
    ]


def _generator(noise: Noise, document: bytes) -> Generator:
    digest = hashlib.sha256(f"{noise.seed} {noise.kind} ".encode() + document).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _drop(text: str, noise: Noise, random: Generator) -> str:
    keeps = random.random(len(text)) >= (noise.level or 0.0)
    return "".join(c for c, is_kept in zip(text, keeps.tolist(), strict=True) if is_kept)


def _repeat(text: str, noise: Noise, random: Generator) -> str:
    chosen = random.random(len(text)) < (noise.level or 0.0)
    # One more number for every character, chosen or not: what one gets does not depend on the others.
    copies = 1 + np.floor(random.random(len(text)) * noise.max_repeats).astype(np.int64)
    counts = np.where(chosen, 1 + copies, 1)
    return "".join(c * n for c, n in zip(text, counts.tolist(), strict=True))


def _random_case(text: str, noise: Noise, random: Generator) -> str:
    is_upper = random.random(len(text)) < (noise.level or 0.0)
    return "".join(
        c.upper() if up else c.lower() for c, up in zip(text, is_upper.tolist(), strict=True)
    )


def _upper(text: str, noise: Noise, random: Generator) -> str:
    return text.upper()


def _antspeak(text: str, noise: Noise, random: Generator) -> str:
    return " ".join(text.upper())


_FUNCTIONS: dict[str, Callable[[str, Noise, Generator], str]] = {
    "drop": _drop,
    "repeat": _repeat,
    "upper": _upper,
    "random-case": _random_case,
    "antspeak": _antspeak,
}
KINDS: dict[str, float | None] = {
    "drop": 0.1,
    "repeat": 0.2,
    "upper": None,
    "random-case": 0.5,
    "antspeak": None,
}
"""Level of each in the paper; None where every character is touched."""
