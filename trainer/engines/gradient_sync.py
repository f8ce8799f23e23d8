"""Averaging dense gradients over replicas while the backward pass is still running.

Why not DistributedDataParallel: it lays its buckets out anew after the first step, and with more than two ranks the order of a
ring's sums depends on the layout, so the first step after a resume would differ in its last bits. These buckets are
fixed by the order of the parameters, and are reduced strictly in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["GradientSync"]

BUCKET_BYTES = 25 << 20


class GradientSync:
    """Buckets of parameters whose gradients are averaged over a group.

    Args:
        parameters: dense, replicated, in the order of the forward pass.
        group: process group of the replicas.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None
    ) -> None:
        self.group = group
        self.world = dist.get_world_size(group)
        self.is_enabled = False
        self._buckets = _cut(list(reversed(parameters)))
        self._bucket_of = {id(p): i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._waiting = [len(bucket) for bucket in self._buckets]
        self._pending: list[tuple[Tensor, list[Tensor], dist.Work]] = []
        self._next = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self.is_enabled:
            return
        self._waiting[self._bucket_of[id(parameter)]] -= 1
        # In turn, never as they come: all ranks must start the same reduction.
        while self._next < len(self._buckets) and self._waiting[self._next] == 0:
            self._start(self._next)

    def _start(self, index: int) -> None:
        self._next = index + 1
        gradients = [p.grad for p in self._buckets[index] if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        self._pending.append((flat, gradients, work))

    def finish(self) -> None:
        """Collective: reduce what is left, wait for all, and put the averages into the gradients."""
        while self._next < len(self._buckets):
            self._start(self._next)
        for flat, gradients, work in self._pending:
            work.wait()
            flat.div_(self.world)
            for gradient, average in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(average.view_as(gradient))
        self._pending.clear()
        self._next = 0
        self._waiting = [len(bucket) for bucket in self._buckets]
        self.is_enabled = False


def _cut(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
