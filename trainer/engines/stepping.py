"""What the engines do alike: running micro-batches, deciding on an update, summing over the data ranks."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
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

__all__ = ["SteppingEngine"]


class SteppingEngine(Engine):
    """An engine every rank of which has its own data."""

    task: Task
    seed: int
    optimizer_config: OptimizerConfig
    skip_step: SkipStep | None
    groups: list[ParameterGroup]
    _counts: Mapping[str, int]

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
        for place, batch in enumerate(micro_batches):
            self._set_sync(is_last=place == len(micro_batches) - 1)
            seed_micro_batch(self.seed, batch.sample_ids[0])
            on_device = batch.to(self.topology.device)
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
        return sums

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
        limit = self.optimizer_config.clip_grad_norm
        clip = torch.ones_like(grad_norm)
        if limit is not None:
            clip = (limit / (grad_norm + 1e-6)).clamp_max(1.0)
        # A clip factor that is not a number must not reach the kernel, even for a withheld update.
        clip = torch.where(torch.isfinite(clip) & (clip > 0), clip, torch.ones_like(clip))
        return keep, clip

    def sum_over_ranks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.topology.world_size == 1 or not values:
            return dict(values)
        packed = torch.stack([v.detach() for v in values.values()])
        dist.all_reduce(packed)
        return dict(zip(values, packed.unbind(), strict=True))

    def _skip_step_shards(self) -> list[TensorShard]:
        """The outlier rule's window, the same on all ranks."""
        if self.skip_step is None:
            return []
        state = {"values": self.skip_step.values, "count": self.skip_step.count}
        return [
            TensorShard(f"optimizer/skip_step/{name}", tuple(t.shape), 0, t, self.topology.is_main)
            for name, t in state.items()
        ]
