"""Exponential moving averages of weights: what diffusion models and tokenizers are sampled and scored with.

Plain fp32 ranges beside the weights that a rank holds, so that they are checkpointed like any other state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from .updates import LocalParameter

__all__ = ["WeightAverages"]


class WeightAverages:
    """Averages of some parameters, begun as copies of them.

    Args:
        items: by logical name.
        decay: a step leaves `decay * average + (1 - decay) * weight`.
    """

    def __init__(self, items: Mapping[str, LocalParameter], decay: float) -> None:
        self.items, self.decay = dict(items), decay
        self.tensors = {
            name: item.leaf.detach().to(torch.float32, copy=True)
            for name, item in self.items.items()
        }

    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        for name, item in self.items.items():
            item.refresh()
            self.tensors[name].copy_(item.leaf.detach())

    @torch.no_grad()
    def update(self, keep: Tensor, left_out: Container[str] = ()) -> None:
        """Take in the weights as a step left them.

        Args:
            keep: () 0 where the step was withheld: then nothing happened that could be averaged.
            left_out: names of parameters that the step did not look at.
        """
        names = [name for name in self.tensors if name not in left_out]
        if not names:
            return
        averages = [self.tensors[name] for name in names]
        weights = [self.items[name].leaf.detach().float() for name in names]
        steps = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(steps, keep * (1.0 - self.decay))
        torch._foreach_add_(averages, steps)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The networks compute with the averages meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, item in self.items.items():
            item.refresh()
            weight, average = item.leaf.detach(), self.tensors[name]
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
