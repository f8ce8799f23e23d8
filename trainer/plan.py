"""What a recipe will cost, by arithmetic alone: parameters, FLOPs, memory a GPU, checkpoint, time.

Nothing is allocated and torch is not imported, so that it answers on a login node at once. The assumptions stand in
`ASSUMPTIONS` and are printed with the answer; activations are counted by the family's own `memory` module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..models.errors import ConfigError
from .configuration.checks import check_against_world
from .configuration.schema import TrainingConfig

__all__ = [
    "ASSUMPTIONS",
    "Hardware",
    "Memory",
    "Plan",
    "plan_run",
    "plan_scaling",
    "suggest_fitting",
]

GB = 1e9
MOST_GPUS = 8192
FIXED_BYTES = int(2.5 * GB)
"""CUDA context, communication buffers, cuBLAS and compiler workspaces of one process."""
SLACK = 0.05
"""Share of the allocated bytes that the allocator loses to fragmentation."""
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES = MOMENT_BYTES = 4

ASSUMPTIONS = (
    "FLOPs: 6 a multiplied parameter and 12*L*H*hd*S for attention, without a causal discount; recomputation is not counted",
    "weights, gradients and both Adam moments are fp32; fsdp and hsdp split them over the ranks that share one copy",
    "hashed n-gram tables are held whole by every rank, and their gradient has the rows of one micro-batch",
    "activations are those of eager PyTorch with flash attention; parallel.compile needs less",
    f"each GPU loses {FIXED_BYTES / GB:.1f} GB to CUDA, NCCL and workspaces, and {SLACK:.0%} of the rest to fragmentation",
    "time is FLOPs / (GPUs x peak x MFU): no evaluation, checkpoint stall or failure is in it",
)


@dataclass(frozen=True)
class Hardware:
    """The GPUs the run is planned for; the peak is that of the compute type, dense."""

    memory_bytes: float = 80 * GB
    peak_flops: float = 989.5e12
    mfu: float = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    compute_copies: int
    activations: dict[str, int]
    fixed: int

    @property
    def total(self) -> int:
        held = self.parameters + self.gradients + self.optimizer + self.compute_copies
        return int((held + sum(self.activations.values())) * (1 + SLACK)) + self.fixed


@dataclass(frozen=True)
class Plan:
    """What a run costs on a number of GPUs."""

    gpus: int
    strategy: str
    shard_ranks: int
    micro_batch_tokens: int
    micro_batches: int
    parameters: dict[str, int]
    flops_per_token: float
    tokens: int
    memory: Memory
    checkpoint_bytes: int
    weights_bytes: int
    seconds: float
    fits: bool

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.gpus

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; bytes, seconds and FLOPs as plain numbers."""
        memory = {**self.memory.__dict__, "total": self.memory.total}
        derived = {
            "flops": self.flops,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "memory": memory,
            "assumptions": list(ASSUMPTIONS),
        }
        return {**self.__dict__, **derived}


def plan_run(config: TrainingConfig, gpus: int | None, hardware: Hardware) -> Plan:
    """Plan a run on a number of GPUs, or on the fewest (a power of two) that hold it.

    Raises:
        ConfigError: the batch or the mesh does not divide over that many, or no number works.
    """
    if gpus is not None:
        check_against_world(config, gpus)
        return _plan(config, gpus, hardware)
    plans = plan_scaling(config, hardware)
    if not plans:
        check_against_world(config, 1)
        raise ConfigError("no power of two divides the batch over GPUs; give --gpus")
    return next((plan for plan in plans if plan.fits), plans[-1])


def plan_scaling(config: TrainingConfig, hardware: Hardware, first: int = 1) -> list[Plan]:
    """The plan at every power of two from `first` that the batch and the mesh allow."""
    plans, gpus = [], first
    while gpus <= MOST_GPUS:
        try:
            check_against_world(config, gpus)
            plans.append(_plan(config, gpus, hardware))
        except ConfigError:
            pass
        gpus *= 2
    return plans


def suggest_fitting(config: TrainingConfig, gpus: int, hardware: Hardware) -> list[str]:
    """Changes to a run that does not fit, each of which makes it fit; as they would be typed."""
    recompute = {"parallel.activation_checkpointing": "block"}
    smallest = {"train.micro_batch_tokens": config.data.sequence_length}

    def fitting(*changes: dict[str, Any]) -> list[str]:
        made = [c for c in changes if _plan(_changed(config, c), gpus, hardware).fits]
        return [" ".join(f"{key}={value}" for key, value in change.items()) for change in made]

    found = fitting(recompute, smallest) or fitting({**recompute, **smallest})
    more = next((p for p in plan_scaling(config, hardware, first=gpus * 2) if p.fits), None)
    return [*found, *([f"--gpus {more.gpus}"] if more else [])]


def _changed(config: TrainingConfig, change: dict[str, Any]) -> TrainingConfig:
    for key, value in change.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def _plan(config: TrainingConfig, gpus: int, hardware: Hardware) -> Plan:
    model: Any = config.model
    length = config.data.sequence_length
    parameters = model.count_parameters()
    total = sum(parameters.values())
    tokens = config.train.steps * config.train.batch_tokens
    share = config.train.batch_tokens // gpus
    micro = min(share, config.train.micro_batch_tokens or share)
    strategy, shard_ranks = _resolve_strategy(config, gpus)
    memory = _count_memory(config, strategy, shard_ranks, micro, micro_batches=share // micro)
    flops_per_token = model.flops_per_token(length)
    return Plan(
        gpus=gpus,
        strategy=strategy,
        shard_ranks=shard_ranks,
        micro_batch_tokens=micro,
        micro_batches=share // micro,
        parameters=parameters,
        flops_per_token=flops_per_token,
        tokens=tokens,
        memory=memory,
        checkpoint_bytes=total * (MASTER_BYTES + 2 * MOMENT_BYTES),
        weights_bytes=total * MASTER_BYTES,
        seconds=tokens * flops_per_token / (gpus * hardware.peak_flops * hardware.mfu),
        fits=memory.total <= hardware.memory_bytes,
    )


def _resolve_strategy(config: TrainingConfig, gpus: int) -> tuple[str, int]:
    """The strategy on this many GPUs, and how many of them share one copy of the weights."""
    parallel = config.parallel
    strategy: str = parallel.strategy
    if strategy == "auto":
        several = "ddp" if config.run.device == "cpu" else "fsdp"
        strategy = "single" if gpus == 1 else several
    if strategy == "fsdp":
        return strategy, gpus
    if strategy == "hsdp":
        return strategy, parallel.shard_ranks or gpus // (parallel.replicate_ranks or 1)
    return strategy, 1


def _count_memory(
    config: TrainingConfig, strategy: str, shard_ranks: int, micro: int, micro_batches: int
) -> Memory:
    model: Any = config.model
    family = importlib.import_module(f"..models.{model.family}.memory", __package__)
    compute_bytes = COMPUTE_BYTES[config.precision.compute]
    counts = model.count_parameters()
    tables = counts.get("ngram_tables", 0)
    dense = sum(counts.values()) - tables
    held = -(-dense // shard_ranks) + tables
    rows = _touched_values(model, micro) if tables else 0
    block = family.block_parameters(model)
    return Memory(
        parameters=held * MASTER_BYTES,
        gradients=-(-dense // shard_ranks) * MASTER_BYTES + rows * MASTER_BYTES,
        optimizer=held * 2 * MOMENT_BYTES,
        compute_copies=_compute_copies(
            strategy, compute_bytes, dense, block, dense - counts["blocks"]
        ),
        activations=family.activation_bytes(
            model,
            micro,
            compute_bytes=compute_bytes,
            recompute=config.parallel.activation_checkpointing,
        ),
        fixed=FIXED_BYTES,
    )


def _touched_values(model: Any, tokens: int) -> int:
    """Values in the tables' gradient: at most one row a position, n-gram length and hash function."""
    tables = len(model.ngram.sizes) * model.ngram.hash_functions
    return min(tokens, model.ngram.rows) * tables * model.d_model


def _compute_copies(strategy: str, compute_bytes: int, dense: int, block: int, ends: int) -> int:
    """Bytes of weights in the compute type, and of gathered weights and gradients on their way.

    Sharded strategies gather one block while the one before it is at work, and keep the ends (embedding and head)
    gathered through the step; a gathered gradient exists in the compute type and in fp32 while it is reduced.
    """
    if strategy in ("fsdp", "hsdp"):
        gathered = (2 * block + ends) * compute_bytes
        return gathered + max(2 * block, ends) * (compute_bytes + MASTER_BYTES)
    return dense * compute_bytes if compute_bytes < MASTER_BYTES else 0
