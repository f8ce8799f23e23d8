"""Bytes on one rank at the fullest moment of a step.

A step is fullest at one of three moments, and what makes one full is not there at another: when the backward pass
begins (all activations, few gradients), inside the backward pass of a block (recomputed activations, gradients
of the blocks behind it), and at its end (all gradients, and those on their way to other ranks). Each is added up, and the
largest is the answer. `weft bench memory` measures the same.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

from ..configuration.schema import TrainingConfig

__all__ = ["Layout", "Memory", "count_memory", "resolve_layout"]

COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES = MOMENT_BYTES = GRADIENT_BYTES = 4
BUCKET_BYTES = 25 << 20
"""Of `engines/gradient_sync.py`: gradients leave in parts of this size."""
ZERO_BUCKET_VALUES = 500_000_000
"""DeepSpeed's reduce_bucket_size; a model smaller than that has one bucket."""
SLACK = 0.05
"""Share of the allocated bytes that the allocator loses to fragmentation."""
SHARDED = ("fsdp", "hsdp", "zero3")


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    Args:
        strategy: single, ddp, fsdp, hsdp, or zero1 to zero3 for DeepSpeed.
        shard_ranks: ranks that share one copy of what is sharded.
        offload: zero only: `optimizer` keeps master weights and moments on the host, `all` the weights too.
        reduces_each: fsdp and hsdp: gradients are reduced and split after every micro-batch.
    """

    strategy: str
    ranks: int
    shard_ranks: int
    micro_batch_tokens: int
    micro_batches: int
    offload: str = "none"
    reduces_each: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step."""

    moment: str
    parameters: int
    gradients: int
    optimizer: int
    compute_copies: int
    communication: int
    activations: dict[str, int]
    fixed: int
    host: int = 0

    @property
    def allocated(self) -> int:
        """What the allocator counts at its peak."""
        held = self.parameters + self.gradients + self.optimizer + self.compute_copies
        return held + self.communication + sum(self.activations.values())

    @property
    def total(self) -> int:
        return int(self.allocated * (1 + SLACK)) + self.fixed


def resolve_layout(config: TrainingConfig, ranks: int) -> Layout:
    """What the configuration comes to on this many ranks."""
    parallel = config.parallel
    share = config.train.batch_tokens // ranks
    micro = min(share, config.train.micro_batch_tokens or share)
    strategy: str = parallel.strategy
    if strategy == "auto":
        several = "ddp" if config.run.device == "cpu" else "fsdp"
        strategy = "single" if ranks == 1 else several
    shard = {
        "fsdp": ranks,
        "hsdp": parallel.shard_ranks or ranks // (parallel.replicate_ranks or 1),
    }
    each = parallel.reduce_gradients == "each"
    return Layout(strategy, ranks, shard.get(strategy, 1), micro, share // micro, reduces_each=each)


@dataclass(frozen=True)
class _Sizes:
    """Parameter counts: dense ones by place, hashed tables, and their rows that one micro-batch touches.

    Args:
        frozen: of `dense`, those that are not trained; `frozen_blocks` of them lie in blocks.
    """

    dense: int
    block: int
    blocks: int
    head: int
    tables: int
    rows: int
    frozen: int
    frozen_blocks: int

    @property
    def ends(self) -> int:
        return self.dense - self.blocks

    @property
    def trained(self) -> int:
        return self.dense - self.frozen

    @property
    def trained_block(self) -> int:
        return self.block - self.frozen_blocks * self.block // self.blocks

    @property
    def trained_ends(self) -> int:
        return self.ends - (self.frozen - self.frozen_blocks)

    @property
    def trained_head(self) -> int:
        return min(self.head, self.trained_ends)


def sizes_of(config: TrainingConfig, tokens: int) -> _Sizes:
    model: Any = config.model
    family = importlib.import_module(f"...models.{model.family}.memory", __package__)
    counts = model.count_parameters()
    tables = counts.get("ngram_tables", 0)
    frozen = model.count_frozen() if hasattr(model, "count_frozen") else {}
    return _Sizes(
        dense=sum(counts.values()) - tables,
        block=family.block_parameters(model),
        blocks=counts["blocks"],
        head=counts.get("head") or counts["embedding"],
        tables=tables,
        rows=_touched_values(model, tokens) if tables else 0,
        frozen=sum(frozen.values()),
        frozen_blocks=frozen.get("blocks", 0),
    )


def count_memory(config: TrainingConfig, layout: Layout, fixed_bytes: int) -> Memory:
    """Bytes on one rank.

    Args:
        fixed_bytes: what a process takes besides tensors.
    """
    model: Any = config.model
    family = importlib.import_module(f"...models.{model.family}.memory", __package__)
    recompute = config.parallel.activation_checkpointing
    parts = family.activation_bytes(
        model,
        layout.micro_batch_tokens,
        compute_bytes=COMPUTE_BYTES[config.precision.compute],
        recompute=recompute,
    )
    sizes = sizes_of(config, layout.micro_batch_tokens)
    size = COMPUTE_BYTES[config.precision.compute]
    make = _zero_state if layout.strategy.startswith("zero") else _torch_state
    state = make(sizes, layout, size, fixed_bytes)
    if config.optimizer.ema_decay is not None:
        averages = -(-sizes.trained // layout.shard_ranks) * MASTER_BYTES
        state = replace(state, optimizer=state.optimizer + averages)
    blocks = round(sizes.blocks / sizes.block)
    moments = [
        _backward_begins(state, sizes, layout, size, parts),
        *(_in_block(state, sizes, layout, size, parts, n, blocks) for n in {0, 1, blocks - 1}),
        _backward_ends(state, sizes, layout, size),
    ]
    return max(moments, key=lambda memory: memory.allocated)


def _torch_state(sizes: _Sizes, layout: Layout, size: int, fixed: int) -> Memory:
    """What is there between steps: master weights and both moments, split over the shards."""
    held = -(-sizes.dense // layout.shard_ranks) + sizes.tables
    trained = -(-sizes.trained // layout.shard_ranks) + sizes.tables
    return Memory("", held * MASTER_BYTES, 0, trained * 2 * MOMENT_BYTES, 0, 0, {}, fixed)


def _zero_state(sizes: _Sizes, layout: Layout, size: int, fixed: int) -> Memory:
    """DeepSpeed's: weights in the compute type beside a split fp32 copy and split moments (arXiv 1910.02054, section 5)."""
    whole = sizes.dense + sizes.tables
    split = -(-(sizes.trained + sizes.tables) // layout.shard_ranks)
    weights = (-(-whole // layout.shard_ranks) if layout.strategy == "zero3" else whole) * size
    master = split * MASTER_BYTES
    optimizer = master + split * 2 * MOMENT_BYTES
    host = 0
    if layout.offload != "none":
        # Gradients of the part follow, for the update happens there.
        host, optimizer = optimizer + split * GRADIENT_BYTES, 0
    if layout.offload == "all" and layout.strategy == "zero3":
        host, weights = host + weights, 0
    return Memory("", weights, 0, optimizer, 0, 0, {}, fixed, host)


def _gradients(sizes: _Sizes, layout: Layout, size: int, done: int, is_only: bool) -> int:
    """Bytes of gradients when `done` trained dense parameters have those of the last micro-batch.

    With more than one micro-batch the others left theirs: FSDP2 keeps them whole where only the last one communicates;
    ZeRO 2 and 3 split them after each.

    Args:
        is_only: the step has one micro-batch.
    """
    strategy, rows = layout.strategy, sizes.rows * GRADIENT_BYTES
    split = -(-done // layout.shard_ranks)
    if strategy.startswith("zero"):
        if layout.offload != "none":
            return rows
        parts = layout.shard_ranks if strategy in ("zero2", "zero3") else 1
        return (
            rows + -(-done // parts) * size
            if is_only
            else rows + -(-sizes.trained // parts) * GRADIENT_BYTES
        )
    if strategy in SHARDED and layout.reduces_each and not is_only:
        return rows + -(-sizes.trained // layout.shard_ranks) * GRADIENT_BYTES
    if strategy in SHARDED:
        return rows + (split + (0 if is_only else sizes.trained - done)) * GRADIENT_BYTES
    return rows + (done if is_only else sizes.trained) * GRADIENT_BYTES


def _gathered(sizes: _Sizes, layout: Layout, size: int, blocks: int) -> int:
    """Weights in the compute type: of single and ddp the casts that the backward pass needs, else what is gathered."""
    if layout.strategy in SHARDED:
        return (sizes.ends + blocks * sizes.block) * size
    if layout.strategy.startswith("zero"):
        return 0
    return (sizes.blocks + sizes.head) * size if size < MASTER_BYTES else 0


def _in_buckets(sizes: _Sizes, layout: Layout, done: int) -> int:
    """Copies of gradients on their way: ddp keeps every bucket until the last one is back."""
    if layout.strategy == "ddp":
        bucket = BUCKET_BYTES // GRADIENT_BYTES
        return (done if done == sizes.trained else done // bucket * bucket) * GRADIENT_BYTES
    if layout.strategy.startswith("zero"):
        return min(sizes.trained, ZERO_BUCKET_VALUES) * GRADIENT_BYTES
    return 0


def _backward_begins(
    state: Memory, sizes: _Sizes, layout: Layout, size: int, parts: dict[str, int]
) -> Memory:
    """The head's turn: all that is kept, the logits and their gradient, and the head's own gradient."""
    names = ("kept", "logits", "ends")
    return replace(
        state,
        moment="its backward pass begins",
        gradients=_gradients(sizes, layout, size, 0, layout.micro_batches == 1)
        + sizes.trained_head * size,
        compute_copies=_gathered(sizes, layout, size, 1),
        activations={name: parts[name] for name in names},
    )


def _in_block(
    state: Memory,
    sizes: _Sizes,
    layout: Layout,
    size: int,
    parts: dict[str, int],
    below: int,
    blocks: int,
) -> Memory:
    """The turn of a block with `below` blocks below it; those above have their gradients."""
    above = (blocks - 1 - below) * sizes.trained_block
    done = above + (0 if layout.strategy in SHARDED else sizes.trained_head)
    # The root of a sharded model reduces last: until then the head's gradient is whole.
    own = sizes.trained_head * size if layout.strategy in SHARDED else 0
    sending = sizes.trained_block * GRADIENT_BYTES if layout.strategy in SHARDED and above else 0
    return replace(
        state,
        moment="a block is in its backward pass",
        gradients=_gradients(sizes, layout, size, done, layout.micro_batches == 1) + own,
        compute_copies=_gathered(sizes, layout, size, min(2, below + 1)),
        communication=sending + _in_buckets(sizes, layout, done),
        activations={
            "kept": parts["kept"] * (below + 1) // blocks,
            "recomputed": parts["recomputed"],
            "in_flight": parts["in_flight"],
        },
    )


def _backward_ends(state: Memory, sizes: _Sizes, layout: Layout, size: int) -> Memory:
    """All gradients, and those on their way."""
    sending = sizes.trained_ends * (size + GRADIENT_BYTES) if layout.strategy in SHARDED else 0
    return replace(
        state,
        moment="its backward pass ends",
        gradients=_gradients(sizes, layout, size, sizes.trained, True),
        compute_copies=sizes.ends * size if layout.strategy in SHARDED else 0,
        communication=sending + _in_buckets(sizes, layout, sizes.trained),
        activations={},
    )


def _touched_values(model: Any, tokens: int) -> int:
    """Values in the tables' gradient: at most one row a position, n-gram length and hash function."""
    tables = len(model.ngram.sizes) * model.ngram.hash_functions
    return min(tokens, model.ngram.rows) * tables * model.table_width
