"""What a replay found, as data; `launch/replay.py` prints it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..data.vocabulary import Vocabulary
from ..metrics.records import plain_json
from .kernels import KernelDifference
from .parameters import ParameterReport
from .samples import SampleLoss
from .statistics import ModuleStatistics, NonFinite, StatisticsVisitor

__all__ = ["Comparison", "PhaseReport", "ReplayReport"]

EXCERPT_CHARACTERS = 60


@dataclass(frozen=True)
class Comparison:
    """A value of the run's record beside the replay's."""

    name: str
    recorded: float
    replayed: float

    @property
    def is_equal(self) -> bool:
        both_nan = self.recorded != self.recorded and self.replayed != self.replayed
        return both_nan or self.recorded == self.replayed

    @property
    def relative_difference(self) -> float:
        """Infinite where they are not the same and one is not finite, or the recorded one is zero."""
        if self.is_equal:
            return 0.0
        if not (math.isfinite(self.recorded) and math.isfinite(self.replayed) and self.recorded):
            return math.inf
        return abs(self.replayed - self.recorded) / abs(self.recorded)


@dataclass
class PhaseReport:
    """One phase of the step: modules in order of execution, parameters by logical name."""

    phase: str
    modules: list[ModuleStatistics]
    first_non_finite: NonFinite | None
    first_bad_gradient: str | None
    parameters: list[ParameterReport]


@dataclass
class ReplayReport:
    """A replayed step.

    Args:
        checkpoint: step of the checkpoint it went out from; None is the start of the run.
        ranks: of the run at this step; `rank`: the one replayed, None for all.
        values: under the names of metrics.jsonl.
        comparisons: with the record, where there is one and all ranks were replayed.
        samples: highest loss first.
        kernels: those compared with the reference.
        peak_weight_bytes: the most bytes of weights held at a time, of a streamed replay.
    """

    run_dir: str
    step: int
    checkpoint: int | None
    ranks: int
    rank: int | None
    first_sample: int
    last_sample: int
    micro_batches: int
    device: str
    compute: str
    streamed: bool
    notes: list[str]
    values: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    phases: list[PhaseReport] = field(default_factory=list)
    samples: list[SampleLoss] = field(default_factory=list)
    source_names: list[str] = field(default_factory=list)
    vocabulary: Vocabulary | None = None
    kernels: str | None = None
    kernel_differences: list[KernelDifference] = field(default_factory=list)
    peak_weight_bytes: int | None = None
    seconds: float = 0.0

    def add_phase(
        self, phase: str, visitor: StatisticsVisitor, parameters: dict[str, ParameterReport]
    ) -> None:
        self.phases.append(
            PhaseReport(
                phase,
                list(visitor.modules.values()),
                visitor.first,
                visitor.first_bad_gradient,
                list(parameters.values()),
            )
        )

    def excerpt(self, sample: SampleLoss) -> str:
        """The beginning of a sample's text, on one line."""
        if self.vocabulary is None:
            return ""
        text = self.vocabulary.decode(sample.tokens[: 4 * EXCERPT_CHARACTERS])
        return repr(text)[1:-1][:EXCERPT_CHARACTERS]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in strict JSON's terms."""
        skipped = {"comparisons", "phases", "samples", "vocabulary", "kernel_differences"}
        plain = {name: value for name, value in vars(self).items() if name not in skipped}
        plain["comparisons"] = [
            {**vars(c), "equal": c.is_equal, "relative_difference": c.relative_difference}
            for c in self.comparisons
        ]
        plain["phases"] = [_phase_to_dict(phase) for phase in self.phases]
        plain["samples"] = [self._sample_to_dict(sample) for sample in self.samples]
        plain["kernel_differences"] = [d.to_dict() for d in self.kernel_differences]
        result: dict[str, Any] = plain_json(plain)
        return result

    def _sample_to_dict(self, sample: SampleLoss) -> dict[str, Any]:
        return {
            "sample": sample.sample,
            "source": self.source_names[sample.source],
            "loss": sample.loss,
            "targets": sample.targets,
            "text": self.vocabulary.decode(sample.tokens) if self.vocabulary else "",
        }


def _phase_to_dict(phase: PhaseReport) -> dict[str, Any]:
    first = phase.first_non_finite
    return {
        "phase": phase.phase,
        "first_non_finite": None if first is None else dict(vars(first)),
        "first_bad_gradient": phase.first_bad_gradient,
        "modules": [module.to_dict() for module in phase.modules],
        "parameters": [parameter.to_dict() for parameter in phase.parameters],
    }
