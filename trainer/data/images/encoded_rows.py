"""Encoded images by their number among those trained on or held out, and the batches that models of them eat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....models.batch import IGNORED, IMAGE_KEYS, IMAGES, STAND_IN, PackedBatch
from ....models.errors import DataError
from .augmentation import sample_generator
from .config import ImagesConfig, RatiosConfig
from .encoded_format import ENCODED_ROW, EncodePlan, open_files, part_name, shard_name
from .packing import ImageRow, image_batch, ratio_counts
from .ratios import ratio_of_sample

__all__ = ["CodeAssembler", "EncodedRows", "MomentAssembler", "open_encoded_rows", "settle_ratios"]

VIEW_DRAW = 2


class EncodedRows:
    """Some images of an encoded source.

    Args:
        name: of the source.
        numbers: (N,) int64, number of each image in the source.
    """

    def __init__(
        self,
        name: str,
        plan: EncodePlan,
        shards: Sequence[Mapping[int | None, NDArray[Any]]],
        rows: NDArray[Any],
        numbers: NDArray[np.int64],
    ) -> None:
        self.name, self.plan = name, plan
        self._shards, self._numbers = shards, numbers
        self._rows = rows
        self._places = _places_by_ratio(plan, rows)

    @property
    def sequences(self) -> int:
        return len(self._numbers)

    @property
    def tokens(self) -> int:
        """Positions: a code is one, and an image's latents are."""
        a_row = self._shards[0][None].shape[-1] if self.plan.kind == "codes" else 1
        return self.sequences * a_row

    def label(self, number: int) -> int:
        """The class of an image, -1 for none."""
        return int(self._rows["label"][self._numbers[number]])

    def ratio(self, number: int) -> int:
        """Index of the ratio by complexity; 255 where the images were not scored."""
        return int(self._rows["ratio"][self._numbers[number]])

    def values(self, number: int, view: int, ratio: int | None = None) -> NDArray[Any]:
        """(codes,) of an image's view, or its moments (2C, h, w) at a ratio, as stored."""
        image = int(self._numbers[number])
        shard = image // self.plan.shard_images
        place = int(self._places[ratio][image])
        found: NDArray[Any] = self._shards[shard][ratio][place, view]
        return found


def _places_by_ratio(plan: EncodePlan, rows: NDArray[Any]) -> dict[int | None, NDArray[np.int64]]:
    """Place of each image in its shard's array of a ratio."""
    starts = np.arange(len(rows)) // plan.shard_images * plan.shard_images
    if plan.stores == "all":
        return dict.fromkeys(plan.parts, np.arange(len(rows)) - starts)
    found: dict[int | None, NDArray[np.int64]] = {}
    for place, ratio in enumerate(plan.ratios):
        before = np.concatenate(([0], np.cumsum(rows["ratio"] == place)))
        found[ratio] = before[:-1] - before[starts]
    return found


def open_encoded_rows(
    name: str, folder: Path, plan: EncodePlan, manifest: Mapping[str, Any]
) -> tuple[EncodedRows, EncodedRows]:
    """Images that are trained on, and those that are held out.

    Raises:
        DataError: none to train on.
    """
    shards, rows = [], [np.empty(0, ENCODED_ROW)]
    for number, record in enumerate(manifest["shards"]):
        files = dict(open_files(folder, record))
        stem = shard_name(number)
        arrays: dict[int | None, NDArray[Any]] = {}
        for ratio in plan.parts:
            shape = manifest["shapes"][part_name(ratio)]
            raw = files[f"{stem}.{part_name(ratio)}"].view(np.dtype(plan.dtype).newbyteorder("<"))
            arrays[ratio] = raw.reshape(-1, len(plan.views), *shape)
        shards.append(arrays)
        rows.append(files[f"{stem}.rows"].view(ENCODED_ROW))
    joined = np.concatenate(rows)
    held_out = joined["held_out"] == 1
    if held_out.all():
        raise DataError(f"too few samples: source {name!r} has no images to train on; add data")
    train, kept = (
        EncodedRows(name, plan, shards, joined, np.flatnonzero(chosen))
        for chosen in (~held_out, held_out)
    )
    return train, kept


class _Assembler:
    """What both have in common: which view of an image a sample shows."""

    def __init__(self, config: ImagesConfig, seed: int | None) -> None:
        self._config, self._seed = config, seed

    def _view(self, row: ImageRow) -> int:
        """One of the stored views, drawn for each sample; evaluation takes the first."""
        assert isinstance(row.rows, EncodedRows)
        if self._seed is None:
            return 0
        draw = sample_generator(self._seed, row.sample, VIEW_DRAW)
        return int(draw.integers(len(row.rows.plan.views)))


class CodeAssembler(_Assembler):
    """Rows for autoregressive models: the codes of an image, each predicted from those before it and the class.

    Position i holds code i - 1, the first holds 0: a model puts the class there, which stands in side `labels`.
    """

    def pack(self, rows: Sequence[ImageRow], *, is_stand_in: bool = False) -> PackedBatch:
        codes, labels = [], np.empty(len(rows), np.int64)
        for place, row in enumerate(rows):
            assert isinstance(row.rows, EncodedRows)
            codes.append(row.rows.values(row.number, self._view(row)).astype(np.int64))
            labels[place] = max(0, row.rows.label(row.number))
        targets = np.stack(codes)
        count, length = targets.shape
        tokens = np.zeros_like(targets)
        tokens[:, 1:] = targets[:, :-1]
        keys = np.array([(row.sample, 0) for row in rows], np.int64)
        if is_stand_in:
            targets = np.full_like(targets, IGNORED)
        return PackedBatch(
            tokens=torch.from_numpy(tokens.reshape(-1)),
            targets=torch.from_numpy(targets.reshape(-1)),
            position_ids=torch.arange(length).repeat(count),
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * length,
            max_seqlen=length,
            row_length=length,
            sample_ids=tuple(row.sample for row in rows),
            source_ids=tuple(row.source for row in rows),
            target_count=0 if is_stand_in else count * length,
            side={"labels": torch.from_numpy(labels), IMAGE_KEYS: torch.from_numpy(keys)},
            host_counts={IMAGES: count, **({STAND_IN: 1} if is_stand_in else {})},
        )


class MomentAssembler(_Assembler):
    """Rows for diffusion models: means and log variances of images' latents, by ratio."""

    def __init__(
        self,
        config: ImagesConfig,
        ratios: RatiosConfig,
        shapes: Mapping[int, Sequence[int]],
        seed: int | None,
    ) -> None:
        super().__init__(config, seed)
        self._ratios, self._shapes = ratios, shapes

    def pack(self, rows: Sequence[ImageRow], *, is_stand_in: bool = False) -> PackedBatch:
        values, labels = self._ratios.values, np.empty(len(rows), np.int64)
        places = np.empty(len(rows), np.uint8)
        moments = []
        for place, row in enumerate(rows):
            own = row.rows
            assert isinstance(own, EncodedRows)

            def scored(own: EncodedRows = own, number: int = row.number) -> int:
                return own.ratio(number)

            labels[place] = max(0, own.label(row.number))
            places[place] = ratio_of_sample(self._ratios, scored, self._seed, row.sample)
            ratio = values[places[place]]
            moments.append(own.values(row.number, self._view(row), ratio).astype(np.float32))
        side = {}
        wanted = values if self._ratios.fixed is None else (self._ratios.fixed,)
        for ratio in wanted:
            chosen = np.flatnonzero(places == values.index(ratio))
            empty = np.empty((0, *self._shapes[ratio]), np.float32)
            stacked = np.stack([moments[i] for i in chosen]) if len(chosen) else empty
            side[f"moments_{ratio}"] = torch.from_numpy(stacked)
            side[f"place_{ratio}"] = torch.from_numpy(chosen)
        counts = ratio_counts(values, places)
        return image_batch(rows, labels, side, counts, is_stand_in=is_stand_in)


def settle_ratios(config: ImagesConfig, plan: EncodePlan, name: str) -> RatiosConfig:
    """How ratios are assigned among those that were encoded.

    Raises:
        DataError: other ratios, or an assignment that the encoded images do not allow.
    """
    given = config.ratios or RatiosConfig(
        values=plan.ratios, fixed=plan.ratios[0] if len(plan.ratios) == 1 else None
    )
    if given.values != plan.ratios:
        raise DataError(
            f"source {name!r} was encoded at ratios {list(plan.ratios)} and data.images.ratios.values is {list(given.values)}; set "
            f"data.images.ratios.values={list(plan.ratios)}, or encode it again"
        )
    if plan.stores == "scored" and (given.fixed is not None or given.assignment != "scored"):
        raise DataError(
            f"source {name!r} has each image at its scored ratio alone; set data.images.ratios.assignment=scored and fixed=null, or "
            "encode with --ratios all"
        )
    if plan.scores is None and given.needs_scores:
        raise DataError(
            f"source {name!r} was encoded without scores, so no ratio is known of its images; encode with --scores DIR, or set "
            "data.images.ratios.assignment=random or data.images.ratios.fixed"
        )
    return given
