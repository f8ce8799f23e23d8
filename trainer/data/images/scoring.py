"""Scores all images of a prepared source: a job that goes on where it stopped, by any number of processes.

A unit of work is a shard of the source. Its scores are kept beside the result until all are there; then thresholds are taken
from the calibration sample, and scores and ratios are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....models.errors import ConfigError, DataError
from ...files import write_text
from ..shards import Manifest, read_manifest
from .rows import ImageRows, all_rows
from .scorers import Picture, Scorer
from .sidecar import Score, Thresholds, fit_thresholds, mean_tokens, write_sidecar

__all__ = ["ScoreOptions", "finish_scores", "score_shards"]

LARGEST_MISSING_SHARE = 0.01


@dataclass(frozen=True)
class ScoreOptions:
    """What scores lead to.

    Args:
        ratios: finest first.
        shares: of each ratio in the calibration sample; None with `borders`.
        borders: thresholds as they are given, ascending.
        calibration: images of the sample: those whose SHA-256 is smallest.
    """

    ratios: tuple[int, ...]
    shares: tuple[float, ...] | None
    borders: tuple[float, ...] | None
    calibration: int

    def __post_init__(self) -> None:
        given = self.shares if self.shares is not None else (*(self.borders or ()), None)
        if len(given) != len(self.ratios):
            raise ConfigError(
                f"{len(self.ratios)} ratios need {len(self.ratios)} shares or {len(self.ratios) - 1} thresholds"
            )
        if self.shares is not None and (min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise ConfigError(f"shares {list(self.shares)} are not shares that sum to 1")
        if self.borders is not None and list(self.borders) != sorted(self.borders):
            raise ConfigError(f"thresholds {list(self.borders)} are not ascending")


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.scoring")


def score_shards(
    scorer: Scorer,
    source: Path,
    out: Path,
    *,
    part: tuple[int, int] = (0, 1),
    threads: int = 1,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Score the shards of a part of the work that are not scored yet.

    Args:
        part: (k, n): shards k, k + n, k + 2n, and so on.
        threads: of scorers that decode pictures.
        advance: called with a number of images once they are scored.

    Raises:
        DataError: no images there, or `out` holds something else.
    """
    manifest = _images_of(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists; give another --out, or remove it to score again")
    rows = all_rows("source", source, manifest)
    key, work = _key(scorer, manifest), _work(out)
    work.mkdir(parents=True, exist_ok=True)
    for shard in range(part[0], len(manifest.shards), part[1]):
        path = work / f"{key}_{shard:05d}.json"
        if path.is_file():
            advance(manifest.shards[shard].documents)
            continue
        pictures = _pictures(rows, manifest, source, shard)
        found = _score_all(scorer, pictures, threads, advance)
        write_text(path, json.dumps([asdict(score) for score in found]))


def _images_of(source: Path) -> Manifest:
    manifest = read_manifest(source)
    if manifest.images is None:
        raise DataError(f"{source} is a dataset of documents, not of images; name one of images")
    return manifest


def _key(scorer: Scorer, manifest: Manifest) -> str:
    parts = json.dumps([scorer.identity, manifest.fingerprint], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _pictures(
    rows: ImageRows, manifest: Manifest, source: Path, shard: int
) -> list[Callable[[], Picture]]:
    """The images of a shard, each read when it is called for."""
    first = sum(item.documents for item in manifest.shards[:shard])
    names = manifest.shards[shard].read_names(source)

    def read(place: int) -> Picture:
        return Picture(names[place][0], rows[first + place].raw, names[place][1])

    return [lambda place=place: read(place) for place in range(len(names))]  # type: ignore[misc]


def _score_all(
    scorer: Scorer,
    pictures: Sequence[Callable[[], Picture]],
    threads: int,
    advance: Callable[[int], None],
) -> list[Score]:
    size = scorer.at_once

    def score(first: int) -> list[Score]:
        some = [read() for read in pictures[first : first + size]]
        values = scorer.score(some)
        advance(len(some))
        return [
            Score(picture.id, hashlib.sha256(picture.raw).hexdigest(), value)
            for picture, value in zip(some, values, strict=True)
        ]

    firsts = range(0, len(pictures), size)
    if threads == 1:
        return [item for first in firsts for item in score(first)]
    with ThreadPoolExecutor(threads, "weft-score") as pool:
        return [item for part in pool.map(score, firsts) for item in part]


def finish_scores(
    scorer: Scorer, source: Path, out: Path, options: ScoreOptions
) -> dict[str, Any] | None:
    """Write thresholds, scores and ratios where all shards are scored.

    Returns:
        The manifest; None where shards are missing.

    Raises:
        DataError: more than 1 % of the images have no score, or none has.
    """
    manifest = _images_of(source)
    key, work = _key(scorer, manifest), _work(out)
    paths = [work / f"{key}_{shard:05d}.json" for shard in range(len(manifest.shards))]
    if not all(path.is_file() for path in paths):
        return None
    shards = [[Score(**item) for item in json.loads(path.read_bytes())] for path in paths]
    _check_missing(shards)
    thresholds, sample = _thresholds(shards, options)
    about = {
        "scorer": scorer.identity,
        "data": manifest.fingerprint,
        "calibration": {
            "images": sample,
            "shares": list(options.shares) if options.shares else None,
            "mean_tokens": mean_tokens(options.ratios, options.shares) if options.shares else None,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    made = write_sidecar(out, shards, options.ratios, thresholds, about)
    for path in work.iterdir():
        path.unlink(missing_ok=True)
    work.rmdir()
    return made


def _check_missing(shards: Sequence[Sequence[Score]]) -> None:
    scores = [score for shard in shards for score in shard]
    missing = [score for score in scores if score.score is None]
    if len(missing) > LARGEST_MISSING_SHARE * len(scores):
        raise DataError(
            f"{len(missing)} of {len(scores)} images have no score, more than {LARGEST_MISSING_SHARE:.0%}; the first is "
            f"{missing[0].id}; use a model that answers with one integer, or --scorer proxy"
        )


def _thresholds(shards: Sequence[Sequence[Score]], options: ScoreOptions) -> tuple[Thresholds, int]:
    """Thresholds, and the images they were taken of."""
    if options.borders is not None:
        return Thresholds(options.borders), 0
    assert options.shares is not None
    known = {s.sha256: s.score for shard in shards for s in shard if s.score is not None}
    chosen = sorted(known)[: options.calibration]
    values = np.array([known[digest] for digest in chosen], np.float64)
    return fit_thresholds(values, options.shares), len(chosen)
