"""Bytes that one rank sends in a step, and how long that takes at a given link speed.

Counted as rings do it: of N ranks, an all-gather or a reduce-scatter of B bytes sends (N - 1) / N * B from each, an
all-reduce twice that. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..configuration.schema import TrainingConfig
from .memory import COMPUTE_BYTES, GRADIENT_BYTES, Layout, sizes_of

__all__ = ["Communication", "count_communication"]

INDEX_BYTES = 8


@dataclass(frozen=True)
class Communication:
    """Bytes a rank sends a step.

    Args:
        gather: weights to other ranks of the same copy, all micro-batches.
        scatter: gradients to their owners.
        reduce: gradients between copies.
        rows: touched rows of hashed tables, to every other rank.
        shard_ranks: how many ranks `gather` and `scatter` are among.
    """

    gather: int
    scatter: int
    reduce: int
    rows: int
    shard_ranks: int

    @property
    def total(self) -> int:
        return self.gather + self.scatter + self.reduce + self.rows

    def seconds(self, link: float, node_link: float, gpus_per_node: int) -> float:
        """Seconds on the wire, nothing hidden behind compute.

        Args:
            link: bytes per second of a GPU to other nodes.
            node_link: bytes per second to GPUs of its own node, which a shard of no more ranks stays within.
        """
        inner = self.gather + self.scatter
        is_inside = self.shard_ranks <= gpus_per_node
        return inner / (node_link if is_inside else link) + (self.reduce + self.rows) / link


def count_communication(config: TrainingConfig, layout: Layout) -> Communication:
    """Bytes a rank sends in one step of a layout."""
    sizes = sizes_of(config, layout.micro_batch_tokens)
    size, times = COMPUTE_BYTES[config.precision.compute], layout.micro_batches
    dense, trained = sizes.dense, sizes.trained
    shards, ranks = layout.shard_ranks, layout.ranks
    copies = ranks // shards
    # Blocks are gathered for the forward and for the backward pass, the ends stay from one to the other.
    twice = (2 * sizes.blocks + sizes.ends) * size * times
    gather = scatter = reduce = 0.0
    if layout.strategy in ("fsdp", "hsdp"):
        each = times if layout.reduces_each else 1
        gather, scatter = twice, trained * GRADIENT_BYTES * each
        reduce = 2 * _ring(copies) * trained / shards * GRADIENT_BYTES * each
    elif layout.strategy == "ddp":
        reduce = 2 * _ring(ranks) * trained * GRADIENT_BYTES
    elif layout.strategy == "zero3":
        gather, scatter = 2 * dense * size * times, trained * size * times
    elif layout.strategy in ("zero1", "zero2"):
        # Stage 2 has no room for whole gradients between micro-batches, so it sends each.
        gather, scatter = dense * size, dense * size * (times if layout.strategy == "zero2" else 1)
    rows = _row_bytes(config, sizes.rows) * (ranks - 1) if ranks > 1 and sizes.rows else 0
    ring = _ring(shards)
    return Communication(
        int(gather * ring), int(scatter * ring), int(reduce), int(rows), shards if ring else ranks
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _row_bytes(config: TrainingConfig, values: int) -> int:
    if not values:
        return 0
    model: Any = config.model
    return values * GRADIENT_BYTES + values // model.table_width * INDEX_BYTES
