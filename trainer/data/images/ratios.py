"""Which ratio a sample is trained at: by complexity, or drawn as a function of (seed, sample)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from .augmentation import sample_generator
from .config import RatiosConfig
from .rows import ImageRows
from .sidecar import MISSING, read_sidecar

__all__ = ["assign_ratios", "ratio_of_sample"]

RATIO_DRAW = 1


def assign_ratios(config: RatiosConfig, sources: Mapping[str, tuple[ImageRows, ...]]) -> str | None:
    """Give every image of some sources the ratio that the scores say.

    Args:
        sources: images by the name of their source.

    Returns:
        The identity of the scores; None where none are needed.

    Raises:
        DataError: no scores, scores of other ratios, or an image without one.
    """
    if not config.needs_scores:
        return None
    if config.scores is None:
        raise DataError(
            "data.images.ratios.scores is not set and the assignment goes by them; make them with: weft data score SOURCE --out DIR, "
            "or set data.images.ratios.assignment=random"
        )
    sidecar = read_sidecar(config.scores)
    if list(config.values) != sidecar.ratios:
        raise DataError(
            f"{config.scores} has scores for ratios {sidecar.ratios} and data.images.ratios.values is {list(config.values)}; set "
            f"data.images.ratios.values={sidecar.ratios}, or score the images again"
        )
    middle = len(config.values) // 2
    for name, parts in sources.items():
        for rows in parts:
            digests = rows.known["sha256"]
            found = np.array([sidecar.places.get(d.tobytes(), MISSING) for d in digests], np.uint8)
            absent = np.flatnonzero(found == MISSING)
            if len(absent) and config.missing == "error":
                raise DataError(
                    f"{len(absent)} of {len(found)} images of source {name!r} have no score in {config.scores}, such as "
                    f"{rows.describe(int(absent[0]))}; score this source (weft data score), or set data.images.ratios.missing=middle"
                )
            found[absent] = middle
            rows.ratios = found
    return sidecar.identity


def ratio_of_sample(
    config: RatiosConfig, scored: Callable[[], int], seed: int | None, sample: int
) -> int:
    """Index of a sample's ratio.

    Args:
        scored: gives the index by complexity.
        seed: of the run; None in evaluation, which draws nothing but for assignment random.
    """
    if config.fixed is not None:
        return config.values.index(config.fixed)
    draw = sample_generator(seed or 0, sample, RATIO_DRAW)
    if config.assignment == "random":
        return _drawn(config, draw)
    own = scored()
    if config.assignment == "scored" or seed is None or draw.random() >= config.mix_share:
        return own
    others = [place for place in range(len(config.values)) if place != own]
    return int(draw.choice(others)) if others else own


def _drawn(config: RatiosConfig, draw: np.random.Generator) -> int:
    shares: NDArray[np.float64] = np.array(config.shares or [1.0] * len(config.values))
    borders = np.cumsum(shares / shares.sum())
    return min(int(np.searchsorted(borders, draw.random(), side="right")), len(borders) - 1)
