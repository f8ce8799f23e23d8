"""The loop of every run: data, forward and backward, update, measure, evaluate, save.

`fit` reads top to bottom and knows steps and phases, not models. Values of a step stay on the device until the
accumulator is flushed, so a GPU is never waited for. What ranks have to agree on in every step (loss counts,
the stop flag, the digest of the data) travels in one integer reduction on the host.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.batch import PackedBatch
from ..models.errors import CheckpointError, TrainingError
from ..models.task import Task
from .checkpoint.manager import CheckpointManager
from .configuration.schema import TrainingConfig
from .data.loader import PackedLoader, StepBatch
from .distributed import Topology
from .engines.protocol import Engine
from .files import write_json
from .metrics.accumulator import MetricsAccumulator
from .metrics.patches import add_part_shares, add_patch_values
from .metrics.progress import Progress
from .metrics.recorder import MetricsRecorder
from .metrics.records import plain_json
from .metrics.throughput import StepClock, add_rates, peak_flops
from .optimization.schedule import learning_rate
from .policies import NonFinitePolicy, Rollback, SpikePolicy, Stop, StopRequest, is_due
from .profiling import StepProfiler
from .seeding import rng_state
from .watchdog import Phase

__all__ = ["Run", "Supervision", "TrainState", "fit", "save"]

GC_EVERY = 1000
STOPS = (Stop.TIME_LIMIT, Stop.PREEMPTED, Stop.ASKED)
COUNT_BITS = 20
"""Of a number of ranks; three of them and two flags fit into one int64."""


@dataclass
class TrainState:
    """The loop's own progress; goes into every checkpoint as it stands.

    Args:
        samples: where in the run's order the next step begins.
        left_out: ranges `[first, stop)` of samples that a rollback took out of the order.
        owes_evaluation: a stop cut the evaluation of this step short.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    non_finite_steps: int = 0
    rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    owes_evaluation: bool = False
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
    spikes: SpikePolicy | None
    """On rank 0 where `train.spike` asks for it."""
    evaluate: Callable[[], dict[str, Any]]
    rewind: Callable[[Path], None]
    """Collective: take everything back to a checkpoint."""
    fixed_state: dict[str, Any]
    """What every checkpoint says about the run besides its progress: fingerprints, configuration hash."""
    supervision: Supervision
    profiler: StepProfiler
    count_names: tuple[str, ...] = ()
    """Counts of a step, once one is known."""
    verdict: Rollback | None = None
    """What rank 0 alone found out, until the others are told."""


@dataclass(frozen=True)
class Supervision:
    """Who is told how an attempt goes: the watchdog of this rank, and on rank 0 the attempt's history."""

    enter: Callable[[Phase], None] = lambda phase: None
    event: Callable[..., None] = lambda event, **values: None
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Agreement:
    """What all ranks found out together about a step before any of it ran."""

    counts: dict[str, int]
    target_bytes: int
    data_digest: int
    stop: Stop
    save: bool
    rollback: Rollback | None


class RollbackError(Exception):
    """All ranks go back, at the same place."""

    def __init__(self, verdict: Rollback) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


def fit(run: Run, stop: StopRequest) -> Stop:
    """Collective: train from `run.state.step` to the end, or until a rank is asked to stop.

    Returns:
        `Stop.NOT` where the run is finished, else why it stopped. Either way the last step is in a committed checkpoint.

    Raises:
        TrainingError: a policy, or too many failed saves.
    """
    gc.collect()
    # The collector runs at the same step on all ranks: left to itself one rank at a time would stall them all.
    gc.disable()
    try:
        while True:
            try:
                return _train_until_stopped(run, stop)
            except RollbackError as error:
                _roll_back(run, error.verdict)
    finally:
        gc.enable()


def _train_until_stopped(run: Run, stop: StopRequest) -> Stop:
    config, state, accumulator = run.config, run.state, MetricsAccumulator()
    policy = NonFinitePolicy(
        config.train.non_finite, config.train.non_finite_budget, state.non_finite_steps
    )
    clock = StepClock(state.seconds)
    first_step = state.step + 1
    reason = Stop.NOT
    if state.owes_evaluation:
        _evaluate(run, state.step)
    while state.step < config.train.steps:
        run.supervision.enter("compile" if state.step + 1 == first_step else "step")
        step_batch = _next_batch(run, stop)
        own = (
            [run.engine.own_part(batch) for batch in step_batch.micro_batches] if step_batch else []
        )
        agreed = _agree(run, step_batch, own, stop)
        if agreed.rollback is not None:
            if config.train.spike == "stop":
                raise TrainingError(
                    f"{agreed.rollback.reason}; go on from before it with: weft train --resume {config.run_dir} train.spike=rollback"
                )
            raise RollbackError(agreed.rollback)
        if agreed.stop:
            reason = agreed.stop
            break
        assert step_batch is not None
        step = state.step + 1
        run.profiler.begin(step)
        values = _train_step(run, step, step_batch, own, agreed)
        _advance(state, run, step_batch)
        lap = clock.lap(step_batch.wait_s)
        accumulator.add(step, {**values, **lap, **_progress_values(state)})
        run.profiler.end(step)

        is_last = step == config.train.steps
        wants_save = is_last or is_due(config.checkpoint.every, step) or agreed.save
        wants_evaluation = is_due(config.eval.every, step) or (is_last and config.eval.at_end)
        if is_due(config.logging.every, step) or wants_save or wants_evaluation:
            state.seconds = clock.total()
            _flush(run, accumulator, policy)
        if step == first_step:
            _tell_of_first_step(run)
        held_out: dict[str, Any] = {}
        if wants_evaluation:
            held_out = _evaluate(run, step)
            clock.restart_lap()
        if wants_save:
            save(run, kind="final" if is_last else "periodic", score=held_out.get("eval/loss"))
            clock.restart_lap()
        if is_due(GC_EVERY, step):
            gc.collect()
        stop.reserve_s = 2 * (run.checkpoints.save_seconds + lap["step_s"])
        run.progress.update(step)
    if reason:
        state.seconds = clock.total()
        _flush(run, accumulator, policy)
        save(run, kind="final")
    run.supervision.enter("save")
    run.checkpoints.wait()
    return reason


def _next_batch(run: Run, stop: StopRequest) -> StepBatch | None:
    """None where a stop was asked for while the data kept this rank waiting: the others learn of it instead of waiting too."""
    # Before the first step nobody knows how many counts a step has, which all ranks have to agree on.
    if run.count_names and not run.loader.wait(stop.is_asked):
        return None
    return run.loader.next_step()


def _agree(
    run: Run, step_batch: StepBatch | None, own: Sequence[PackedBatch], stop: StopRequest
) -> Agreement:
    """Collective: the step's global counts, a digest of its data, and whether anyone wants to stop, save or go back.

    Args:
        own: what this rank runs of the step; counts are taken from it.
    """
    counts: dict[str, int] = dict.fromkeys(run.count_names, 0)
    digest = target_bytes = 0
    for batch in own:
        for name, count in run.task.counts(batch).items():
            counts[name] = counts.get(name, 0) + count
    for batch in step_batch.micro_batches if step_batch and run.engine.counts_rows else ():
        target_bytes += batch.target_bytes
        # A sum over rows: the same for any split of the step over ranks.
        digest += sum(zlib.crc32(row) for row in batch.tokens.view(batch.rows, -1).numpy())
    run.count_names = tuple(sorted(counts))
    stops = [int(stop.is_asked() and stop.kind == kind) for kind in STOPS]
    flags = _pack(stop.take_save(), run.verdict is not None, stops)
    *totals, target_bytes, digest, packed = run.topology.sum_integers(
        [*(counts[n] for n in run.count_names), target_bytes, digest, flags]
    )
    wants_save, goes_back, stops = _unpack(packed)
    rollback = None
    if goes_back:
        # Once in a run, so the rest of it does not travel with every step.
        rollback = Rollback(**run.topology.broadcast_json(run.verdict and asdict(run.verdict)))
    return Agreement(
        dict(zip(run.count_names, totals, strict=True)),
        target_bytes,
        digest,
        max((kind for kind, ranks in zip(STOPS, stops, strict=True) if ranks), default=Stop.NOT),
        wants_save,
        rollback,
    )


def _pack(wants_save: bool, goes_back: bool, stops: Sequence[int]) -> int:
    """One integer that can be summed: two bits that only rank 0 sets, then how many ranks ask for each kind of stop."""
    counts = sum(count << (2 + COUNT_BITS * place) for place, count in enumerate(stops))
    return int(wants_save) | int(goes_back) << 1 | counts


def _unpack(packed: int) -> tuple[bool, bool, list[int]]:
    counts = [packed >> (2 + COUNT_BITS * place) & ((1 << COUNT_BITS) - 1) for place in range(3)]
    return bool(packed & 1), bool(packed & 2), counts


def _tell_of_first_step(run: Run) -> None:
    seconds = time.time() - run.supervision.started
    run.supervision.event("training", step=run.state.step, seconds_to_first_step=seconds)
    run.progress.message(f"first step done {seconds:.1f} s after the start")


def _evaluate(run: Run, step: int) -> dict[str, Any]:
    """Collective: held-out numbers, also recorded; empty where a stop cut it short: half an evaluation is no record."""
    run.supervision.enter("evaluation")
    held_out = run.evaluate()
    run.state.owes_evaluation = not held_out
    if held_out:
        run.recorder.log(step, held_out)
    run.supervision.enter("step")
    return held_out


def _roll_back(run: Run, verdict: Rollback) -> None:
    """Collective: to the newest sound checkpoint before the bad steps, whose samples are left out from now on.

    Raises:
        TrainingError: there is no such checkpoint, or this has happened too often.
    """
    state, budget = run.state, run.config.train.rollback_budget
    if state.rollbacks >= budget:
        raise TrainingError(
            f"{verdict.reason}; the run was rolled back {state.rollbacks} times already, train.rollback_budget={budget}; "
            f"look at the step with: weft debug {run.config.run_dir} --step {verdict.step}"
        )
    run.supervision.enter("save")
    with contextlib.suppress(CheckpointError):
        run.checkpoints.wait()
    path = run.checkpoints.find_latest(before=verdict.step)
    if path is None:
        raise TrainingError(
            f"{verdict.reason}; there is no checkpoint from before it to go back to; lower checkpoint.every or raise checkpoint.keep"
        )
    left_out = [*state.left_out, [verdict.first_sample, verdict.stop_sample]]
    run.state = replace(state, rollbacks=state.rollbacks + 1, left_out=left_out)
    run.verdict = None
    run.rewind(path)
    told = f"rolled back to step {run.state.step}: {verdict.reason}; samples {verdict.first_sample} to {verdict.stop_sample - 1} are left out"
    run.recorder.log(run.state.step, {"rolled_back": told})
    run.supervision.event("rolled_back", step=run.state.step, reason=told)
    run.progress.message(told)


def _train_step(
    run: Run, step: int, step_batch: StepBatch, own: Sequence[PackedBatch], agreed: Agreement
) -> dict[str, Tensor | float | int]:
    """Collective: every phase's gradient and update; values stay on the device."""
    config = run.config
    rate = learning_rate(
        config.schedule, config.optimizer.lr, step, config.train.batch_tokens, config.train.steps
    )
    counts = agreed.counts
    values: dict[str, Tensor | float | int] = {}
    run.task.begin_step(step)
    for phase in run.task.phases(step):
        sums = run.engine.forward_backward(phase, own, counts)
        if "patches" in sums:
            # Ranks exchange sums alone: how unevenly patches are spread over them is told by their squares.
            sums["patches_squared"] = sums["patches"].square()
            run.engine.count_of["patches_squared"] = run.engine.count_of["patches"]
        means = {
            # A step whose every target is masked still runs; dividing by one keeps its zero loss zero.
            name: total / max(1, counts[run.engine.count_of[name]])
            for name, total in run.engine.sum_over_ranks(sums).items()
        }
        loss = next(iter(means.values()))
        means |= run.task.summarise(run.engine.sum_vectors())
        result = run.engine.step(phase, rate, loss)
        prefix = "" if phase == "train" else f"{phase}/"
        # The first term is the objective proper; it is called loss whatever the family calls it.
        named = dict(zip(["loss", *list(means)[1:]], means.values(), strict=True))
        values |= {f"{prefix}{name}": mean for name, mean in named.items()}
        values |= {f"{prefix}grad_norm": result.grad_norm, f"{prefix}skipped": result.skipped}
        norms = result.group_norms.items()
        values |= {f"{prefix}{group}/grad_norm": norm for group, norm in norms}
    values |= {
        "lr": rate,
        "target_tokens": agreed.counts.get("tokens", 0),
        "target_bytes": agreed.target_bytes,
    }
    values |= {"data_digest": agreed.data_digest, "first_sample": step_batch.first_sample}
    if step_batch.patch_balance is not None:
        values["patch_balance"] = step_batch.patch_balance
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
    add_part_shares(records, run.task.part_seconds())
    for record in records:
        if record["target_bytes"]:
            record["bits_per_byte"] = (
                record["loss"] * record["target_tokens"] / math.log(2) / record["target_bytes"]
            )
        record.update(run.task.review(record, tokens))
        add_patch_values(record, tokens, run.engine.data_ranks)
        run.recorder.log(int(record["step"]), record)
        if policy.bad_values(record):
            _write_bad_step(run, record)
        verdict = policy.check(record)
        run.state.non_finite_steps = policy.seen
        if verdict is not None:
            raise RollbackError(verdict)
        if run.spikes is not None:
            # Rank 0 alone has the past to judge by; the others are told by the next agreement.
            run.verdict = run.spikes.watch(record) or run.verdict
    run.progress.show(records)


def _write_bad_step(run: Run, record: Mapping[str, Any]) -> None:
    """On rank 0: what is known of a step that is not finite, for whoever looks into it."""
    norms = run.engine.withheld_norms()
    if not run.topology.is_main:
        return
    names = ("step", "loss", "grad_norm", "lr", "first_sample", "last_sample")
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    content = {
        **{name: record.get(name) for name in names},
        "parameters_not_finite": bad,
        "gradient_norms": norms,
        "replay": f"weft debug {run.config.run_dir} --step {record['step']}",
    }
    path = run.config.run_dir / "logs" / f"not_finite_step_{record['step']:08d}.json"
    with contextlib.suppress(OSError):
        write_json(path, plain_json(content))


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
    run.supervision.enter("save")
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
    finally:
        run.supervision.enter("step")
