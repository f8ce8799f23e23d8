"""What a recipe will cost, by arithmetic alone: parameters, FLOPs, memory a GPU, checkpoint, time.

Nothing is allocated and torch is not imported, so that it answers on a login node at once. The assumptions stand in
`ASSUMPTIONS` and are printed with the answer; activations are counted by the family's own `memory` module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..models.errors import ConfigError
from .configuration.checks import check_against_world
from .configuration.schema import TrainingConfig
from .planning.communication import Communication, count_communication
from .planning.layouts import describe, propose_layouts
from .planning.memory import (
    MASTER_BYTES,
    MOMENT_BYTES,
    SLACK,
    Memory,
    count_memory,
    resolve_layout,
)

__all__ = [
    "ASSUMPTIONS",
    "Hardware",
    "Memory",
    "Plan",
    "Proposal",
    "plan_run",
    "plan_scaling",
    "propose",
    "propose_more",
]

GB = 1e9
MOST_GPUS = 8192
FIXED_BYTES = int(2.5 * GB)
"""CUDA context, communication buffers, cuBLAS and compiler workspaces of one process."""
RECOMPUTE_TIME = {"none": 0.0, "selective": 0.03, "block": 1 / 3}
"""Share of a step that recomputation adds: a block's forward pass is a third of its work, without products little of it."""

ASSUMPTIONS = (
    "FLOPs: the family's formula, of a transformer 6 a multiplied parameter and 12*L*H*hd*S for attention, without a causal discount; recomputation is not counted",
    "weights, gradients and both Adam moments are fp32; fsdp and hsdp split them over the ranks that share one copy",
    "what is frozen has neither gradients nor moments, and is in no checkpoint of the run",
    "fsdp and hsdp keep whole gradients between the micro-batches of a step, since only the last one communicates",
    "hashed n-gram tables are held whole by every rank, and their gradient has the rows of one micro-batch",
    "activations are those of eager PyTorch with flash attention; parallel.compile needs less",
    f"each GPU loses {FIXED_BYTES / GB:.1f} GB to CUDA, NCCL and workspaces, and {SLACK:.0%} of the rest to fragmentation",
    "time is FLOPs / (GPUs x peak x MFU): no evaluation, checkpoint stall or failure is in it",
)


@dataclass(frozen=True)
class Hardware:
    """What the run is planned for.

    Args:
        memory_bytes: of one GPU.
        peak_flops: dense peak of one GPU in the compute type.
        mfu: share of the peak that training reaches.
        link_bytes_per_s: one GPU's to other nodes; node_link_bytes_per_s: to GPUs of its own node.
        disk_bytes_per_s: of the run folder, all ranks writing together.
        zero_stage: plan for DeepSpeed at this ZeRO stage; None for the configured strategy.
        offload: DeepSpeed's: none, optimizer or all.
    """

    memory_bytes: float = 80 * GB
    peak_flops: float = 989.5e12
    mfu: float = 0.4
    link_bytes_per_s: float = 50 * GB
    node_link_bytes_per_s: float = 300 * GB
    gpus_per_node: int = 8
    disk_bytes_per_s: float = 2 * GB
    zero_stage: int | None = None
    offload: str = "none"


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
    communication: Communication
    communication_seconds: float
    step_seconds: float
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
        sent = {**self.communication.__dict__, "total": self.communication.total}
        derived = {
            "flops": self.flops,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "memory": memory,
            "communication": sent,
            "assumptions": list(ASSUMPTIONS),
        }
        return {**self.__dict__, **derived}


@dataclass(frozen=True)
class Proposal:
    """A layout that fits: the overrides to type, and its plan."""

    overrides: str
    plan: Plan


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


def propose(config: TrainingConfig, gpus: int, hardware: Hardware) -> list[Proposal]:
    """Overrides with which the run fits on this many GPUs, fastest first."""
    found = propose_layouts(config, gpus, lambda changed, n: _plan(changed, n, hardware))
    return [Proposal(describe(config, changes), plan) for changes, plan in found]


def propose_more(config: TrainingConfig, gpus: int, hardware: Hardware) -> Proposal | None:
    """The fastest layout on the fewest GPUs, doubling, on which the run fits at all."""
    while (gpus := gpus * 2) <= MOST_GPUS:
        if found := propose(config, gpus, hardware):
            return found[0]
    return None


def _plan(config: TrainingConfig, gpus: int, hardware: Hardware) -> Plan:
    model: Any = config.model
    parameters = model.count_parameters()
    total = sum(parameters.values())
    frozen = sum(model.count_frozen().values()) if hasattr(model, "count_frozen") else 0
    layout = resolve_layout(config, gpus)
    if hardware.zero_stage is not None:
        stage, shards = hardware.zero_stage, gpus if hardware.zero_stage else 1
        strategy = f"zero{stage}" if stage else "ddp"
        layout = replace(layout, strategy=strategy, shard_ranks=shards, offload=hardware.offload)
    memory = count_memory(config, layout, FIXED_BYTES)
    communication = count_communication(config, layout)
    flops_per_token = model.flops_per_token(config.data.sequence_length)
    step_flops = config.train.batch_tokens * flops_per_token
    compute = step_flops / (gpus * hardware.peak_flops * hardware.mfu)
    # Recomputed work counts for nothing, but takes its time.
    compute *= 1 + RECOMPUTE_TIME[config.parallel.activation_checkpointing]
    sending = communication.seconds(
        hardware.link_bytes_per_s, hardware.node_link_bytes_per_s, hardware.gpus_per_node
    )
    return Plan(
        gpus=gpus,
        strategy=layout.strategy,
        shard_ranks=layout.shard_ranks,
        micro_batch_tokens=layout.micro_batch_tokens,
        micro_batches=layout.micro_batches,
        parameters=parameters,
        flops_per_token=flops_per_token,
        tokens=config.train.steps * config.train.batch_tokens,
        memory=memory,
        communication=communication,
        communication_seconds=sending,
        step_seconds=max(compute, sending),
        # What is frozen is another run's and named, not copied.
        checkpoint_bytes=(total - frozen) * (MASTER_BYTES + 2 * MOMENT_BYTES),
        weights_bytes=total * MASTER_BYTES,
        seconds=config.train.steps * step_flops / (gpus * hardware.peak_flops * hardware.mfu),
        fits=memory.total <= hardware.memory_bytes,
    )
