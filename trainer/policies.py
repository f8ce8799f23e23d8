"""Small objects the loop asks at named points: should we stop, save, evaluate, go on after a bad value?

They hold no tensors and never talk to other ranks; the loop carries their answers through the one
integer reduction every step has anyway, so that all ranks act on the same step.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from ..models.errors import TrainingError

__all__ = ["NonFinitePolicy", "StopRequest", "is_due"]


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0


class StopRequest:
    """Turns a signal, or a `STOP` file in the run folder, into a stop at the next step boundary.

    A second signal changes nothing: the save that the first one asked for is not interrupted.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self, run_dir: Path, *, look_every: int = 10) -> None:
        self.reason: str | None = None
        self._file = run_dir / "STOP"
        self._look_every = look_every
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The file asked this attempt to stop; left in place it would stop the next one at once.
        if self.reason == "STOP file":
            self._file.unlink(missing_ok=True)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def is_asked(self, step: int) -> bool:
        """Whether this rank was asked to stop; looks for the file every few steps."""
        if self.reason is None and step % self._look_every == 0 and self._file.exists():
            self.reason = "STOP file"
        return self.reason is not None


class NonFinitePolicy:
    """What happens when a loss or a gradient norm is not a number.

    The update of such a step is always withheld by the engine, so the weights are never poisoned;
    this decides whether the run goes on. All ranks see the same global values and so decide alike.
    """

    def __init__(self, policy: Literal["stop", "skip"], budget: int, seen: int = 0) -> None:
        self.policy = policy
        self.budget = budget
        self.seen = seen

    def check(self, record: Mapping[str, Any]) -> None:
        """Look at one step's values.

        Raises:
            TrainingError: the policy is `stop`, or the budget of `skip` is spent.
        """
        values = {name: record[name] for name in ("loss", "grad_norm") if name in record}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        self.seen += 1
        what = " and ".join(bad)
        where = (
            f"step {record['step']} (samples {record['first_sample']} to {record['last_sample']})"
        )
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
