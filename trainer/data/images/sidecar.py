"""Complexity of a source's images beside it: scores, the ratio each one leads to, and who said so.

    DIR/shard_00000.scores   a JSON line an image: id, sha256, score, ratio, and score_missing where nothing could be said
    DIR/manifest.json        scorer with its version and settings, thresholds, shares, T; lands last

Thresholds are quantiles of a calibration sample: those images whose SHA-256 is smallest. They are stored and used for every
image, so that an image's ratio depends on no other's but for those of the sample. Mean tokens T are relative to the middle ratio.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import ConfigError, DataError
from ...files import write_json
from ..hashed_file import write_hashed

__all__ = [
    "MISSING",
    "Score",
    "Sidecar",
    "Thresholds",
    "fit_thresholds",
    "mean_tokens",
    "read_sidecar",
    "shares_for",
    "write_sidecar",
]

FORMAT = "weft-scores"
VERSION = 1
MISSING = 255
"""Stands for no score where ratios are held as numbers."""


@dataclass(frozen=True)
class Score:
    """One image's complexity; larger is more complex.

    Args:
        id: the image's name in its source.
        sha256: of its file, hexadecimal.
        score: None where the scorer could not say.
    """

    id: str
    sha256: str
    score: float | None


@dataclass(frozen=True)
class Thresholds:
    """Where ratios change: n - 1 ascending scores for n ratios, finest first.

    A score up to the first of them leads to the coarsest ratio, up to the second to the one before, and so on.
    """

    borders: tuple[float, ...]

    def place_of(self, score: float | None) -> int:
        """Index of the ratio, 0 the finest; the middle one where there is no score."""
        count = len(self.borders)
        if score is None:
            return (count + 1) // 2
        return count - int(np.searchsorted(self.borders, score, side="left"))


def mean_tokens(ratios: Sequence[int], shares: Sequence[float]) -> float:
    """T: tokens of a mean image, relative to one at the middle ratio."""
    middle = ratios[len(ratios) // 2]
    return float(sum(share * (middle / r) ** 2 for r, share in zip(ratios, shares, strict=True)))


def shares_for(ratios: Sequence[int], tokens: float, finest_share: float) -> tuple[float, ...]:
    """Shares of three ratios, finest first, that give so many mean tokens.

    Raises:
        ConfigError: no shares do.
    """
    if len(ratios) != 3:
        raise ConfigError(
            f"a wanted T fixes the shares of three ratios, not of {len(ratios)}; give --shares"
        )
    fine, _, coarse = ((ratios[1] / r) ** 2 for r in ratios)
    last = (1 + finest_share * (fine - 1) - tokens) / (1 - coarse)
    if last < -1e-9 or finest_share + last > 1 + 1e-9:
        least = max(0.0, (tokens - 1) / (fine - 1))
        most = max(0.0, (tokens - coarse) / (fine - coarse))
        raise ConfigError(
            f"T={tokens:g} cannot be had with a share of {finest_share:g} at ratio {ratios[0]}; set --finest-share between "
            f"{least:.3g} and {most:.3g}"
        )
    last = min(max(last, 0.0), 1 - finest_share)
    return finest_share, 1 - finest_share - last, last


def fit_thresholds(scores: NDArray[np.float64], shares: Sequence[float]) -> Thresholds:
    """Quantiles of a calibration sample (N,) that give these shares, finest first."""
    ordered = np.sort(scores)
    upto = np.cumsum(np.array(shares)[::-1])[:-1]
    places = np.ceil(upto * len(ordered) - 1e-9).astype(int) - 1
    borders = [float(ordered[place]) if place >= 0 else -np.inf for place in places]
    return Thresholds(tuple(borders))


@dataclass(frozen=True)
class Sidecar:
    """Scores of a source, open.

    Args:
        ratios: finest first.
        places: index of the ratio by the SHA-256 of the image's file.
        identity: hash of all of it.
        manifest: as it is written.
    """

    ratios: list[int]
    places: Mapping[bytes, int]
    identity: str
    manifest: Mapping[str, Any]


def write_sidecar(
    folder: Path,
    shards: Sequence[Sequence[Score]],
    ratios: Sequence[int],
    thresholds: Thresholds,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the scores of all shards, and the manifest last.

    Args:
        about: the scorer's identity and whatever else belongs into the manifest.

    Returns:
        The manifest.
    """
    counts, missing, files = [0] * len(ratios), 0, {}
    scorer = about["scorer"]
    for number, scores in enumerate(shards):
        lines = []
        for item in scores:
            place = thresholds.place_of(item.score)
            counts[place] += 1
            record = {**asdict(item), "ratio": ratios[place], "scorer": scorer["name"]}
            record["version"] = scorer["version"]
            if "prompt_sha256" in scorer:
                record["prompt_hash"] = scorer["prompt_sha256"]
            if item.score is None:
                missing += 1
                record["score_missing"] = True
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        name = f"shard_{number:05d}.scores"
        files[name] = write_hashed(folder / name, "".join(lines).encode())
    total = max(1, sum(counts))
    shares = [count / total for count in counts]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "ratios": list(ratios),
        "thresholds": list(thresholds.borders),
        "shares": shares,
        "mean_tokens": mean_tokens(ratios, shares),
        "images": sum(counts),
        "score_missing": missing,
        "files": files,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_sidecar(folder: str | Path) -> Sidecar:
    """Open scores and check them against their checksums.

    Raises:
        DataError: none there, or they changed.
    """
    path = Path(folder).expanduser().absolute()
    return _read(path, _modified(path))


def _modified(path: Path) -> int:
    manifest = path / "manifest.json"
    return manifest.stat().st_mtime_ns if manifest.is_file() else 0


@lru_cache(maxsize=2)
def _read(path: Path, modified: int) -> Sidecar:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} holds no scores; make them with: weft data score SOURCE --out {path}"
        ) from error
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise DataError(
            f"{path / 'manifest.json'} is not a {FORMAT} manifest of version {VERSION}; score again"
        )
    ratios = [int(ratio) for ratio in manifest["ratios"]]
    place = {ratio: number for number, ratio in enumerate(ratios)}
    places: dict[bytes, int] = {}
    for name, digest in manifest["files"].items():
        raw = (path / name).read_bytes() if (path / name).is_file() else b""
        if hashlib.sha256(raw).hexdigest() != digest:
            raise DataError(f"{path / name} does not match its checksum; restore it or score again")
        for line in raw.splitlines():
            record = json.loads(line)
            places[bytes.fromhex(record["sha256"])] = place[record["ratio"]]
    parts = [manifest["files"], manifest["thresholds"], ratios]
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Sidecar(ratios, places, identity, manifest)
