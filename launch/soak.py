"""The soak: one run through many random faults ends as the run that was left alone. faults.py has the faults."""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import click
from click.termui import progressbar

from ..models.errors import LaunchError
from ..trainer.attempts import goodput, read_attempts
from .faults import FAULTS, Fault, Pace, Target, newest_checkpoints
from .forked_ranks import ForkedRanks, import_trainer
from .local import LocalRanks
from .options import load_recipe, print_table
from .seam import Verdict, compare_closely, compare_exactly, last_step

__all__ = ["run_soak"]

STEPS_A_FAULT = 12
"""Of the run, so that it is not over before the last fault."""
END_LIMIT_S = 180.0
"""Within this an attempt has to have ended after its fault."""
LEAST_CHECKPOINTS = 3
"""Sound ones there must be before one may be spoiled."""


@dataclass
class _Hit:
    """One attempt that was disturbed."""

    fault: Fault
    codes: list[int]
    reached: int
    took_up: int | None
    """Step from which the attempt went on; None where it was not opened."""


@dataclass
class _Soak:
    """The run under test and what happened to it so far."""

    arguments: list[str]
    run: Path
    logs: Path
    steps: int
    faults: int
    worlds: list[int]
    chance: random.Random
    start: type[LocalRanks]
    pace: Pace
    hits: list[_Hit] = field(default_factory=list)
    drawn: set[str] = field(default_factory=set)
    spoiled: set[tuple[int, int]] = field(default_factory=set)
    """Folders as `_identity` has them: one that is saved anew under the same name is another."""
    problems: list[str] = field(default_factory=list)
    expected_start: int | None = None
    seen: int = 0
    """Number of the newest attempt that was looked at."""
    last_start: int = 0
    """Where the attempt that ended the run took it up."""
    group: LocalRanks | None = None

    def begin(self, ranks: int) -> LocalRanks:
        """Start the next attempt."""
        has_begun = (self.run / "config.yaml").exists()
        command = ["train", "--resume", str(self.run)] if has_begun else self.arguments
        self.group = self.start(command, ranks, self.logs / f"attempt_{len(self.hits):03d}")
        return self.group

    def kill(self) -> None:
        """Leave no rank behind."""
        if self.group is not None:
            self.group.kill()

    def hit(self) -> None:
        """One attempt, one fault."""
        ranks = self.chance.choice(self.worlds)
        fault = self._draw(ranks)
        group = self.begin(ranks)
        is_ahead = last_step(self.run) > self.steps * (len(self.hits) + 1) / (self.faults + 1)
        target = Target(self.run, group, self.pace, self.chance)
        fault.hit(target, early=is_ahead)
        target.wait_for(lambda: False, END_LIMIT_S)
        if group.is_running():
            self.problems.append(f"{fault.name}: still running {END_LIMIT_S:.0f} s later")
        group.kill()
        codes = group.wait()
        self.hits.append(_Hit(fault, codes, last_step(self.run), self.take_up()))
        if not set(codes) <= fault.codes | {0}:
            self.problems.append(f"{fault.name}: exit codes {codes}\n{group.tail()}")
        if fault.after is not None:
            self._meddle(fault)

    def _draw(self, ranks: int) -> Fault:
        """By chance, but none again before all that are possible were there."""
        possible = [f for f in FAULTS if self._is_possible(f, ranks)]
        if not (left := [f for f in possible if f.name not in self.drawn]):
            self.drawn.clear()
            left = possible
        fault = self.chance.choice(left)
        self.drawn.add(fault.name)
        return fault

    def _is_possible(self, fault: Fault, ranks: int) -> bool:
        if fault.needs_ranks and ranks < 2:
            return False
        return not fault.damages or len(self._sound()) >= LEAST_CHECKPOINTS

    def _sound(self) -> list[Path]:
        return [p for p in newest_checkpoints(self.run) if _identity(p) not in self.spoiled]

    def _meddle(self, fault: Fault) -> None:
        assert fault.after is not None
        if not fault.damages:
            fault.after(self.run, self.chance)
            return
        newest, sound = newest_checkpoints(self.run)[-1], self._sound()
        if newest not in sound or len(sound) < 2:
            return
        fault.after(self.run, self.chance)
        self.spoiled.add(_identity(newest))
        self.expected_start = int(sound[-2].name.removeprefix("step_"))

    def take_up(self) -> int | None:
        """Where the attempt that has just ended took the run up: after the newest checkpoint was spoiled, at the one before."""
        count, attempts = len(self.hits) + 1, read_attempts(self.run)
        newest = attempts[-1] if attempts and attempts[-1].number > self.seen else None
        self.seen = attempts[-1].number if attempts else 0
        if newest is None or not newest.is_open:
            return None
        if self.expected_start not in (None, newest.first_step):
            self.problems.append(
                f"attempt {count} went on from step {newest.first_step}, not from {self.expected_start}, the newest sound checkpoint"
            )
        self.expected_start = None
        return newest.first_step

    def repeated(self) -> list[int]:
        """For each fault the steps that were done again: how far the attempt came beyond where the next one took the run up."""
        found, next_start = [], self.last_start
        for hit in reversed(self.hits):
            found.append(max(0, hit.reached - next_start) if hit.took_up is not None else 0)
            next_start = hit.took_up if hit.took_up is not None else next_start
        return found[::-1]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_ino, status.st_ctime_ns


def run_soak(
    recipe: str,
    overrides: list[str],
    *,
    faults: int,
    ranks: int,
    other_ranks: int | None,
    seed: int,
    steps: int | None,
    fork: bool,
    keep: str | None,
) -> int:
    """Train undisturbed, train through faults, compare, and print what happened.

    Returns:
        0 if nothing differs, else 3.

    Raises:
        LaunchError: the undisturbed run, or the end of the other, failed.
    """
    steps = steps or STEPS_A_FAULT * faults + 24
    settings = [
        f"train.steps={steps}",
        "checkpoint.every=4",
        "checkpoint.keep=6",
        "checkpoint.max_failed_saves=100",
        "logging.every=1",
        "logging.progress=none",
        "eval.at_end=false",
        "run.threads=1",
        "run.device=cpu",
        "schedule.warmup_steps=1",
        "schedule.warmup_tokens=null",
        # A rank that died before the others met it must not keep them for half an hour.
        "parallel.timeout_s=60",
        *overrides,
    ]
    load_recipe(recipe, settings)
    start: type[LocalRanks] = LocalRanks
    if fork:
        import_trainer()
        start = ForkedRanks
    with contextlib.ExitStack() as stack:
        folder = (
            Path(keep)
            if keep
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-soak-")))
        )
        whole, run = folder / "whole", folder / "disturbed"
        arguments = ["train", recipe, *settings]
        click.echo(f"undisturbed run: {steps} steps on {ranks} ranks", err=True)
        begin = time.monotonic()
        group = start([*arguments, f"run.dir={whole}"], ranks, folder / "logs" / "whole")
        stack.callback(group.kill)
        if any(group.wait()):
            raise LaunchError(f"the undisturbed run failed; the end of its output:\n{group.tail()}")
        undisturbed_s = time.monotonic() - begin
        soak = _Soak(
            arguments=[*arguments, f"run.dir={run}"],
            run=run,
            logs=folder / "logs",
            steps=steps,
            faults=faults,
            worlds=[ranks] if other_ranks is None else [ranks, other_ranks],
            chance=random.Random(seed),
            start=start,
            pace=_pace_of(whole),
        )
        stack.callback(soak.kill)
        begin = time.monotonic()
        _disturb(soak)
        _finish(soak, ranks)
        disturbed_s = time.monotonic() - begin
        verdicts = [
            *_verdicts(soak),
            *(
                compare_exactly(whole, run, steps)
                if other_ranks is None
                else compare_closely(whole, run, steps, ranks, other_ranks)
            ),
        ]
        _report(recipe, soak, verdicts, undisturbed_s, disturbed_s)
    return 0 if all(v.is_good for v in verdicts) else 3


def _pace_of(run: Path) -> Pace:
    (attempt,) = read_attempts(run)
    trained_s = attempt.train_seconds[1] - attempt.train_seconds[0]
    return Pace(
        opening_s=attempt.seconds_to_first_step or 1.0,
        step_s=trained_s / max(1, attempt.last_step),
        save_s=attempt.save_seconds or 0.1,
    )


def _disturb(soak: _Soak) -> None:
    with progressbar(length=soak.faults, label="faults", file=sys.stderr) as bar:
        while len(soak.hits) < soak.faults and last_step(soak.run) < soak.steps:
            soak.hit()
            bar.update(1)


def _finish(soak: _Soak, ranks: int) -> None:
    """Let the run end by itself."""
    if (
        newest_checkpoints(soak.run)[-1:]
        and last_step(soak.run) >= soak.steps
        and soak.hits[-1].codes == [0] * ranks
    ):
        return
    group = soak.begin(ranks)
    if any(group.wait()):
        raise LaunchError(
            f"the run did not get over its faults; the end of its output:\n{group.tail()}"
        )
    soak.last_start = soak.take_up() or 0


def _verdicts(soak: _Soak) -> list[Verdict]:
    """What is asked of the faults themselves and of the folder they leave."""
    left = [p.name for p in (soak.run / "checkpoints").glob("*tmp-*")]
    left += [n for n in ("lock", "STOP", "SAVE") if (soak.run / n).exists()]
    return [
        Verdict("faults", f"{len(soak.hits)} of {soak.faults}", len(soak.hits) == soak.faults),
        Verdict(
            "attempts ended and went on as they should",
            "; ".join(soak.problems) or f"all {len(soak.hits)}",
            not soak.problems,
        ),
        Verdict("left in the run folder", ", ".join(left) or "nothing", not left),
    ]


def _report(
    recipe: str, soak: _Soak, verdicts: list[Verdict], undisturbed_s: float, disturbed_s: float
) -> None:
    attempts = read_attempts(soak.run)
    again: dict[str, list[int]] = defaultdict(list)
    codes: dict[str, set[int]] = defaultdict(set)
    for hit, repeated in zip(soak.hits, soak.repeated(), strict=True):
        again[hit.fault.name].append(repeated)
        codes[hit.fault.name] |= set(hit.codes)
    rows = [
        (name, len(again[name]), " ".join(map(str, sorted(codes[name]))), sum(again[name]))
        for name in (fault.name for fault in FAULTS)
        if name in again
    ]
    print_table(
        f"{len(soak.hits)} faults", ["fault", "times", "exit codes", "steps repeated"], rows
    )
    opened = [a.seconds_to_first_step for a in attempts if a.seconds_to_first_step is not None]
    useful = goodput(soak.run, attempts)
    click.echo(
        f"{len(attempts)} attempts; the first step {statistics.median(opened):.1f} s after the start in the median"
    )
    click.echo(
        f"{sum(map(sum, again.values()))} steps repeated of {soak.steps}; {disturbed_s:.0f} s against {undisturbed_s:.0f} s undisturbed; goodput {useful or 0:.0%}"
    )
    print_table(
        f"soak of {recipe}: {soak.steps} steps on {' or '.join(map(str, soak.worlds))} ranks",
        ["", "compared", "found"],
        [["ok" if v.is_good else "DIFFERS", v.what, v.found] for v in verdicts],
    )
    click.echo(
        "the faults left no trace" if all(v.is_good for v in verdicts) else "THE FAULTS SHOW"
    )
