"""The loop of every run: data, forward and backward, update, measure, evaluate, save.

`fit` reads top to bottom and knows steps and phases, not models. Values of a step stay on the device until the
accumulator is flushed, so a GPU is never waited for. What has to be agreed between ranks in every step (loss
counts, the stop flag, the digest of the data) travels in one integer reduction on the host.
"""

from __future__ import annotations

import gc
import time
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..models.errors import CheckpointError, TrainingError
from ..models.task import Task
from .checkpoint.manager import CheckpointManager
from .configuration.schema import TrainingConfig
from .data.loader import PackedLoader, StepBatch
from .distributed import Topology
from .engines.protocol import Engine
from .metrics.accumulator import MetricsAccumulator
from .metrics.progress import Progress
from .metrics.recorder import MetricsRecorder
from .optimization.schedule import learning_rate
from .policies import NonFinitePolicy, StopRequest, is_due
from .seeding import rng_digest, rng_state

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Run", "TrainState", "fit"]

DIGEST_BITS = 61


@dataclass
class TrainState:
    """The loop's own progress; goes into every checkpoint as it stands."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    non_finite_steps: int = 0


@dataclass
class Run:
    """Everything one attempt at a run works with."""

    config: TrainingConfig
    topology: Topology
    task: Task
    engine: Engine
    loader: PackedLoader
    checkpoints: CheckpointManager
    recorder: MetricsRecorder
    progress: Progress
    state: TrainState
    evaluate: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """What all ranks found out together about this step, before any of it ran."""

    counts: dict[str, int]
    target_bytes: int
    data_digest: int
    stop: bool


def fit(run: Run, stop: StopRequest) -> str:
    """Collective: train from `run.state.step` to the end, or until a rank is asked to stop.

    Returns:
        `finished` or `stopped`. Either way the last step is in a committed checkpoint.

    Raises:
        TrainingError: the non-finite policy, or too many failed saves.
    """
    config, state = run.config, run.state
    accumulator = MetricsAccumulator()
    non_finite = NonFinitePolicy(
        config.train.non_finite, config.train.non_finite_budget, state.non_finite_steps
    )
    outcome, last_flush = "finished", time.perf_counter()
    attempt_start = time.monotonic() - state.seconds
    _tidy_garbage_collector()
    while state.step < config.train.steps:
        step_batch = run.loader.next_step()
        agreed = _agree(run, step_batch, stop.is_asked(state.step))
        if agreed.stop:
            # The batch was not trained on, so the loader's position must not count it.
            outcome = "stopped"
            run.loader.give_back(step_batch)
            break
        step = state.step + 1
        rate = learning_rate(
            config.schedule, config.optimizer.lr, step, config.train.batch_tokens, config.train.steps
        )
        values = _train_step(run, step, step_batch, agreed, rate)
        state.step = step
        state.tokens += step_batch.rows * config.data.sequence_length
        state.flops += run.flops_per_step
        accumulator.add(step, {**values, **_host_values(run, step_batch, agreed, rate)})

        is_last = step == config.train.steps
        wants_save = is_last or run.checkpoints.is_due(step)
        wants_evaluation = is_due(config.eval.every, step) or (is_last and config.eval.at_end)
        if is_due(config.logging.every, step) or wants_save or wants_evaluation:
            state.seconds = time.monotonic() - attempt_start
            last_flush = _flush(run, accumulator, non_finite, last_flush)
        if wants_evaluation:
            run.recorder.log(step, run.evaluate())
        if wants_save:
            save(run, kind="final" if is_last else "periodic")
        run.progress.update(step)
    if outcome == "stopped":
        state.seconds = time.monotonic() - attempt_start
        _flush(run, accumulator, non_finite, last_flush)
        save(run, kind="final")
    run.checkpoints.wait()
    return outcome
