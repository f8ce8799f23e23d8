"""What the engines do alike: running micro-batches, deciding on an update, summing over the data ranks."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.batch import PackedBatch
from ...models.task import ParameterGroup, Task
from ..optimization.config import OptimizerConfig
from ..optimization.skip_step import SkipStep
from ..seeding import seed_micro_batch
from .protocol import Engine, TensorShard

__all__ = ["SteppingEngine", "clip_factor"]


class SteppingEngine(Engine):
    """An engine every rank of which has its own data."""

    task: Task
    seed: int
    optimizer_config: OptimizerConfig
    skip_step: SkipStep | None
    groups: list[ParameterGroup]
    _counts: Mapping[str, int]
    _carried: Mapping[int, dict[str, Tensor]] = MappingProxyType({})
    """`LossOutput.carried` of this step's phases by the first sample of the micro-batch; bound anew in each phase."""

    @property
    def data_rank(self) -> int:
        return self.topology.rank

    @property
    def data_ranks(self) -> int:
        return self.topology.world_size

    def forward_backward(
        self, phase: str, micro_batches: Sequence[PackedBatch], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        self._counts = counts
        sums: dict[str, Tensor] = {}
        vectors: dict[str, Tensor] = {}
        self._carried = carried = self._still_carried(micro_batches)
        self._prepare(phase)
        for place, batch in enumerate(micro_batches):
            self._set_sync(is_last=place == len(micro_batches) - 1)
            seed_micro_batch(self.seed, batch.sample_ids[0])
            on_device = batch.to(self.topology.device)
            if found := carried.get(batch.sample_ids[0]):
                on_device = replace(on_device, side={**on_device.side, **found})
            with self._autocast():
                output = self.task.losses(self._called_networks(), on_device, phase)
            # Gradients are averaged over all ranks; counts are global, so the sum is wanted. What nobody has is divided by
            # one: its zero loss stays zero.
            objective = sum(
                t.weight * t.total.float() / (counts[t.count] or 1) for t in output.terms.values()
            )
            self._backward(objective * self.topology.world_size)
            for name, term in {**output.terms, **output.metrics}.items():
                self.count_of[name] = term.count
                total = term.total.detach().float()
                sums[name] = sums[name] + total if name in sums else total
            for name, vector in output.vectors.items():
                vectors[name] = vectors[name] + vector if name in vectors else vector
            if output.carried:
                carried[batch.sample_ids[0]] = output.carried
        self.vectors = vectors
        return sums

    def _still_carried(self, micro_batches: Sequence[PackedBatch]) -> dict[int, dict[str, Tensor]]:
        """What phases carry to later ones is theirs: it goes when other samples come."""
        here = {batch.sample_ids[0] for batch in micro_batches}
        return {sample: found for sample, found in self._carried.items() if sample in here}

    def _prepare(self, phase: str) -> None:
        """Before the micro-batches of a phase."""

    @abstractmethod
    def _set_sync(self, *, is_last: bool) -> None:
        """Before each micro-batch: whether its backward is the step's last."""

    @abstractmethod
    def _called_networks(self) -> Mapping[str, nn.Module]:
        """What the task's losses call: the networks, or what they are wrapped in."""

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _backward(self, objective: Any) -> None:
        objective.backward()

    def _is_left_out(self, group: ParameterGroup) -> bool:
        """Whether no rank's part of this step has what the group needs; the host knows, on every rank alike."""
        return group.needs is not None and self._counts[group.needs] == 0

    def _decide(self, grad_norm: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        """(keep, clip): () 1 or 0 to withhold the update, () the factor on every gradient; waits for nothing."""
        keep = torch.isfinite(grad_norm).float()
        if loss is not None:
            keep = keep * torch.isfinite(loss)
            if self.skip_step is not None:
                keep = keep * self.skip_step.keep(loss, grad_norm)
        return keep, clip_factor(grad_norm, self.optimizer_config.clip_grad_norm)

    def sum_over_ranks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.topology.world_size == 1 or not values:
            return dict(values)
        packed = torch.stack([v.detach() for v in values.values()])
        dist.all_reduce(packed)
        return dict(zip(values, packed.unbind(), strict=True))

    def sum_vectors(self) -> dict[str, Tensor]:
        if self.topology.world_size > 1:
            for vector in self.vectors.values():
                dist.all_reduce(vector)
        return self.vectors

    def _skip_step_shards(self) -> list[TensorShard]:
        """The outlier rule's window, the same on all ranks."""
        if self.skip_step is None:
            return []
        state = {"values": self.skip_step.values, "count": self.skip_step.count}
        return [
            TensorShard(f"optimizer/skip_step/{name}", tuple(t.shape), 0, t, self.topology.is_main)
            for name, t in state.items()
        ]


def clip_factor(norm: Tensor, limit: float | None) -> Tensor:
    """() what brings gradients of this norm down to the limit; None never does."""
    clip = torch.ones_like(norm)
    if limit is not None:
        clip = (limit / (norm + 1e-6)).clamp_max(1.0)
    # A clip factor that is not a number must not reach the kernel, even for a withheld update.
    return torch.where(torch.isfinite(clip) & (clip > 0), clip, torch.ones_like(clip))
