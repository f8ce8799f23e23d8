"""Small objects the loop asks at named points: should we stop, save, evaluate, go on after a bad value?

They hold no tensors and never talk to other ranks; the loop carries their answers through the one
integer reduction every step has anyway, so that all ranks act on the same step.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np

from ..models.errors import TrainingError
from .deadline import Deadline
from .exit_codes import ExitCode

__all__ = ["NonFinitePolicy", "Rollback", "SpikePolicy", "Stop", "StopRequest", "is_due"]

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
LOOK_S = 1.0
"""Seconds between looks at the switch files and the deadline: a look may cost a call to a slow file system."""


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0


class Stop(IntEnum):
    """Why a run is to stop; of several the greatest counts, so that what a person asked for is not requeued."""

    NOT = 0
    TIME_LIMIT = 1
    PREEMPTED = 2
    ASKED = 3

    @property
    def outcome(self) -> str:
        return ("finished", "time_limit", "preempted", "stopped")[self]

    @property
    def exit_code(self) -> int:
        codes = (ExitCode.FINISHED, ExitCode.TIME_LIMIT, ExitCode.PREEMPTED, ExitCode.STOPPED)
        return int(codes[self])


class StopRequest:
    """Turns a signal, a `STOP` file in the run folder, or the end of the job's time into a stop at the next step boundary.

    A second signal changes nothing: the save that the first one asked for is not interrupted. Under a scheduler SIGTERM
    means that it takes the nodes back and SIGUSR2 that the time is nearly up; elsewhere both come from a person.

    Args:
        looks: whether this process looks at files and the clock; one of a run is enough.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(
        self, run_dir: Path, *, looks: bool = True, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.reason: str | None = None
        self.kind = Stop.NOT
        self.looks = looks
        self.deadline: Deadline | None = None
        self.reserve_s = 0.0
        """Seconds a save and a step take, as far as is known; kept free before the deadline."""
        self._stop_file, self._save_file = run_dir / STOP_FILE, run_dir / SAVE_FILE
        self._now, self._next_look = now, -math.inf
        self._wants_save = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The file asked this attempt to stop; left in place it would stop the next one at once.
        if self.reason == "STOP file":
            self._stop_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        meaning = Stop.ASKED
        if "SLURM_JOB_ID" in os.environ:
            by_scheduler = {signal.SIGTERM: Stop.PREEMPTED, signal.SIGUSR2: Stop.TIME_LIMIT}
            meaning = by_scheduler.get(signal.Signals(number), Stop.ASKED)
        self._ask(meaning, signal.Signals(number).name)

    def _ask(self, kind: Stop, reason: str) -> None:
        if kind > self.kind:
            self.kind, self.reason = kind, reason

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop; looks at files and the clock once a second."""
        if self.looks and self.kind < Stop.ASKED:
            now = self._now()
            if now >= self._next_look:
                self._next_look = now + LOOK_S
                self._look()
        return self.kind > Stop.NOT

    def _look(self) -> None:
        if self._stop_file.exists():
            self._ask(Stop.ASKED, "STOP file")
        if self._save_file.exists():
            self._save_file.unlink(missing_ok=True)
            self._wants_save = True
        if self.kind == Stop.NOT and self.deadline and self.deadline.is_near(self.reserve_s):
            self._ask(Stop.TIME_LIMIT, "the end of the job's time")

    def take_save(self) -> bool:
        """Whether a `SAVE` file asked for a save since the last call."""
        wanted, self._wants_save = self._wants_save, False
        return wanted


@dataclass(frozen=True)
class Rollback:
    """Take up the newest checkpoint before `step`, and leave the samples `[first_sample, stop_sample)` out from there."""

    step: int
    first_sample: int
    stop_sample: int
    reason: str


class NonFinitePolicy:
    """What happens when a loss or a gradient norm is not a number.

    The update of such a step is always withheld by the engine, so the weights are never poisoned;
    this decides whether the run goes on. All ranks see the same global values and so decide alike.
    """

    def __init__(
        self, policy: Literal["stop", "skip", "rollback"], budget: int, seen: int = 0
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.seen = seen

    @staticmethod
    def bad_values(record: Mapping[str, Any]) -> list[str]:
        """Names of the values that are no numbers."""
        values = {name: record[name] for name in ("loss", "grad_norm") if name in record}
        return [name for name, value in values.items() if not math.isfinite(value)]

    def check(self, record: Mapping[str, Any]) -> Rollback | None:
        """Look at one step's values.

        Raises:
            TrainingError: the policy is `stop`, or the budget of `skip` is spent.
        """
        bad = self.bad_values(record)
        if not bad:
            return None
        self.seen += 1
        what = " and ".join(bad)
        first, last = record["first_sample"], record["last_sample"]
        where = f"step {record['step']} (samples {first} to {last})"
        if self.policy == "rollback":
            return Rollback(record["step"], first, last + 1, f"{what} not finite at {where}")
        if self.policy == "stop":
            raise TrainingError(
                f"{what} not finite at {where}; the update was withheld and the weights are intact; "
                "set train.non_finite=skip to go on without such steps"
            )
        if self.seen > self.budget:
            raise TrainingError(
                f"{what} not finite at {where}; that makes {self.seen} such steps, more than "
                f"train.non_finite_budget={self.budget}; lower optimizer.lr or look at these samples"
            )
        return None


class SpikePolicy:
    """Finds a loss that rises above its past and stays there.

    A loss is judged by the last `window` good ones; one that is too high does not become part of them, so a rise that lasts
    is not taken for the new normal.

    Args:
        sigmas: deviations from the mean that are too many.
        steps: too high losses in a row that make a spike.
    """

    def __init__(
        self, sigmas: float, steps: int, *, window: int = 1000, minimum: int = 128
    ) -> None:
        self._sigmas, self._steps, self._minimum = sigmas, steps, minimum
        self._good: deque[float] = deque(maxlen=window)
        self._high: list[tuple[int, int, int]] = []

    def watch(self, record: Mapping[str, Any]) -> Rollback | None:
        """Take one step's values, in order; a verdict when a spike is complete, then once more for each further step."""
        loss = record.get("loss")
        if loss is None or not math.isfinite(loss):
            return None
        if not self._is_high(loss):
            self._good.append(loss)
            self._high.clear()
            return None
        self._high.append((record["step"], record["first_sample"], record["last_sample"]))
        if len(self._high) < self._steps:
            return None
        step, first, _ = self._high[0]
        reason = f"the loss rose at step {step} and stayed {self._sigmas:g} deviations above its past for {len(self._high)} steps"
        return Rollback(step, first, self._high[-1][2] + 1, reason)

    def _is_high(self, loss: float) -> bool:
        if len(self._good) < self._minimum:
            return False
        past = np.array(self._good)
        return bool(loss - past.mean() > self._sigmas * past.std(ddof=1))
