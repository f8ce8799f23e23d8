"""One attempt at a run: open everything, take up where the run stands, train, leave a clean folder.

The same function serves a new run and a resumed one, one process and many.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..models import build_task
from ..models.errors import CheckpointError, ConfigError, WeftError
from ..models.task import Task
from .checkpoint.manager import CheckpointManager
from .checkpoint.reading import find_checkpoint
from .configuration.checks import check_against_world
from .configuration.load import config_hash, dump_config
from .configuration.schema import TrainingConfig
from .data.dataset import Dataset, open_data
from .data.loader import PackedLoader
from .distributed import Topology, initialise_distributed, shutdown_distributed
from .engines.build import build_engine
from .engines.protocol import Engine
from .evaluation import evaluate
from .files import write_text
from .loop import Run, TrainState, fit
from .metrics.progress import Progress
from .metrics.recorder import MetricsRecorder
from .policies import StopRequest

__all__ = ["STOPPED_EXIT_CODE", "train"]

STOPPED_EXIT_CODE = 75
"""The run was asked to stop and saved: start it again with `weft train --resume`."""

log = logging.getLogger("weft")


def train(config: TrainingConfig, run_dir: Path | None = None, *, resume: bool = False) -> int:
    """Collective: run until the last step or a request to stop.

    Args:
        run_dir: the run folder, if it is not the configured one.
        resume: go on with the run in the configured folder; otherwise the folder must not hold one.

    Returns:
        The exit code: 0 finished, 75 stopped on request with everything saved.

    Raises:
        WeftError: any error the user can mend.
    """
    if run_dir is not None and run_dir != config.run_dir:
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": str(run_dir)})}
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    topology = initialise_distributed(config.run.device, config.parallel.timeout_s)
    try:
        check_against_world(config, topology.world_size)
        claim_folder(config, topology, resume=resume)
        # Signals count from here on: a stop asked for while opening is honoured before the first step.
        with StopRequest(config.run_dir) as stop:
            try:
                run = open_run(config, topology, stop, resume=resume)
            except WeftError:
                if not resume and topology.is_main:
                    release_folder(config.run_dir)
                raise
            if resume and topology.is_main:
                write_text(config.run_dir / "config.yaml", dump_config(config))
            try:
                with run.progress:
                    outcome = fit(run, stop)
            finally:
                run.loader.close()
                run.recorder.close()
                run.checkpoints.close()
        if outcome == "stopped" and topology.is_main:
            print(
                f"stopped by {stop.reason or 'another rank'} after step {run.state.step}; go on with: weft train --resume {config.run_dir}"
            )
        return 0 if outcome == "finished" else STOPPED_EXIT_CODE
    finally:
        shutdown_distributed()


def claim_folder(config: TrainingConfig, topology: Topology, *, resume: bool) -> None:
    """Collective: make the run folder and write its configuration, or refuse a folder that holds another run.

    A resumed run keeps its configuration until it is open: one that is refused must not spoil the next attempt.

    Raises:
        ConfigError: a new run in a used folder, or a folder that cannot be written.
    """
    problem = None
    if topology.is_main:
        folder = config.run_dir
        records = folder / "metrics.jsonl"
        has_steps = records.is_file() and records.stat().st_size > 0
        has_run = (folder / "checkpoints" / "latest").exists() or has_steps
        if has_run and not resume:
            problem = f"{folder} already holds a run; go on with it: weft train --resume {folder}, or set run.dir to a new folder"
        else:
            try:
                (folder / "logs").mkdir(parents=True, exist_ok=True)
                if not resume:
                    write_text(folder / "config.yaml", dump_config(config))
                # Found out here, not by the first thing that is written once all is open.
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                problem = f"run folder {folder} cannot be written: {error.strerror}; set run.dir elsewhere"
    problem = topology.broadcast_json(problem)
    if problem:
        raise ConfigError(problem)


def release_folder(folder: Path) -> None:
    """Undo `claim_folder` for a run that could not be opened; what else lies there stays."""
    (folder / "config.yaml").unlink(missing_ok=True)
    for empty in (folder / "logs", folder):
        with contextlib.suppress(OSError):
            empty.rmdir()


def open_run(config: TrainingConfig, topology: Topology, stop: StopRequest, *, resume: bool) -> Run:
    """Collective: data, engine, checkpoint and records, at the step the run stands at."""
    data = open_data(config.data, topology)
    task = build_task(config.model)
    engine = build_engine(task, config, topology)
    checkpoints = CheckpointManager(config.run_dir, config.checkpoint, topology)
    state = TrainState()
    if resume:
        state = restore(engine, checkpoints, data, config)
    elif config.checkpoint.start_from:
        start_from(engine, checkpoints, config)
    if state.step >= config.train.steps:
        raise ConfigError(
            f"{config.run_dir} is finished: it stands at step {state.step} of train.steps={config.train.steps}; raise train.steps to go on"
        )
    data.check_samples(config.train.steps * config.batch_rows, config.run.seed)
    rows = config.batch_rows // engine.data_ranks
    micro = (
        config.train.micro_batch_tokens or rows * config.data.sequence_length
    ) // config.data.sequence_length
    loader = PackedLoader(
        data,
        seed=config.run.seed,
        batch_rows=config.batch_rows,
        micro_batch_rows=micro,
        data_rank=engine.data_rank,
        data_ranks=engine.data_ranks,
        start_sample=state.samples,
        end_sample=state.samples + (config.train.steps - state.step) * config.batch_rows,
        pin_memory=topology.device.type == "cuda",
    )
    return Run(
        config=config,
        topology=topology,
        task=task,
        engine=engine,
        loader=loader,
        checkpoints=checkpoints,
        recorder=MetricsRecorder(
            config.run_dir, config.logging, topology, state.step, settings=config.dump()
        ),
        progress=Progress(
            config.logging.progress,
            config.train.steps,
            start_step=state.step,
            is_main=topology.is_main,
        ),
        state=state,
        evaluate=lambda: evaluation_values(engine, task, data, config, stop),
        fixed_state={
            "data": {"fingerprint": data.fingerprint, "seed": config.run.seed},
            "config_hash": config_hash(config),
            "engine_name": config.parallel.engine,
        },
    )


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
        should_stop=lambda: stop.reason is not None,
    )
    return found.as_metrics() if found else {}


def restore(
    engine: Engine, checkpoints: CheckpointManager, data: Dataset, config: TrainingConfig
) -> TrainState:
    """Collective: the newest sound checkpoint into the engine; a run that never saved starts from the beginning."""
    path = checkpoints.find_latest()
    if path is None:
        log.warning("%s has no complete checkpoint; starting from step 0", config.run_dir)
        return TrainState()
    loaded = checkpoints.load(path, engine.state_shards(), complete=True)
    data.check_fingerprint(loaded.state["data"]["fingerprint"])
    if loaded.state["data"]["seed"] != config.run.seed:
        raise ConfigError(
            f"run.seed is {config.run.seed} but the run was started with {loaded.state['data']['seed']}; leave it as it was"
        )
    engine.load_scalar_state(loaded.state["engine"])
    known = {item.name for item in fields(TrainState)}
    return TrainState(
        **{name: value for name, value in loaded.state["train"].items() if name in known}
    )


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
    if wants_optimizer:
        engine.load_scalar_state(loaded.state["engine"])
