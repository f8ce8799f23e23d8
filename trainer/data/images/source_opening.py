"""Opens the sources of an image run: prepared pictures, or what a tokenizer made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....models.errors import DataError
from ..shards import Manifest, read_manifest
from .config import ImagesConfig, RatiosConfig
from .encoded_format import EncodePlan, is_encoded, part_name, read_encoded
from .encoded_rows import (
    CodeAssembler,
    EncodedRows,
    MomentAssembler,
    open_encoded_rows,
    settle_ratios,
)
from .packing import PixelAssembler
from .ratios import assign_ratios
from .rows import ImageRows, check_classes, open_rows

__all__ = ["ImageData", "OpenedImages", "check_tokenizer", "folder_fingerprint", "open_images"]

Assembler = PixelAssembler | CodeAssembler | MomentAssembler


@dataclass(frozen=True)
class OpenedImages:
    """A source's images to train on and those held out, and what is known of it as of any prepared data."""

    manifest: Manifest
    train: ImageRows | EncodedRows
    held_out: ImageRows | EncodedRows


@dataclass(frozen=True)
class ImageData:
    """What the images of all sources of a run have in common.

    Args:
        classes: how many; 0 where images have none.
        scores: identity of the scores that ratios go by.
        plan: how encoded images were made; None of pictures.
        shapes: of encoded images, by name of the array.
        statistics: of latents by ratio: `mean` and `std` of each channel, and `images`.
        ratios: how they are assigned.
    """

    classes: int
    scores: str | None = None
    plan: EncodePlan | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    statistics: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    ratios: RatiosConfig | None = None

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer that encoded the images."""
        return self.plan.tokenizer["fingerprint"] if self.plan else None

    def assembler(self, config: ImagesConfig, seed: int | None) -> Assembler:
        """What packs rows: with a seed for training, without one for evaluation."""
        if self.plan is None:
            return PixelAssembler(config, seed)
        if self.plan.kind == "codes":
            return CodeAssembler(config, seed)
        assert self.ratios is not None
        shapes = {ratio: self.shapes[part_name(ratio)] for ratio in self.plan.ratios}
        return MomentAssembler(config, self.ratios, shapes, seed)


def folder_fingerprint(folder: Path) -> str:
    """Of prepared pictures or encoded images."""
    if is_encoded(folder):
        return str(read_encoded(folder)[1]["fingerprint"])
    return read_manifest(folder).fingerprint


def open_images(
    config: ImagesConfig, sequence_length: int, folders: Mapping[str, Path]
) -> tuple[dict[str, OpenedImages], ImageData]:
    """Open all sources of a run.

    Args:
        sequence_length: data.sequence_length.
        folders: prepared or encoded, by the name of the source.

    Raises:
        DataError: a source of another kind or tokenizer, or whatever else does not fit.
    """
    if config.kind == "pixels":
        return _open_pixels(config, folders)
    return _open_encoded(config, sequence_length, folders)


def _open_pixels(
    config: ImagesConfig, folders: Mapping[str, Path]
) -> tuple[dict[str, OpenedImages], ImageData]:
    found: dict[str, OpenedImages] = {}
    rows: dict[str, tuple[ImageRows, ...]] = {}
    for name, folder in folders.items():
        if is_encoded(folder):
            raise DataError(
                f"source {name!r}: {folder} holds encoded images and data.images.kind is pixels; set it to codes or latents"
            )
        manifest = read_manifest(folder)
        rows[name] = open_rows(name, folder, manifest)
        _check_smallest(config, name, manifest)
        found[name] = OpenedImages(manifest, *rows[name])
    classes = _classes(config, {name: item.manifest for name, item in found.items()})
    scores = assign_ratios(config.ratios, rows) if config.ratios else None
    return found, ImageData(classes, scores, ratios=config.ratios)


def _classes(config: ImagesConfig, manifests: Mapping[str, Manifest]) -> int:
    counts = [(manifest.images or {})["class_counts"] for manifest in manifests.values()]
    return check_classes(counts, list(manifests), config.classes, config.allow_empty_classes)


def _check_smallest(config: ImagesConfig, name: str, manifest: Manifest) -> None:
    if config.ratios is None or manifest.images is None:
        return
    height, width, image = manifest.images["smallest"]
    coarsest = config.ratios.values[-1]
    if min(height, width) < coarsest:
        raise DataError(
            f"source {name!r}: {image} has {width} x {height} pixels, fewer than the coarsest ratio {coarsest} takes; remove such "
            "images, or leave that ratio out of data.images.ratios.values"
        )


def _open_encoded(
    config: ImagesConfig, sequence_length: int, folders: Mapping[str, Path]
) -> tuple[dict[str, OpenedImages], ImageData]:
    found: dict[str, OpenedImages] = {}
    first: tuple[str, EncodePlan, dict[str, Any]] | None = None
    for name, folder in folders.items():
        if not is_encoded(folder):
            raise DataError(
                f"source {name!r}: {folder} holds no encoded images and data.images.kind is {config.kind}; make them with: weft "
                "data encode RUN SOURCE --out DIR"
            )
        plan, manifest = read_encoded(folder)
        wanted = "codes" if config.kind == "codes" else "moments"
        if plan.kind != wanted:
            raise DataError(
                f"source {name!r}: {folder} holds {plan.kind} and data.images.kind is {config.kind}; set it to "
                f"{'codes' if plan.kind == 'codes' else 'latents'}"
            )
        check_tokenizer(config.tokenizer, plan.tokenizer["fingerprint"], f"source {name!r}")
        first = first or (name, plan, manifest)
        _check_same(first, (name, plan, manifest))
        _check_length(name, manifest, sequence_length, plan.kind)
        made = _as_manifest(plan, manifest)
        found[name] = OpenedImages(made, *open_encoded_rows(name, folder, plan, manifest))
    assert first is not None
    name, plan, manifest = first
    classes = _classes(config, {name: item.manifest for name, item in found.items()})
    ratios = settle_ratios(config, plan, name) if plan.kind == "moments" else None
    statistics = _join_statistics([item.manifest.images or {} for item in found.values()])
    shapes = manifest["shapes"]
    return found, ImageData(classes, plan.scores, plan, shapes, statistics, ratios)


def check_tokenizer(expected: str | None, found: str, who: str) -> None:
    """See that two things go by one tokenizer: encoded data and a run, or a run and what decodes for it.

    Args:
        expected: fingerprint that a run goes by; None goes by any.
        who: what the other fingerprint is of, for the message.

    Raises:
        DataError: they differ.
    """
    if expected is not None and expected != found:
        raise DataError(
            f"{who} is of another tokenizer: fingerprint {found[:12]}, and the run goes by {expected[:12]}; its codes mean something "
            "else, so name what was made by the same tokenizer run and step"
        )


def _check_same(
    first: tuple[str, EncodePlan, dict[str, Any]], other: tuple[str, EncodePlan, dict[str, Any]]
) -> None:
    (name, plan, manifest), (other_name, other_plan, other_manifest) = first, other
    prints = plan.tokenizer["fingerprint"], other_plan.tokenizer["fingerprint"]
    if prints[0] != prints[1]:
        raise DataError(
            f"sources {name!r} and {other_name!r} were encoded with different tokenizers ({prints[0][:12]} and {prints[1][:12]}); "
            "encode them with one"
        )
    if manifest["shapes"] != other_manifest["shapes"]:
        raise DataError(
            f"encoded images of sources {name!r} and {other_name!r} differ in shape: {manifest['shapes']} and "
            f"{other_manifest['shapes']}; encode them alike"
        )


def _check_length(name: str, manifest: Mapping[str, Any], length: int, kind: str) -> None:
    if kind == "codes" and manifest["shapes"]["codes"] != [length]:
        (codes,) = manifest["shapes"]["codes"]
        raise DataError(
            f"source {name!r} has {codes} codes an image and data.sequence_length is {length}; set data.sequence_length={codes}"
        )


def _as_manifest(plan: EncodePlan, manifest: Mapping[str, Any]) -> Manifest:
    """What the rest of the data path wants to know of a source."""
    return Manifest(
        plan=plan.key,
        source=plan.source,
        kind="encoded",
        vocabulary={"kind": "images", "size": 0},
        shards=(),
        held_out=(),
        fingerprint=manifest["fingerprint"],
        images=dict(manifest),
    )


def _join_statistics(manifests: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Mean and standard deviation of every channel at each ratio, over all sources."""
    from .latent_sums import LatentSums

    joined: dict[int, LatentSums] = {}
    for manifest in manifests:
        for ratio, sums in manifest["sums"].items():
            joined[int(ratio)] = joined.get(int(ratio), LatentSums()) + LatentSums(**sums)
    return {ratio: sums.statistics() for ratio, sums in joined.items() if sums.values}
