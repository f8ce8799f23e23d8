"""Long sequences cut over ranks: every rank has one stretch of every row, and states pass from left to right.

Convolution and scan are the only places where positions meet, so nothing else of the model knows. A rank sends a few inputs
and one state for each row and block, however long the sequence is. Gradients of weights are sums over a
rank's own positions, as in data parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import causal_conv1d, inputs_before, selective_scan_segment
from ..batch import IGNORED, IMAGE_SPANS, TARGET_MODALITY, PackedBatch, positions_of, targets_of
from ..errors import ConfigError

__all__ = ["SequenceGroup", "ShardedContext", "cut_batch", "even_lengths"]


class SequenceGroup:
    """The ranks that share every row.

    Args:
        lengths: positions of a row that each rank of the group has, in order; some may be 0.
        group: of `torch.distributed`; None is the default one.
    """

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        self.lengths, self.group = tuple(lengths), group
        self.place = dist.get_rank(group)
        if len(self.lengths) != dist.get_world_size(group):
            raise ValueError(
                f"{len(self.lengths)} lengths are given for {dist.get_world_size(group)} ranks"
            )

    def gather(self, tensor: Tensor) -> Tensor:
        """Collective: the tensor of every rank, stacked in order."""
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in self.lengths]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)


class ShardedContext:
    """As `PackedContext`, of one rank's stretch of every row.

    Args:
        position_ids: (T,) positions inside whole documents.
        rows: that T is cut into.
    """

    def __init__(self, position_ids: Tensor, rows: int, shards: SequenceGroup) -> None:
        self.shards = shards
        self.position_ids = position_ids.view(rows, shards.lengths[shards.place])

    def of_layer(self, layer: int) -> ShardedContext:
        return self

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Collective."""
        shards, rows = self.shards, self._in_rows(x)
        before = inputs_before(
            rows,
            weight.shape[1] - 1,
            position_ids=self.position_ids,
            lengths=shards.lengths,
            gather=shards.gather,
            place=shards.place,
        )
        out = causal_conv1d(
            rows, weight, bias, "silu", position_ids=self.position_ids, initial_state=before
        )
        return out.flatten(0, 1)

    def scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Collective."""
        u, delta, B, C, z = (self._in_rows(x) for x in (u, delta, B, C, z))
        out = selective_scan_segment(
            *(u, delta, A, B, C, D, z, bias),
            position_ids=self.position_ids,
            gather=self.shards.gather,
            place=self.shards.place,
        )
        return out.flatten(0, 1)

    def _in_rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, self.position_ids.shape)


def even_lengths(row_length: int, ranks: int) -> tuple[int, ...]:
    """A row's positions split over ranks, as evenly as can be."""
    short, extra = divmod(row_length, ranks)
    return tuple(short + (rank < extra) for rank in range(ranks))


def cut_batch(
    batch: PackedBatch, lengths: Sequence[int], place: int, modalities: Sequence[str]
) -> PackedBatch:
    """One rank's stretch of every row, on the host; the counts are those of the stretch.

    Args:
        lengths: of all ranks, as in `SequenceGroup`.
        modalities: of the model, for the counts.

    Raises:
        ConfigError: the batch has continuous images, which stand or fall as a whole.
    """
    if any(tensor.dim() != 1 or len(tensor) != len(batch.tokens) for name, tensor in batch.side.items() if name != IMAGE_SPANS):  # fmt: skip
        raise ConfigError(
            "sequences with continuous images cannot be cut over ranks; use codes, or shorter sequences"
        )
    start = sum(lengths[:place])
    columns = slice(start, start + lengths[place])

    def cut(tensor: Tensor) -> Tensor:
        return tensor.view(batch.rows, batch.row_length)[:, columns].reshape(-1)

    targets, position_ids = cut(batch.targets), cut(batch.position_ids)
    modality = None if batch.modality is None else cut(batch.modality)
    side = {name: cut(tensor) for name, tensor in batch.side.items() if name != IMAGE_SPANS}
    counted = targets != IGNORED
    starts = position_ids == 0
    starts[:: max(1, lengths[place])] = True
    borders = torch.cat((starts.nonzero()[:, 0], torch.tensor([len(starts)]))).int()
    return replace(
        batch,
        tokens=cut(batch.tokens),
        targets=targets,
        position_ids=position_ids,
        cu_seqlens=borders,
        max_seqlen=min(batch.max_seqlen, lengths[place]),
        row_length=lengths[place],
        target_count=int(counted.sum()),
        target_bytes=round(batch.target_bytes * int(counted.sum()) / max(1, batch.target_count)),
        modality=modality,
        side=side,
        host_counts=_counts(modality, side, counted, modalities),
    )


def _counts(
    modality: Tensor | None, side: dict[str, Tensor], counted: Tensor, modalities: Sequence[str]
) -> dict[str, int]:
    if modality is None:
        return {}
    kinds = side.get(TARGET_MODALITY, torch.zeros_like(modality))
    found = {}
    for number, name in enumerate(modalities):
        found[positions_of(name)] = int((modality == number).sum())
        found[targets_of(name)] = int((counted & (kinds == number)).sum())
    return found
