"""Runs side by side: what their models cost, what they reached, and at how much compute each reaches the others' final value.

Everything comes from RUN/config.yaml and RUN/metrics.jsonl; imports no torch. FLOPs are not those of the records: they are counted
alike for all families, auxiliary models included (`metrics/costs.py`). Read docs/compare.md for the rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.errors import ConfigError, DataError
from .configuration.load import load_run_config
from .configuration.schema import TrainingConfig
from .metrics.costs import Costs, model_costs
from .metrics.curves import Crossover, Curve, crossover, first_reach, smoothed
from .metrics.records import METRICS_FILE, plain_json, read_metrics

__all__ = [
    "AXES",
    "ComparedRun",
    "Comparison",
    "Match",
    "check_vocabularies",
    "compare_runs",
    "metric_curve",
    "read_run",
    "read_runs",
]

AXES = ("training-flops", "inference-flops", "bytes", "tokens", "seconds")
POINT_AXIS = "inference-flops"
"""A run has one such cost, so it is a point and not a curve."""
USUAL_WINDOW_SHARE, USUAL_WINDOW = 0.02, 10


@dataclass(frozen=True)
class ComparedRun:
    """A run as far as it went.

    Args:
        tokens, seconds: (N,) totals by record.
        bytes_per_token: raw bytes of an id on average; None where ids have none.
        patch_size: mean bytes a patch over the run; None where there are no patches.
    """

    name: str
    folder: Path
    config: TrainingConfig
    records: list[dict[str, Any]]
    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]
    bytes_per_token: float | None
    patch_size: float | None
    costs: Costs

    @property
    def bytes(self) -> NDArray[np.float64] | None:
        """(N,) raw bytes read; None where they are not known."""
        return None if self.bytes_per_token is None else self.tokens * self.bytes_per_token

    @property
    def training_flops(self) -> NDArray[np.float64]:
        """(N,) FLOPs spent, auxiliary models included."""
        read = self.bytes
        return self.costs.training * (self.tokens if read is None else read)

    def axis(self, name: str) -> NDArray[np.float64]:
        """(N,) the cost of this name at each record.

        Raises:
            ConfigError: bytes, or inference FLOPs a byte, of a run whose ids have none.
        """
        if name == "tokens":
            return self.tokens
        if name == "seconds":
            return self.seconds
        if name == "training-flops":
            return self.training_flops
        read = self.bytes
        if read is None:
            raise ConfigError(
                f"{self.folder}: its vocabulary does not know its bytes; compare against training-flops, tokens or seconds"
            )
        return read if name == "bytes" else np.full(len(read), self.costs.inference)

    def curve(self, metric: str, against: str) -> Curve:
        """The finite values of a metric; empty without any."""
        values = np.array([_number(record.get(metric)) for record in self.records])
        there = np.isfinite(values)
        return Curve(self.axis(against)[there], values[there])


@dataclass(frozen=True)
class Match:
    """How a run gets to another's final value.

    Args:
        run, other: names.
        value: the other's final value, smoothed.
        at: the cost at which `run` first has it; None where it never has.
        is_first: it has it in its very first record: `at` is the most that it can have cost.
        other_at: what the other spent in all.
    """

    run: str
    other: str
    value: float
    at: float | None
    is_first: bool
    other_at: float

    @property
    def ratio(self) -> float | None:
        """Share of the other's cost; below 1 the run is the cheaper way."""
        return None if self.at is None else self.at / self.other_at


@dataclass(frozen=True)
class Comparison:
    """Runs, their curves in the same order, and what follows.

    Args:
        windows: records that each curve's values are means of.
        curves, smooth: by run, as recorded and smoothed.
        matches: of every ordered pair; empty where runs are points.
        crossings: of every pair.
        frontier: names of the runs that no other run beats in both value and cost.
        notes: what makes the comparison less than fair.
    """

    metric: str
    against: str
    runs: list[ComparedRun]
    windows: list[int]
    curves: list[Curve]
    smooth: list[Curve]
    matches: list[Match]
    crossings: list[tuple[str, str, Crossover]]
    frontier: list[str]
    notes: list[str]

    def final(self, index: int) -> float:
        return float(self.smooth[index].y[-1])

    def best(self, index: int) -> float:
        return float(self.smooth[index].y.min())

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON's terms."""
        found: dict[str, Any] = {"metric": self.metric, "against": self.against}
        found["runs"] = [self._run_as_dict(i) for i in range(len(self.runs))]
        found["matches"] = [{**vars(match), "ratio": match.ratio} for match in self.matches]
        found["crossings"] = [
            {
                "runs": [a, b],
                "at": item.x,
                "value": item.y,
                "leader": None if item.leader is None else (a, b)[item.leader],
                "count": item.count,
            }
            for a, b, item in self.crossings
        ]
        found |= {"frontier": self.frontier, "notes": self.notes}
        return dict(plain_json(found))

    def _run_as_dict(self, index: int) -> dict[str, Any]:
        run, smooth = self.runs[index], self.smooth[index]
        read = run.bytes
        return {
            "name": run.name,
            "folder": str(run.folder),
            "family": getattr(run.config.model, "family", None),
            "steps": run.records[-1]["step"],
            "tokens": run.tokens[-1],
            "bytes": None if read is None else read[-1],
            "bytes_per_token": run.bytes_per_token,
            "patch_size": run.patch_size,
            "seconds": run.seconds[-1],
            "training_flops": run.training_flops[-1],
            "costs": run.costs.as_dict(),
            "smoothed_over": self.windows[index],
            "final": self.final(index),
            "best": self.best(index),
            "best_at": smooth.x[int(smooth.y.argmin())],
            "curve": {"x": list(smooth.x), "y": list(smooth.y)},
        }


def compare_runs(
    folders: Sequence[Path],
    *,
    metric: str | None = None,
    against: str = "training-flops",
    window: int | None = None,
) -> Comparison:
    """Compare runs.

    Args:
        folders: of two or more runs.
        metric: a name in their records; None is bits per byte, or the loss where no run knows its bytes.
        against: one of AXES.
        window: records a value is a mean of, half of them before it and half after; None is 2 % of a run, at least 10, and 1 for held-out metrics.

    Raises:
        ConfigError: fewer than two runs, one named twice, runs of different vocabularies compared on anything but bits per byte,
            or bytes of a vocabulary that has none.
        DataError: a run without records, or without this metric.
    """
    runs = read_runs(folders)
    chosen = metric or _usual_metric(runs)
    check_vocabularies(runs, chosen)
    curves = [metric_curve(run, chosen, against) for run in runs]
    windows = [window or _usual_window(curve, chosen) for curve in curves]
    smooth = [smoothed(curve, size) for curve, size in zip(curves, windows, strict=True)]
    is_points = against == POINT_AXIS
    return Comparison(
        metric=chosen,
        against=against,
        runs=runs,
        windows=windows,
        curves=curves,
        smooth=smooth,
        matches=[] if is_points else _matches(runs, smooth),
        crossings=[] if is_points else _crossings(runs, smooth),
        frontier=_frontier(runs, smooth),
        notes=_notes(runs, chosen),
    )


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Several runs, with names that tell them apart.

    Raises:
        ConfigError: fewer than two, or one named twice.
        DataError: one has no records of training.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ConfigError(
            f"found {len(folders)} runs to compare, expected two or more different ones; name another run folder"
        )
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_run(folder: Path, name: str | None = None) -> ComparedRun:
    """What a run's configuration and records say.

    Raises:
        ConfigError: not a run folder.
        DataError: it has no records of training.
    """
    config = load_run_config(folder, []).config
    records = [record for record in read_metrics(folder) if record.get("tokens")]
    if not records:
        raise DataError(
            f"{folder / METRICS_FILE} has no training steps to compare; let the run log some first"
        )
    targets = sum(record.get("target_tokens", 0) for record in records)
    raw = sum(record.get("target_bytes", 0) for record in records)
    bytes_per_token = raw / targets if targets and raw else None
    patch_size = _patch_size(records)
    costs = model_costs(
        config.model,
        config.data.sequence_length,
        bytes_per_token=bytes_per_token,
        patch_size=patch_size,
    )
    return ComparedRun(
        name=name or folder.name,
        folder=folder,
        config=config,
        records=records,
        tokens=np.array([float(record["tokens"]) for record in records]),
        seconds=np.array([_number(record.get("seconds")) for record in records]),
        bytes_per_token=bytes_per_token,
        patch_size=patch_size,
        costs=costs,
    )


def _patch_size(records: list[dict[str, Any]]) -> float | None:
    """Bytes over patches: the harmonic mean of steps of one size."""
    sizes = np.array([_number(record.get("patch_size")) for record in records])
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return float(len(sizes) / np.sum(1 / sizes)) if len(sizes) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _names(folders: Sequence[Path]) -> list[str]:
    """Last parts of the paths, or the paths where those are not enough."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _usual_metric(runs: list[ComparedRun]) -> str:
    return "loss" if all(run.bytes_per_token is None for run in runs) else "bits_per_byte"


def _usual_window(curve: Curve, metric: str) -> int:
    if metric.startswith("eval/"):
        return 1
    return max(USUAL_WINDOW, round(USUAL_WINDOW_SHARE * len(curve)))


def check_vocabularies(runs: list[ComparedRun], metric: str) -> None:
    """Raises: ConfigError: runs of different vocabularies, and a metric that depends on them."""
    if metric.rpartition("/")[2].startswith("bits_per_byte"):
        return
    first = runs[0]
    for run in runs[1:]:
        if run.config.data.vocabulary != first.config.data.vocabulary:
            raise ConfigError(
                f"{metric} of different vocabularies says nothing: {first.name} has {first.config.data.vocabulary}, "
                f"{run.name} has {run.config.data.vocabulary}; compare them with --metric bits_per_byte"
            )


def metric_curve(run: ComparedRun, metric: str, against: str) -> Curve:
    """A metric of a run over a cost.

    Raises:
        DataError: the run has no finite value of it; names those it has.
    """
    curve = run.curve(metric, against)
    if not len(curve):
        known = {name for record in run.records for name in record if _is_metric(name)}
        raise DataError(
            f"{run.folder} has no finite {metric}; it has {', '.join(sorted(known)) or 'none to compare'}"
        )
    return curve


def _is_metric(name: str) -> bool:
    """What is worth naming; held-out values of single sources are there as well."""
    short = name.removeprefix("eval/")
    return short in ("loss", "bits_per_byte", "perplexity", "denoising") or (
        "/" not in short and short.endswith("_loss") and short != "z_loss"
    )


def _matches(runs: list[ComparedRun], curves: list[Curve]) -> list[Match]:
    found = []
    for i, j in itertools.permutations(range(len(runs)), 2):
        value, spent = float(curves[j].y[-1]), float(curves[j].x[-1])
        at, is_first = first_reach(curves[i], value), float(curves[i].y[0]) <= value
        found.append(Match(runs[i].name, runs[j].name, value, at, is_first, spent))
    return found


def _crossings(runs: list[ComparedRun], curves: list[Curve]) -> list[tuple[str, str, Crossover]]:
    found = [
        (runs[i].name, runs[j].name, crossover(curves[i], curves[j]))
        for i, j in itertools.combinations(range(len(runs)), 2)
    ]
    return [(a, b, item) for a, b, item in found if item is not None]


def _frontier(runs: list[ComparedRun], curves: list[Curve]) -> list[str]:
    ends = [(curve.x[-1], curve.y[-1]) for curve in curves]
    return [
        run.name
        for run, (x, y) in zip(runs, ends, strict=True)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in ends)
    ]


def _notes(runs: list[ComparedRun], metric: str) -> list[str]:
    """What differs between runs and is not the model."""
    notes = []
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = first.config.data, run.config.data
        pair = f"{first.name} and {run.name}"
        if _sources(first) != _sources(run):
            notes.append(
                f"{pair} read different data: {', '.join(_sources(first))} and {', '.join(_sources(run))}"
            )
        if metric.startswith("eval/") and (ours.held_out, first.config.eval.max_tokens) != (
            theirs.held_out,
            run.config.eval.max_tokens,
        ):
            notes.append(f"{pair} were evaluated on different held-out documents")
        if ours.sequence_length != theirs.sequence_length:
            lengths = f"{ours.sequence_length:,} and {theirs.sequence_length:,}"
            notes.append(f"{pair} see samples of different lengths: {lengths} positions")
    return notes


def _sources(run: ComparedRun) -> list[str]:
    """What is read, and how much of it, in the words of the configuration."""
    return [
        f"{source.path}" + (f" ({source.weight:g})" if source.weight is not None else "")
        for source in run.config.data.sources
    ]
