"""Step K of a run again, in one process, from the nearest sound checkpoint before it.

A run's samples are a function of (seed, place in the order), and what is drawn in a forward pass one of (seed, first sample of
the micro-batch). So micro-batches are cut here as each rank cut them, and all ranks' shares are run one after the other.
Nothing in the run folder is written.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models import build_task
from ...models.batch import PackedBatch
from ...models.errors import ConfigError
from ...models.task import Task
from ..base_weights import load_base_weights
from ..checkpoint.manager import CheckpointManager
from ..configuration.load import load_run_config
from ..configuration.schema import TrainingConfig
from ..data.dataset import Dataset, open_data
from ..data.loader import PackedLoader
from ..distributed import Topology
from ..engines.build import build_engine
from ..engines.protocol import Engine
from ..opening import restore, start_from
from .history import RunHistory, StepPlan
from .kernels import compare_kernels
from .parameters import named_parameters, report_gradients
from .report import Comparison, ReplayReport
from .samples import sample_losses
from .statistics import StatisticsVisitor, Stop, visit_modules
from .streaming import StreamedNetworks

__all__ = ["ReplayOptions", "replay_step"]


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay and what to look at.

    Args:
        step: None is the last recorded one.
        rank: only this rank's share of the step; the steps before are trained with all shares.
        ranks: world size of the run, where its folder does not say it.
        fp32: compute in fp32 whatever the run did.
        stream: read block by block from the checkpoint instead of holding the model.
        reference: also compare with the reference kernels.
        samples: measure each sample's own loss.
        on_failure, break_at, on_break: see `StatisticsVisitor`.
    """

    step: int | None = None
    rank: int | None = None
    ranks: int | None = None
    fp32: bool = False
    stream: bool = False
    reference: bool = False
    samples: bool = True
    on_failure: Stop | None = None
    break_at: str | None = None
    on_break: Stop | None = None


@dataclass
class _Session:
    """A replay that is under way."""

    config: TrainingConfig
    options: ReplayOptions
    history: RunHistory
    topology: Topology
    data: Dataset
    task: Task
    say: Callable[[str], None]
    loaders: dict[tuple[int, int, int], PackedLoader] = field(default_factory=dict)

    def batches(self, plan: StepPlan, rank: int | None = None) -> list[PackedBatch]:
        """Micro-batches of a step as the ranks cut them; of all ranks, or of one."""
        found = []
        for r in range(plan.ranks) if rank is None else (rank,):
            found += self._loader(plan, r).assemble(plan.first_sample).micro_batches
        return found

    def _loader(self, plan: StepPlan, rank: int) -> PackedLoader:
        key = (plan.rows, plan.ranks, rank)
        if key not in self.loaders:
            self.loaders[key] = PackedLoader(
                self.data,
                seed=self.config.run.seed,
                batch_rows=plan.rows,
                micro_batch_rows=plan.micro_rows,
                data_rank=rank,
                data_ranks=plan.ranks,
                task=self.task,
                # Nothing is fetched ahead: steps are asked for one by one.
                end_sample=0,
            )
        return self.loaders[key]

    def counts(self, batches: Sequence[PackedBatch]) -> dict[str, int]:
        """What losses are divided by."""
        total: dict[str, int] = {}
        for batch in batches:
            for name, count in self.task.counts(batch).items():
                total[name] = total.get(name, 0) + count
        return total


def replay_step(
    run_dir: Path,
    options: ReplayOptions,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> ReplayReport:
    """Replay a step and measure it.

    Args:
        overrides: `key=value` on the run's configuration; `parallel` starts from its defaults.
        say: told of what takes time.

    Raises:
        ConfigError: no such step, rank or module; samples that do not divide over the ranks.
        CheckpointError: nothing to stream from.
        DataError: the data is not here, or is not what the run saw.
    """
    started = time.monotonic()
    config, notes = _configuration(run_dir, options, overrides)
    history = RunHistory(run_dir, config, options.ranks)
    history.notes += notes
    step = history.last_recorded if options.step is None else options.step
    if options.step is None and not step:
        raise ConfigError(f"{run_dir} has no recorded step yet; name one with --step")
    history.check_step(step)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    use_cuda = torch.cuda.is_available() and config.run.device != "cpu"
    topology = Topology(device=torch.device("cuda", 0) if use_cuda else torch.device("cpu"))
    task = build_task(config.model)
    _check_module(task, options.break_at)
    data = open_data(config.data)
    session = _Session(config, options, history, topology, data, task, say)
    report = _replay_streamed(session, step) if options.stream else _replay(session, step)
    report.seconds = time.monotonic() - started
    return report


def _configuration(
    run_dir: Path, options: ReplayOptions, overrides: Sequence[str]
) -> tuple[TrainingConfig, list[str]]:
    was = load_run_config(run_dir, overrides).config
    given = ["parallel={}", *overrides]
    notes = []
    if options.fp32:
        given.append("precision.compute=fp32")
    if was.run.device == "cuda" and not torch.cuda.is_available():
        given.append("run.device=cpu")
        notes.append("run.device is cuda and there is none here: replayed on the CPU")
    config = load_run_config(run_dir, given).config
    if was.precision.compute != config.precision.compute:
        notes.append(f"the run computed in {was.precision.compute}, this replay in fp32")
    if was.parallel.strategy in ("fsdp", "hsdp") and config.precision.compute == "bf16":
        notes.append(
            "the run was sharded and kept its weights in bf16 where they are used; here autocast chooses by operation: "
            "expect differences of about 1e-3"
        )
    return config, notes


def _check_module(task: Task, name: str | None) -> None:
    if name is None:
        return
    with torch.device("meta"):
        networks = task.build_networks()
    names = [
        f"{network}.{dotted}".rstrip(".")
        for network, root in networks.items()
        for dotted, _ in root.named_modules()
    ]
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        raise ConfigError(f"there is no module {name!r}; there is {', '.join(near)}")


def _replay(session: _Session, step: int) -> ReplayReport:
    config, history = session.config, session.history
    engine = build_engine(session.task, config, session.topology)
    manager = CheckpointManager(history.run_dir, config.checkpoint, session.topology)
    found = history.find_checkpoint(step)
    reached = samples = 0
    restored = restore(engine, manager, session.data, config, found.path) if found else None
    if restored is not None:
        reached, samples = restored.train.step, restored.train.samples
    elif config.checkpoint.start_from:
        start_from(engine, manager, config)
    known = restored.base_weights if restored else {}
    load_base_weights(session.task, engine, manager, is_new=restored is None, known=known)
    for number in range(reached + 1, step):
        session.say(f"training step {number} again ({number - reached} of {step - 1 - reached})")
        plan = history.plan(number, samples)
        _train(session, engine, plan)
        samples = plan.first_sample + plan.rows
    plan = history.plan(step, samples)
    return _measure(session, engine, plan, found.step if found else None)


def _train(session: _Session, engine: Engine, plan: StepPlan) -> None:
    batches = session.batches(plan)
    counts = session.counts(batches)
    session.task.begin_step(plan.step)
    for phase in session.task.phases(plan.step):
        sums = engine.forward_backward(phase, batches, counts)
        loss = _means(sums, counts, engine.count_of)["loss"]
        engine.step(phase, plan.learning_rate, loss)


def _means(
    sums: dict[str, Tensor], counts: dict[str, int], count_of: dict[str, str]
) -> dict[str, Tensor]:
    """Means under the names of records, each by its own count: the first term is called loss."""
    means = {name: total / max(1, counts[count_of[name]]) for name, total in sums.items()}
    return dict(zip(["loss", *list(means)[1:]], means.values(), strict=True))


def _replay_streamed(session: _Session, step: int) -> ReplayReport:
    phases = session.task.phases(step)
    if len(phases) > 1:
        raise ConfigError(
            f"step {step} has the phases {', '.join(phases)}, and --stream replays steps of one; leave it out"
        )
    found = session.history.checkpoint_right_before(step)
    assert found.manifest is not None
    state = found.manifest.state
    session.data.check_fingerprint(state["data"]["fingerprint"])
    networks = StreamedNetworks(session.task, session.config, found.path, session.topology.device)
    plan = session.history.plan(step, state["train"]["samples"])
    return _measure(session, networks, plan, found.step)


def _measure(
    session: _Session, runner: Engine | StreamedNetworks, plan: StepPlan, checkpoint: int | None
) -> ReplayReport:
    options, task = session.options, session.task
    if options.rank is not None and options.rank >= plan.ranks:
        raise ConfigError(
            f"there is no rank {options.rank}: step {plan.step} was trained on ranks 0 to {plan.ranks - 1}; "
            "if that is wrong, give their number with --ranks"
        )
    session.say(f"replaying step {plan.step}")
    batches = session.batches(plan, options.rank)
    counts = session.counts(batches)
    report = ReplayReport(
        run_dir=str(session.history.run_dir),
        step=plan.step,
        checkpoint=checkpoint,
        ranks=plan.ranks,
        rank=options.rank,
        first_sample=batches[0].sample_ids[0],
        last_sample=batches[-1].sample_ids[-1],
        micro_batches=len(batches),
        device=str(session.topology.device),
        compute=session.config.precision.compute,
        streamed=options.stream,
        notes=session.history.notes,
    )
    if options.samples:
        report.samples = sample_losses(
            batches, runner.evaluate, session.config.run.seed, session.data.modalities
        )
        report.source_names = [source.name for source in session.data.sources]
        report.vocabulary = session.data.vocabulary
    task.begin_step(plan.step)
    for phase in task.phases(plan.step):
        if options.reference and not isinstance(runner, StreamedNetworks):
            _compare_with_reference(report, runner, phase, batches[0], counts)
        _measure_phase(report, session, runner, phase, plan, batches, counts)
    report.values |= {
        "lr": plan.learning_rate,
        "target_tokens": sum(batch.target_count for batch in batches),
        "data_digest": sum(_digest(batch) for batch in batches),
    }
    if plan.record is not None and options.rank is None:
        report.comparisons = _compare(plan.record, report.values)
    if isinstance(runner, StreamedNetworks):
        report.peak_weight_bytes = runner.peak_bytes
    return report


def _digest(batch: PackedBatch) -> int:
    """As the loop's: a sum over rows, whatever the split over ranks."""
    return sum(zlib.crc32(row) for row in batch.tokens.view(batch.rows, -1).numpy())


def _measure_phase(
    report: ReplayReport,
    session: _Session,
    runner: Engine | StreamedNetworks,
    phase: str,
    plan: StepPlan,
    batches: Sequence[PackedBatch],
    counts: dict[str, int],
) -> None:
    options = session.options
    visitor = StatisticsVisitor(options.on_failure, options.break_at, options.on_break)
    with visit_modules(runner.networks, visitor):
        sums = runner.forward_backward(phase, batches, counts)
    means = _means(sums, counts, runner.count_of)
    prefix = "" if phase == "train" else f"{phase}/"
    values: dict[str, Any] = {name: float(mean) for name, mean in means.items()}
    if isinstance(runner, StreamedNetworks):
        parameters = runner.reports
    else:
        parameters = report_gradients(runner.networks)
    norms = [p.gradient_norm for p in parameters.values() if p.gradient_norm is not None]
    values["grad_norm"] = sum(norm**2 for norm in norms) ** 0.5
    if not isinstance(runner, StreamedNetworks) and options.rank is None:
        values |= _update(runner, phase, plan, means["loss"], parameters)
    report.values |= {f"{prefix}{name}": value for name, value in values.items()}
    report.add_phase(phase, visitor, parameters)


def _update(
    engine: Engine, phase: str, plan: StepPlan, loss: Tensor, parameters: dict[str, Any]
) -> dict[str, float]:
    weights = named_parameters(engine.networks)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    result = engine.step(phase, plan.learning_rate, loss)
    for name, weight in weights.items():
        if parameters[name].gradient is not None and parameters[name].weight_norm:
            change = torch.linalg.vector_norm(weight.detach() - before[name])
            parameters[name].update_ratio = float(change) / parameters[name].weight_norm
    return {"grad_norm": float(result.grad_norm), "skipped": float(result.skipped)}


def _compare_with_reference(
    report: ReplayReport, engine: Engine, phase: str, batch: PackedBatch, counts: dict[str, int]
) -> None:
    def run() -> None:
        engine.forward_backward(phase, [batch], counts)

    face, found = compare_kernels(engine.networks, run, engine.topology.device)
    report.kernels, report.kernel_differences = face, found


def _compare(record: dict[str, Any], values: dict[str, Any]) -> list[Comparison]:
    return [
        Comparison(name, record[name], value) for name, value in values.items() if name in record
    ]
