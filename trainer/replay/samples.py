"""The loss of each sample of a step, apart from the others it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...models.batch import IGNORED, PackedBatch
from ...models.task import LossOutput
from ..seeding import seed_micro_batch

__all__ = ["SampleLoss", "sample_losses"]


@dataclass(frozen=True)
class SampleLoss:
    """One row.

    Args:
        sample: its global index in the order of the run.
        source: index of its data source.
        loss: mean of the first loss over its targets; None for a row that carries none.
        targets: counted ones.
        tokens: its ids.
    """

    sample: int
    source: int
    loss: float | None
    targets: int
    tokens: tuple[int, ...]


def sample_losses(
    batches: Sequence[PackedBatch],
    evaluate: Callable[[PackedBatch], LossOutput],
    seed: int,
    modalities: Sequence[str] = ("text",),
) -> list[SampleLoss]:
    """Losses of every row, highest first (a value that is not a number before all).

    A row of text is run by itself, which is exact as rows do not see each other. A batch with side tensors, whose first dimension
    only their model knows, is run whole once for each row, with the targets of all others ignored.

    Args:
        evaluate: losses of a batch without gradients.
        seed: of the run; every forward draws what its micro-batch drew.
        modalities: of the data.
    """
    found = []
    for batch in batches:
        for row, part in enumerate(_rows_of(batch, modalities)):
            seed_micro_batch(seed, batch.sample_ids[0])
            total = next(iter(evaluate(part).terms.values())).total
            length = batch.row_length
            found.append(
                SampleLoss(
                    batch.sample_ids[row],
                    batch.source_ids[row],
                    float(total) / part.target_count if part.target_count else None,
                    part.target_count,
                    tuple(batch.tokens[row * length : (row + 1) * length].tolist()),
                )
            )
    return sorted(found, key=_badness)


def _badness(item: SampleLoss) -> tuple[float, int]:
    if item.loss is None:
        return (float("inf"), item.sample)
    return (-item.loss if item.loss == item.loss else -float("inf"), item.sample)


def _rows_of(batch: PackedBatch, modalities: Sequence[str]) -> Iterator[PackedBatch]:
    for row in range(batch.rows):
        yield _masked(batch, row, modalities) if batch.side else _cut(batch, row)


def _cut(batch: PackedBatch, row: int) -> PackedBatch:
    first, stop = row * batch.row_length, (row + 1) * batch.row_length
    borders = batch.cu_seqlens[(batch.cu_seqlens >= first) & (batch.cu_seqlens <= stop)] - first
    part = slice(first, stop)
    return PackedBatch(
        tokens=batch.tokens[part],
        targets=batch.targets[part],
        position_ids=batch.position_ids[part],
        cu_seqlens=borders.to(torch.int32),
        max_seqlen=int(borders.diff().max()),
        row_length=batch.row_length,
        sample_ids=(batch.sample_ids[row],),
        source_ids=(batch.source_ids[row],),
        target_count=int((batch.targets[part] != IGNORED).sum()),
        modality=None if batch.modality is None else batch.modality[part],
    )


def _masked(batch: PackedBatch, row: int, modalities: Sequence[str]) -> PackedBatch:
    part = slice(row * batch.row_length, (row + 1) * batch.row_length)
    targets = torch.full_like(batch.targets, IGNORED)
    targets[part] = batch.targets[part]
    return batch.with_targets(targets, modalities)
