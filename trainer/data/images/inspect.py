"""What `weft data inspect` shows of images: sources, classes, ratios, and the first pictures of the order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....models.batch import PIXELS, images_at
from ....models.errors import DataError
from ..config import DataConfig, SourceConfig
from ..dataset import Dataset
from ..inspect import plain_table
from ..interleaved.images import write_image_grid
from ..loader import PackedLoader
from ..shards import read_manifest
from .config import ImagesConfig
from .encoded_format import is_encoded, read_encoded
from .sidecar import mean_tokens

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["config_of_folder", "render_images", "write_images"]

GRID_IMAGES = 64
ROWS_LOOKED_AT = 1024
MOST_CLASSES = 20
LARGEST_SIZE = 256


def config_of_folder(folder: Path, name: str) -> DataConfig | None:
    """Settings that show a folder of prepared or encoded images; None where it holds something else.

    Raises:
        DataError: the folder is damaged.
    """
    source = SourceConfig(name=name, path=str(folder), format="prepared")
    if is_encoded(folder):
        plan, manifest = read_encoded(folder)
        if plan.kind == "codes":
            (length,) = manifest["shapes"]["codes"]
            images = ImagesConfig(kind="codes", allow_empty_classes=True)
            return DataConfig(sources=(source,), sequence_length=length, images=images)
        by_draw = plan.scores is None and len(plan.ratios) > 1
        assignment = {"values": plan.ratios, "assignment": "random"} if by_draw else None
        images = ImagesConfig.model_validate(
            {"kind": "latents", "ratios": assignment, "allow_empty_classes": True}
        )
        return DataConfig(sources=(source,), sequence_length=1, images=images)
    found = read_manifest(folder).images
    if found is None:
        return None
    size = min(LARGEST_SIZE, *found["smallest"][:2])
    images = ImagesConfig(size=size, crop="center", flip=False, allow_empty_classes=True)
    return DataConfig(sources=(source,), sequence_length=1, images=images)


def render_images(data: Dataset, seed: int) -> Iterator[RenderableType]:
    """Tables, for a rich console."""
    assert data.image_data is not None
    assert data.config.images is not None
    total = sum(source.config.weight or source.sequences for source in data.sources)
    rows = [
        (
            source.name,
            f"{source.sequences:,}",
            f"{(source.config.weight or source.sequences) / total:.1%}",
            f"{source.held_out.tokens // data.sequence_length:,}",
            f"{(source.manifest.images or {}).get('quarantined', 0)}",
            source.manifest.fingerprint[:12],
        )
        for source in data.sources
    ]
    columns = ("source", "images", "share", "held out", "quarantined", "fingerprint")
    yield plain_table(f"Images, {data.config.images.kind}", columns, rows)
    plan = data.image_data.plan
    if plan is not None:
        views = f"{len(plan.views)} views ({', '.join(plan.views[:3])}{', ...' if len(plan.views) > 3 else ''})"
        yield f"{views}; tokenizer {plan.tokenizer['fingerprint'][:12]}\n"
    yield from _classes(data)
    if data.image_data.ratios is not None:
        yield _ratios(data, seed)
    for ratio, values in data.image_data.statistics.items():
        mean, std = (f"{np.mean(values[key]):.4f}" for key in ("mean", "std"))
        yield f"latents at {ratio}: mean {mean}, std {std} over channels, of {values['images']:,} images\n"


def _classes(data: Dataset) -> Iterator[RenderableType]:
    assert data.image_data is not None
    count = data.image_data.classes
    if not count:
        yield "no classes\n"
        return
    total = np.zeros(count, np.int64)
    names = None
    for source in data.sources:
        found = source.manifest.images or {}
        total[: len(found["class_counts"])] += found["class_counts"]
        names = names or found["classes"]
    rows = [
        (f"{number} {names[number] if names else ''}".strip(), f"{int(total[number]):,}")
        for number in range(min(count, MOST_CLASSES))
    ]
    yield plain_table(f"{count} classes, held-out images among them", ("class", "images"), rows)
    yield f"smallest {int(total.min()):,}, mean {total.mean():,.0f}, largest {int(total.max()):,}\n"


def _ratios(data: Dataset, seed: int) -> RenderableType:
    """How often each ratio comes among the first samples of a run."""
    assert data.image_data is not None
    assert data.image_data.ratios is not None
    values = data.image_data.ratios.values
    rows = min(ROWS_LOOKED_AT, sum(source.sequences for source in data.sources))
    with PackedLoader(data, seed=seed, batch_rows=rows, end_sample=rows, prefetch=1) as loader:
        counts = loader.next_step().micro_batches[0].host_counts
    shares = [counts[images_at(ratio)] / rows for ratio in values]
    table = [(str(ratio), f"{share:.1%}") for ratio, share in zip(values, shares, strict=True)]
    table.append(("T", f"{mean_tokens(values, shares):.3f}"))
    return plain_table(f"Ratios, first {rows} samples", ("ratio", "share"), table)


def write_images(data: Dataset, path: Path, seed: int, count: int = GRID_IMAGES) -> int:
    """Write the first pictures of a run's order as a PNG grid, as training sees them.

    Returns:
        How many there are.

    Raises:
        DataError: the images are encoded, and nothing here decodes them.
    """
    if data.image_data is None or data.image_data.plan is not None:
        raise DataError(
            "these images are encoded and only their tokenizer makes pictures of them; inspect what they were made of, or leave "
            "--images out"
        )
    rows = min(count, sum(source.sequences for source in data.sources))
    with PackedLoader(data, seed=seed, batch_rows=rows, end_sample=rows, prefetch=1) as loader:
        pixels = loader.next_step().micro_batches[0].side[PIXELS].numpy()
    write_image_grid(pixels.transpose(0, 2, 3, 1), path)
    return rows
