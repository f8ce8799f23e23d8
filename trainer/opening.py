"""Everything one attempt works with, opened at the step its run stands at: data, engine, checkpoint, records."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..models import build_task
from ..models.errors import CheckpointError, ConfigError
from ..models.section import Section
from ..models.task import Task
from .base_weights import load_base_weights
from .checkpoint.manager import CheckpointManager
from .checkpoint.reading import find_checkpoint
from .configuration.load import config_hash
from .configuration.schema import TrainingConfig
from .data.dataset import Dataset, open_data
from .data.images.source_opening import ImageData
from .data.loader import PackedLoader
from .distributed import Topology
from .engines.build import build_engine
from .engines.protocol import Engine
from .evaluation import evaluate
from .loop import Run, Supervision, TrainState
from .metrics.progress import Progress
from .metrics.recorder import MetricsRecorder
from .metrics.records import METRICS_FILE
from .patching import check_data_patches, settle_patching
from .policies import SpikePolicy, StopRequest
from .profiling import StepProfiler

__all__ = ["open_run"]

log = logging.getLogger("weft")


def open_run(
    config: TrainingConfig,
    topology: Topology,
    stop: StopRequest,
    *,
    resume: bool,
    supervision: Supervision | None = None,
) -> Run:
    """Collective: data, engine, checkpoint and records, at the step the run stands at.

    What the configuration leaves to the data is found here: the run's own `config` is complete.
    """
    supervision = supervision or Supervision()
    data = open_data(config.data, topology)
    config = settle_patching(config, data, topology, is_new=not resume)
    check_data_patches(config, data, topology)
    config = settle_images(config, data)
    task = build_task(config.model)
    engine = build_engine(task, config, topology)

    def on_commit(step: int, seconds: float) -> None:
        supervision.event("saved", step=step, seconds=seconds, train_seconds=run.state.seconds)

    checkpoints = CheckpointManager(config.run_dir, config.checkpoint, topology, on_commit)
    state, is_new, known = TrainState(), True, {}
    if resume:
        restored = restore(engine, checkpoints, data, config, task=task)
        if restored is not None:
            state, is_new, known = restored.train, False, restored.base_weights
    if is_new and config.checkpoint.start_from:
        start_from(engine, checkpoints, config)
    base_weights = load_base_weights(task, engine, checkpoints, is_new=is_new, known=known)
    if is_new:
        engine.start_averages()
    if state.step >= config.train.steps:
        raise ConfigError(
            f"{config.run_dir} is finished: it stands at step {state.step} of train.steps={config.train.steps}; raise train.steps to go on"
        )
    left_out = sum(stop - first for first, stop in samples_left_out(config, state))
    data.check_samples(config.train.steps * config.batch_rows + left_out, config.run.seed)
    spikes = None
    if config.train.spike != "ignore" and topology.is_main:
        spikes = SpikePolicy(config.train.spike_sigmas, config.train.spike_steps)
    run = Run(
        config=config,
        topology=topology,
        task=task,
        engine=engine,
        loader=open_loader(data, task, engine, config, state, topology),
        checkpoints=checkpoints,
        recorder=MetricsRecorder(
            config.run_dir,
            config.logging,
            topology,
            state.step,
            settings=config.dump(),
            on_kept=spikes.watch if spikes else None,
        ),
        progress=Progress(
            config.logging.progress,
            config.train.steps,
            start_step=state.step,
            is_main=topology.is_main,
        ),
        state=state,
        spikes=spikes,
        evaluate=lambda: evaluation_values(engine, task, data, config, stop),
        rewind=lambda path: rewind(run, data, path),
        fixed_state={
            "data": {"fingerprint": data.fingerprint, "seed": config.run.seed},
            "config_hash": config_hash(config),
            "engine_name": config.parallel.engine,
            "base_weights": base_weights,
            "facts": task.facts(),
        },
        supervision=supervision,
        profiler=StepProfiler(config.train, config.run_dir, topology),
    )
    supervision.event("opened", step=state.step, train_seconds=state.seconds)
    return run


def settle_images(config: TrainingConfig, data: Dataset) -> TrainingConfig:
    """The configuration with what was measured of the latents in it, so that images can be made without the data."""
    if data.image_data is not None:
        return settle_encoded(config, data.image_data)
    interleaved, images = config.data.interleaved, data.images
    if interleaved is None or images is None or images.kind != "latents":
        return config
    measured = {
        "scale": images.scale,
        "shift": images.shift,
        "clip": (images.minimum, images.maximum),
    }
    image = interleaved.image.model_copy(update=measured)
    settled = interleaved.model_copy(update={"image": image})
    return config.model_copy(
        update={"data": config.data.model_copy(update={"interleaved": settled})}
    )


def settle_encoded(config: TrainingConfig, data: ImageData) -> TrainingConfig:
    """The configuration with the tokenizer's fingerprint in it, and the statistics of latents where the model leaves them open."""
    images, model = config.data.images, config.model
    if images is None or data.tokenizer is None:
        return config
    settled = images.model_copy(update={"tokenizer": data.tokenizer})
    ratios = getattr(model, "ratios", None)
    if data.statistics and ratios is not None:
        model = model.model_copy(update={"ratios": tuple(_measured(r, data) for r in ratios)})
    update = {"data": config.data.model_copy(update={"images": settled}), "model": model}
    return config.model_copy(update=update)


def _measured(ratio: Section, data: ImageData) -> Section:
    """A ratio of a diffusion model with the mean and standard deviation of the latents at it, where it has none."""
    settings: Any = ratio
    found = data.statistics.get(settings.ratio)
    if found is None or settings.mean is not None or settings.std is not None:
        return ratio
    return ratio.model_copy(update={key: tuple(found[key]) for key in ("mean", "std")})


def samples_left_out(config: TrainingConfig, state: TrainState) -> list[tuple[int, int]]:
    """Ranges that rollbacks took out of the order, and those that a person named."""
    return [*((first, stop) for first, stop in state.left_out), *config.train.leave_out]


def open_loader(
    data: Dataset,
    task: Task,
    engine: Engine,
    config: TrainingConfig,
    state: TrainState,
    topology: Topology,
) -> PackedLoader:
    """This rank's batches from where the run stands to its end."""
    length, rows = config.data.sequence_length, config.batch_rows
    micro = config.train.micro_batch_tokens or rows // engine.data_ranks * length
    left_out = samples_left_out(config, state)
    # What is left out is made up for at the end; a range may also cost the part of a step before it.
    extra = sum(stop - first + rows for first, stop in left_out if stop > state.samples)
    return PackedLoader(
        data,
        seed=config.run.seed,
        batch_rows=rows,
        micro_batch_rows=micro // length,
        data_rank=engine.data_rank,
        data_ranks=engine.data_ranks,
        start_sample=state.samples,
        end_sample=state.samples + (config.train.steps - state.step) * rows + extra,
        leave_out=left_out,
        pin_memory=topology.device.type == "cuda",
        task=task,
    )


def rewind(run: Run, data: Dataset, path: Path) -> None:
    """Collective: everything back to a checkpoint of the same attempt, but what the run has learnt about its data."""
    run.loader.close()
    restored = restore(run.engine, run.checkpoints, data, run.config, path)
    assert restored is not None
    run.state = replace(
        restored.train,
        rollbacks=run.state.rollbacks,
        non_finite_steps=run.state.non_finite_steps,
        left_out=run.state.left_out,
    )
    run.checkpoints.discard_after(path)
    run.recorder.rewind(run.state.step)
    run.loader = open_loader(data, run.task, run.engine, run.config, run.state, run.topology)


def evaluation_values(
    engine: Engine, task: Task, data: Dataset, config: TrainingConfig, stop: StopRequest
) -> dict[str, Any]:
    """Collective: held-out numbers as flat metric names; none where a rank was asked to stop meanwhile."""
    found = evaluate(
        engine,
        task,
        data,
        config.eval,
        micro_batch_tokens=config.train.micro_batch_tokens,
        should_stop=stop.is_asked,
    )
    return found.as_metrics() if found else {}


@dataclass(frozen=True)
class Restored:
    """Where a run stands, and the hashes of the weights it has from other runs."""

    train: TrainState
    base_weights: dict[str, str]


def restore(
    engine: Engine,
    checkpoints: CheckpointManager,
    data: Dataset,
    config: TrainingConfig,
    path: Path | None = None,
    *,
    task: Task | None = None,
) -> Restored | None:
    """Collective: a checkpoint into the engine, the newest sound one by default; None for a run that never saved.

    Args:
        task: whose facts must be those of the checkpoint; None does not ask.

    Raises:
        ConfigError: another seed, or another file than the run began with.
    """
    path = path or checkpoints.find_latest()
    if path is None:
        if (config.run_dir / METRICS_FILE).exists():
            log.warning("%s has no complete checkpoint; starting from step 0", config.run_dir)
        return None
    loaded = checkpoints.load(path, engine.state_shards(), complete=True)
    engine.after_load()
    data.check_fingerprint(loaded.state["data"]["fingerprint"])
    if loaded.state["data"]["seed"] != config.run.seed:
        raise ConfigError(
            f"run.seed is {config.run.seed} but the run was started with {loaded.state['data']['seed']}; leave it as it was"
        )
    if task is not None and loaded.state.get("facts", {}) != (facts := task.facts()):
        raise ConfigError(
            f"the run depends on {loaded.state.get('facts', {})} and what is there now is {facts}; name the files it began with"
        )
    engine.load_scalar_state(loaded.state["engine"])
    known = {item.name for item in fields(TrainState)}
    progress = {name: value for name, value in loaded.state["train"].items() if name in known}
    return Restored(TrainState(**progress), loaded.state.get("base_weights", {}))


def start_from(engine: Engine, checkpoints: CheckpointManager, config: TrainingConfig) -> None:
    """Collective: weights, and on request the optimizer, of another run; the data order starts anew.

    Raises:
        CheckpointError: nothing sound there.
    """
    source = Path(config.checkpoint.start_from or "")
    path = find_checkpoint(source)
    if path is None:
        raise CheckpointError(f"checkpoint.start_from: {source} holds no complete checkpoint")
    wants_optimizer = config.checkpoint.start_from_parts == "weights_and_optimizer"
    shards = [
        s for s in engine.state_shards() if s.name.startswith("parameters/") or wants_optimizer
    ]
    loaded = checkpoints.load(path, shards)
    engine.after_load()
    if wants_optimizer:
        engine.load_scalar_state(loaded.state["engine"])
