"""How little compute a run needs to match a baseline, metric by metric, with a control that says how much of it is noise.

The question of Mixture-of-Transformers (arXiv 2411.04996) and Mixture-of-Mamba (arXiv 2501.16295), asked by one fixed
rule, since the rule changes the answer: see `Matched`. NumPy alone; imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.errors import ConfigError
from .compare import ComparedRun, check_vocabularies, metric_curve, read_runs
from .metrics.curves import Curve, first_reach
from .metrics.records import plain_json

__all__ = ["Matched", "Matching", "match_baseline"]

LAST_SHARE = 0.05
"""The baseline's value to match is the mean over this last share of its records."""
SLOPE_FROM = 0.2
"""Levels that the baseline reached before this share of its cost say little and are left out of the slope."""


@dataclass(frozen=True)
class Matched:
    """What one run needs of the baseline's cost, by one metric.

    Args:
        final: mean of the run's own last values.
        share: cost at which the running minimum of the run first has the baseline's final value, over the baseline's whole
            cost; None where it never has.
        slope: least-squares slope through the origin of the run's cost over the baseline's, at all levels that both
            reached and the baseline not in its first fifth; None without two such levels.
        is_control: the run's model is the baseline's, with other seeds or data order: what it needs beside 1 is noise.
    """

    run: str
    metric: str
    final: float
    share: float | None
    slope: float | None
    is_control: bool


@dataclass(frozen=True)
class Matching:
    """All runs against the baseline.

    Args:
        metrics: in the order asked for.
        curves: (metric, run name) to its values over the cost.
        targets: (metric) to the baseline's final value.
    """

    baseline: str
    against: str
    metrics: tuple[str, ...]
    runs: list[ComparedRun]
    curves: dict[tuple[str, str], Curve]
    targets: dict[str, float]
    matches: list[Matched]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON's terms."""
        runs = [{"name": run.name, "folder": str(run.folder)} for run in self.runs]
        curves = [
            {"metric": metric, "run": run, "x": list(curve.x), "y": list(curve.y)}
            for (metric, run), curve in self.curves.items()
        ]
        found: dict[str, Any] = {"baseline": self.baseline, "against": self.against, "runs": runs}
        found |= {"targets": self.targets, "matches": [vars(m) for m in self.matches]}
        return dict(plain_json(found | {"notes": self.notes, "curves": curves}))


def match_baseline(
    folders: Sequence[Path],
    baseline: Path,
    metrics: Sequence[str],
    *,
    against: str = "training-flops",
) -> Matching:
    """Compare runs with one of them.

    Args:
        folders: of the runs, the baseline among them.
        metrics: names in their records; smaller is better.
        against: the cost, one of `compare.AXES` that is a curve.

    Raises:
        ConfigError: the baseline is not among the runs, there is no other, or losses of different vocabularies.
        DataError: a run without records, or without a metric.
    """
    runs = read_runs(folders)
    places = [i for i, run in enumerate(runs) if run.folder.resolve() == baseline.resolve()]
    if not places or len(runs) < 2:
        raise ConfigError(
            f"--baseline {baseline} is to be one of the runs, beside at least one more; name it among them"
        )
    base = runs[places[0]]
    for metric in metrics:
        check_vocabularies(runs, metric)
    curves = {
        (metric, run.name): metric_curve(run, metric, against) for metric in metrics for run in runs
    }
    targets = {metric: last_mean(curves[metric, base.name]) for metric in metrics}
    matches = [
        _match(base, run, metric, curves, targets[metric])
        for metric in metrics
        for run in runs
        if run is not base
    ]
    notes = []
    if not any(match.is_control for match in matches):
        notes.append(
            f"no control: another seed of {base.name} beside these runs would say how much of a share is noise"
        )
    return Matching(base.name, against, tuple(metrics), runs, curves, targets, matches, notes)


def last_mean(curve: Curve) -> float:
    """Mean over the last twentieth of a curve's records, at least one."""
    return float(curve.y[-max(1, round(LAST_SHARE * len(curve))) :].mean())


def _match(
    base: ComparedRun,
    run: ComparedRun,
    metric: str,
    curves: dict[tuple[str, str], Curve],
    target: float,
) -> Matched:
    theirs, ours = curves[metric, base.name], curves[metric, run.name]
    lowest = Curve(ours.x, np.minimum.accumulate(ours.y))
    at = first_reach(lowest, target)
    is_control = run.config.model == base.config.model
    return Matched(
        run.name,
        metric,
        last_mean(ours),
        None if at is None else at / float(theirs.x[-1]),
        _slope(theirs, lowest),
        is_control,
    )


def _slope(base: Curve, lowest: Curve) -> float | None:
    """Cost of a run over the baseline's, over all levels at which both can be asked."""
    falling = np.minimum.accumulate(base.y)
    is_new = np.diff(falling, prepend=np.inf) < 0
    levels = is_new & (base.x >= SLOPE_FROM * base.x[-1])
    pairs = [
        (float(cost), reached)
        for cost, level in zip(base.x[levels], falling[levels], strict=True)
        if (reached := first_reach(lowest, float(level))) is not None
    ]
    if len(pairs) < 2:
        return None
    theirs, ours = np.array(pairs).T
    return float((theirs * ours).sum() / (theirs**2).sum())
