"""From the configuration to the engine it names."""

from __future__ import annotations

from typing import Any

from ...models.task import Task
from ..configuration.schema import TrainingConfig
from ..distributed import Topology
from .protocol import Engine
from .torch_engine import TorchEngine

__all__ = ["build_engine"]


def build_engine(
    task: Task, config: TrainingConfig, topology: Topology, *, trains: bool = True
) -> Engine:
    """Collective: networks with start values, sharded as configured.

    Args:
        trains: False leaves the optimizer out, for evaluation and generation, which plain torch does for every engine.
    """
    parts: dict[str, Any] = {
        "parallel": config.parallel,
        "precision": config.precision,
        "optimizer": config.optimizer,
        "seed": config.run.seed,
    }
    if trains and config.parallel.engine == "accelerate":
        from .accelerate_engine import AccelerateEngine

        return AccelerateEngine(task, topology, **parts)
    if trains and config.parallel.engine == "deepspeed":
        from .deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(task, topology, **parts, expected_rows=_rows(config, topology))
    return TorchEngine(task, topology, **parts, trains=trains)


def _rows(config: TrainingConfig, topology: Topology) -> tuple[int, int, int]:
    """Samples of a step, of a micro-batch, and micro-batches of a rank."""
    share = config.batch_rows // topology.world_size
    micro = (config.train.micro_batch_tokens or 0) // config.data.sequence_length or share
    return config.batch_rows, micro, share // micro
