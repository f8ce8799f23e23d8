"""A run opened to be looked at: its configuration, and an engine that holds a checkpoint's weights.

Ranks and devices are whatever there is now, not what the run was trained on. Only parameters are read; the
run folder's checkpoints are left as they are, so a run that is going on can be opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import build_task
from ..models.errors import CheckpointError
from ..models.task import Task
from .base_weights import load_base_weights
from .checkpoint.manager import CheckpointManager
from .checkpoint.reading import read_manifest
from .configuration.load import load_run_config
from .configuration.schema import TrainingConfig
from .distributed import Topology, initialise_distributed, shutdown_distributed
from .engines.build import build_engine
from .engines.protocol import Engine, TensorShard

__all__ = ["TrainedRun", "open_trained"]


@dataclass(frozen=True)
class TrainedRun:
    """What was opened. As a context, it leaves the process group at its end.

    Args:
        step: of the checkpoint.
        state: what the run said about itself when it was saved.
    """

    run_dir: Path
    config: TrainingConfig
    topology: Topology
    task: Task
    engine: Engine
    step: int
    state: dict[str, Any]

    def network_for_generation(self) -> nn.Module:
        """Collective: what `generate` continues texts with; the run has to be opened for it."""
        networks = {name: self.engine.network_for_generation(name) for name in self.engine.networks}
        return self.task.network_for_generation(networks)

    def __enter__(self) -> TrainedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        shutdown_distributed()


def open_trained(
    run_dir: Path | str,
    step: int | None = None,
    overrides: Sequence[str] = (),
    *,
    for_generation: bool = False,
) -> TrainedRun:
    """Collective: load the weights of a run.

    Args:
        run_dir: the run folder.
        step: of the checkpoint; None is the newest that is whole.
        overrides: `key=value` on the run's configuration; `parallel` starts from its defaults.
        for_generation: open what is needed to generate, which may be more than to score data.

    Raises:
        ConfigError: not a run folder, or an override that cannot work.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    folder = Path(run_dir)
    config = load_run_config(folder, ["parallel={}", *overrides]).config
    if for_generation:
        config = config.model_copy(update={"model": config.model.for_generation()})
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    topology = initialise_distributed(config.run.device, config.parallel.timeout_s)
    manager = CheckpointManager(folder, config.checkpoint, topology)
    try:
        path = _find_checkpoint(manager, folder, step)
        task = build_task(config.model)
        engine = build_engine(task, config, topology, trains=False)
        loaded = manager.load(path, _wanted_weights(engine, path, config))
        known = loaded.state.get("base_weights", {})
        load_base_weights(task, engine, manager, is_new=False, known=known)
    finally:
        manager.close()
    return TrainedRun(folder, config, topology, task, engine, loaded.step, loaded.state)


def _wanted_weights(engine: Engine, path: Path, config: TrainingConfig) -> list[TensorShard]:
    """The weights, or their averages where the checkpoint has them and they are wanted."""
    stored = read_manifest(path).tensors if config.eval.ema else {}
    wanted = []
    for shard in engine.state_shards():
        kind, _, name = shard.name.partition("/")
        if kind == "parameters":
            average = f"ema/{name}"
            wanted.append(replace(shard, name=average) if average in stored else shard)
    return wanted


def _find_checkpoint(manager: CheckpointManager, run_dir: Path, step: int | None) -> Path:
    if step is None:
        found = manager.find_latest()
        if found is None:
            raise CheckpointError(
                f"{run_dir} has no complete checkpoint yet; let it run to its first save, or look with "
                f"weft checkpoint list {run_dir}"
            )
        return found
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    if not path.is_dir():
        steps = sorted(
            int(item.name[5:]) for item in path.parent.glob("step_*") if item.name[5:].isdigit()
        )
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none yet"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; {there}")
    return path
