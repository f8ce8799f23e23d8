"""What a prepared dataset says about its images and speech, and whether that fits a run.

modalities   those that occur in it
ids          which ids open, close and spell them (`InterleavedVocabulary.parts`)
image        kind, shape, grid, dtype, codec, statistics of the latents
files        SHA-256 of files kept beside the shards, such as the centres of speech codes
settings     data.interleaved as it was, to open the dataset without a recipe; not part of the fingerprint
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....models.errors import DataError
from ....models.modalities import MODALITIES
from ..vocabulary import open_vocabulary
from .config import InterleavedConfig
from .layout import LatentStatistics
from .vocabulary import InterleavedVocabulary

__all__ = ["check_interleaved", "content_of", "join_records"]


def join_records(
    records: Sequence[Mapping[str, Any]], vocabulary: str, config: InterleavedConfig
) -> dict[str, Any]:
    """The manifest's entry from the records of all units.

    Raises:
        DataError: images of two units differ in shape.
    """
    used = {code for record in records for code in record["modalities"]}
    names = [name for code, name in enumerate(MODALITIES) if code in used or code == 0]
    parts = InterleavedVocabulary(open_vocabulary(vocabulary), config).parts()
    entry: dict[str, Any] = {
        "modalities": names,
        "ids": {name: parts[name] for name in names if name in parts},
        "settings": config.model_dump(mode="json"),
    }
    if "image" in names:
        entry["image"] = _join_images([r["image"] for r in records if r["image"] is not None])
    files = {name: digest for record in records for name, digest in record["files"].items()}
    return entry | ({"files": files} if files else {})


def _join_images(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = images[0]
    for other in images:
        if other["shape"] != first["shape"]:
            raise DataError(
                f"{other['example']} has shape {' x '.join(map(str, other['shape']))}, but {first['example']} has "
                f"{' x '.join(map(str, first['shape']))}; all images of a source need one shape"
            )
    joined = {key: value for key, value in first.items() if key != "example"}
    if first["kind"] == "latents":
        parts = [LatentStatistics.load(i["statistics"]) for i in images if i["statistics"]]
        joined["statistics"] = LatentStatistics.join(parts).dump()
    return joined


def content_of(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of the entry is the dataset's content; not where its codec lay."""
    if entry is None:
        return None
    return {key: value for key, value in entry.items() if key != "settings"}


def check_interleaved(
    name: str,
    entry: Mapping[str, Any],
    vocabulary: InterleavedVocabulary,
    config: InterleavedConfig,
) -> None:
    """See that a run can read a source.

    Raises:
        DataError: another modality, other ids, another kind of image.
    """
    for modality in entry["modalities"]:
        if modality not in config.modalities:
            raise DataError(
                f"source {name!r} has {modality}, but data.interleaved.modalities is [{', '.join(config.modalities)}]; add it"
            )
    image, parts = entry.get("image"), vocabulary.parts()
    if image is not None and image["kind"] != config.image.kind:
        raise DataError(
            f"source {name!r} was prepared with images as {image['kind']} and data.interleaved.image.kind is "
            f"{config.image.kind}; set it to match, or prepare the source again"
        )
    for modality, ids in entry["ids"].items():
        differ = [key for key in ids if ids[key] != parts[modality][key]]
        if differ:
            was = ", ".join(f"{key} {ids[key]}" for key in differ)
            now = ", ".join(f"{key} {parts[modality][key]}" for key in differ)
            raise DataError(
                f"source {name!r} was prepared with other {modality} ids ({was}; the run has {now}); set "
                f"data.interleaved.{modality}.codes and the special ids as they were, or prepare it again"
            )
