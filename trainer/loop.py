"""The loop of every run: data, forward and backward, update, measure, evaluate, save.

`fit` reads top to bottom and knows steps and phases, not models. Values of a step stay on the device until the
accumulator is flushed, so a GPU is never waited for. What ranks have to agree on in every step (loss counts,
the stop flag, the digest of the data) travels in one integer reduction on the host.
"""

from __future__ import annotations

import gc
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

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
from .metrics.throughput import StepClock, add_rates, peak_flops
from .optimization.schedule import learning_rate
from .policies import NonFinitePolicy, StopRequest, is_due
from .seeding import rng_state

__all__ = ["Run", "TrainState", "fit", "save"]

GC_EVERY = 1000


@dataclass
class TrainState:
    """The loop's own progress; goes into every checkpoint as it stands."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    non_finite_steps: int = 0
    source_samples: dict[str, int] = field(default_factory=dict)


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
    fixed_state: dict[str, Any]
    """What every checkpoint says about the run besides its progress: fingerprints, configuration hash."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks found out together about a step before any of it ran."""

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
    config, state, accumulator = run.config, run.state, MetricsAccumulator()
    policy = NonFinitePolicy(
        config.train.non_finite, config.train.non_finite_budget, state.non_finite_steps
    )
    clock = StepClock(state.seconds)
    outcome = "finished"
    gc.collect()
    # The collector runs at the same step on all ranks: left to itself one rank at a time would stall them all.
    gc.disable()
    try:
        while state.step < config.train.steps:
            step_batch = run.loader.next_step()
            agreed = _agree(run, step_batch, stop.is_asked(state.step))
            if agreed.stop:
                outcome = "stopped"
                break
            step = state.step + 1
            values = _train_step(run, step, step_batch, agreed)
            _advance(state, run, step_batch)
            accumulator.add(
                step, {**values, **clock.lap(step_batch.wait_s), **_progress_values(state)}
            )

            is_last = step == config.train.steps
            wants_save = is_last or is_due(config.checkpoint.every, step)
            wants_evaluation = is_due(config.eval.every, step) or (is_last and config.eval.at_end)
            if is_due(config.logging.every, step) or wants_save or wants_evaluation:
                state.seconds = clock.total()
                _flush(run, accumulator, policy)
            held_out: dict[str, Any] = {}
            if wants_evaluation:
                # Empty where a stop cut it short: half an evaluation is no record.
                if held_out := run.evaluate():
                    run.recorder.log(step, held_out)
                clock.restart_lap()
            if wants_save:
                score = held_out.get("eval/loss")
                save(run, kind="final" if is_last else "periodic", score=score)
                clock.restart_lap()
            if is_due(GC_EVERY, step):
                gc.collect()
            run.progress.update(step)
    finally:
        gc.enable()
    if outcome == "stopped":
        state.seconds = clock.total()
        _flush(run, accumulator, policy)
        save(run, kind="final")
    run.checkpoints.wait()
    return outcome


def _agree(run: Run, step_batch: StepBatch, wants_stop: bool) -> Agreement:
    """Collective: the step's global counts, a digest of its data, and whether anyone wants to stop."""
    names: list[str] = []
    counts: dict[str, int] = {}
    digest = target_bytes = 0
    for batch in step_batch.micro_batches:
        for name, count in run.task.counts(batch).items():
            counts[name] = counts.get(name, 0) + count
        target_bytes += batch.target_bytes
        # A sum over rows: the same for any split of the step over ranks.
        digest += sum(zlib.crc32(row) for row in batch.tokens.view(batch.rows, -1).numpy())
    names = sorted(counts)
    summed = run.topology.sum_integers(
        [*(counts[n] for n in names), target_bytes, digest, int(wants_stop)]
    )
    *totals, target_bytes, digest, stop = summed
    return Agreement(dict(zip(names, totals, strict=True)), target_bytes, digest, stop > 0)


def _train_step(
    run: Run, step: int, step_batch: StepBatch, agreed: Agreement
) -> dict[str, Tensor | float | int]:
    """Collective: every phase's gradient and update; values stay on the device."""
    config = run.config
    rate = learning_rate(
        config.schedule, config.optimizer.lr, step, config.train.batch_tokens, config.train.steps
    )
    # A step whose every target is masked still runs; dividing by one keeps its zero loss zero.
    counts = {name: max(1, count) for name, count in agreed.counts.items()}
    values: dict[str, Tensor | float | int] = {}
    for phase in run.task.phases(step):
        sums = run.engine.forward_backward(phase, step_batch.micro_batches, counts)
        means = {
            name: total / counts["tokens"]
            for name, total in run.engine.sum_over_ranks(sums).items()
        }
        loss = next(iter(means.values()))
        result = run.engine.step(phase, rate, loss)
        prefix = "" if phase == "train" else f"{phase}/"
        # The first term is the objective proper; it is called loss whatever the family calls it.
        named = dict(zip(["loss", *list(means)[1:]], means.values(), strict=True))
        values |= {f"{prefix}{name}": mean for name, mean in named.items()}
        values |= {f"{prefix}grad_norm": result.grad_norm, f"{prefix}skipped": result.skipped}
    values |= {
        "lr": rate,
        "target_tokens": agreed.counts.get("tokens", 0),
        "target_bytes": agreed.target_bytes,
    }
    values |= {"data_digest": agreed.data_digest, "first_sample": step_batch.first_sample}
    return values | {f"epoch/{name}": epoch for name, epoch in step_batch.epochs.items()}


def _advance(state: TrainState, run: Run, step_batch: StepBatch) -> None:
    length = run.config.data.sequence_length
    state.step += 1
    state.samples = step_batch.first_sample + step_batch.rows
    state.tokens += step_batch.rows * length
    state.flops += step_batch.rows * length * run.task.flops_per_token(length)
    for name, count in step_batch.source_counts.items():
        state.source_samples[name] = state.source_samples.get(name, 0) + count


def _progress_values(state: TrainState) -> dict[str, float | int]:
    sources = {f"source/{name}/samples": count for name, count in state.source_samples.items()}
    totals = {"tokens": state.tokens, "flops": state.flops, "last_sample": state.samples - 1}
    return {"time": time.time(), **totals, **sources}


def _flush(run: Run, accumulator: MetricsAccumulator, policy: NonFinitePolicy) -> None:
    """Bring the values of the steps since the last flush to the host, and act on them."""
    records = accumulator.flush()
    length = run.config.data.sequence_length
    tokens = run.config.batch_rows * length
    peak = peak_flops(_device_name(run.topology))
    world_peak = peak * run.topology.world_size if peak else None
    add_rates(records, tokens, tokens * run.task.flops_per_token(length), world_peak)
    for record in records:
        if record["target_bytes"]:
            record["bits_per_byte"] = (
                record["loss"] * record["target_tokens"] / math.log(2) / record["target_bytes"]
            )
        run.recorder.log(int(record["step"]), record)
        policy.check(record)
        run.state.non_finite_steps = policy.seen
    run.progress.show(records)


def _device_name(topology: Topology) -> str | None:
    return torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else None


def save(run: Run, kind: str, score: float | None = None) -> None:
    """Collective: hand the run's whole state to the checkpoint manager.

    Args:
        score: held-out loss at this step, where it was measured.

    Raises:
        TrainingError: too many saves in a row failed.
    """
    state = {
        "step": run.state.step,
        "train": asdict(run.state),
        "engine": run.engine.scalar_state(),
        "score": score,
        **run.fixed_state,
    }
    try:
        run.checkpoints.save(
            run.state.step, run.engine.state_shards(), state, rng_state(), kind=kind
        )
        if kind == "final":
            run.checkpoints.wait()
    except CheckpointError as error:
        if (
            kind == "final"
            or run.checkpoints.failed_saves >= run.config.checkpoint.max_failed_saves
        ):
            raise TrainingError(f"step {run.state.step} could not be saved: {error}") from error
        run.recorder.log(run.state.step, {"save_failed": str(error)})
        run.progress.message(f"a save failed, the next one will be tried: {error}")
