"""What can happen to a run, as `weft debug soak` makes it happen. Each fault strikes one attempt; the next one has to cope.

A fault strikes at a random instant of a phase: while the run is opened, after its ranks have met, in its steps, or in a save.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..trainer.exit_codes import ExitCode
from ..trainer.run_lock import LOCK_FILE
from .local import LocalRanks

__all__ = ["FAULTS", "Fault", "Pace", "Target", "newest_checkpoints"]

POLL_S = 0.002
SAVED = frozenset({ExitCode.STOPPED, ExitCode.TIME_LIMIT, ExitCode.PREEMPTED})
"""A stop that was asked for; which of them depends on whether a scheduler is there."""
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Pace:
    """How long things take undisturbed, seconds."""

    opening_s: float
    step_s: float
    save_s: float


@dataclass
class Target:
    """One attempt at a run, and chance."""

    run: Path
    ranks: LocalRanks
    pace: Pace
    chance: random.Random

    def __post_init__(self) -> None:
        history = self.run / "attempts.jsonl"
        self._history, self._begin = history, history.stat().st_size if history.is_file() else 0

    def has_said(self, event: str) -> bool:
        """Whether this attempt has written an event into the run's history."""
        if not self._history.is_file():
            return False
        with open(self._history, "rb") as file:
            file.seek(self._begin)
            return f'"event": "{event}"'.encode() in file.read()

    def wait_for(self, condition: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Until the condition holds, or the ranks have ended."""
        deadline = time.monotonic() + limit_s
        while self.ranks.is_running() and time.monotonic() < deadline and not condition():
            time.sleep(POLL_S)

    def sleep_up_to(self, seconds: float) -> None:
        begin, wanted = time.monotonic(), self.chance.uniform(0, seconds)
        self.wait_for(lambda: time.monotonic() - begin > wanted)

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.ranks.processes):
            if ranks is None or rank in ranks:
                process.send_signal(number)


# Instants


def _while_it_opens(target: Target) -> None:
    target.sleep_up_to(target.pace.opening_s)


def _after_ranks_have_met(target: Target) -> None:
    target.wait_for(lambda: target.has_said("start"))
    target.sleep_up_to(target.pace.opening_s / 2)


def _in_a_step(target: Target) -> None:
    target.wait_for(lambda: target.has_said("training"))
    target.sleep_up_to(8 * target.pace.step_s)


def _in_a_save(target: Target) -> None:
    target.wait_for(lambda: target.has_said("training"))
    folder = target.run / "checkpoints"
    target.wait_for(lambda: any(folder.glob("step_*.tmp-*")))
    target.sleep_up_to(target.pace.save_s)


# What strikes


def _kill_all(target: Target) -> None:
    target.signal(signal.SIGKILL)


def _kill_one(target: Target) -> None:
    target.signal(signal.SIGKILL, [target.chance.randrange(len(target.ranks.processes))])


def _send(*numbers: signal.Signals) -> Callable[[Target], None]:
    def send(target: Target) -> None:
        for place, number in enumerate(numbers):
            if place:
                target.sleep_up_to(4 * target.pace.step_s)
            target.signal(number)

    return send


def _send_to_one(target: Target) -> None:
    number = target.chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
    target.signal(number, [target.chance.randrange(len(target.ranks.processes))])


def _stop_file(target: Target) -> None:
    (target.run / "STOP").touch()


def _save_file_then_kill(target: Target) -> None:
    wanted = target.run / "SAVE"
    wanted.touch()
    target.wait_for(lambda: not wanted.exists())
    target.sleep_up_to(2 * target.pace.step_s + target.pace.save_s)
    target.signal(signal.SIGKILL)


def _pause_one_then_kill(target: Target) -> None:
    """The others wait for it, and go on with it."""
    rank = [target.chance.randrange(len(target.ranks.processes))]
    target.signal(signal.SIGSTOP, rank)
    time.sleep(0.3)
    target.signal(signal.SIGCONT, rank)
    target.sleep_up_to(8 * target.pace.step_s)
    target.signal(signal.SIGKILL)


def _full_disk_then_kill(target: Target) -> None:
    """The last rank, which keeps no records, can write no file for some steps: saves fail, the run goes on."""
    pid = target.ranks.processes[-1].pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16, limits[1]))
    target.sleep_up_to(16 * target.pace.step_s + 2 * target.pace.save_s)
    if target.ranks.processes[-1].poll() is None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    target.sleep_up_to(8 * target.pace.step_s)
    target.signal(signal.SIGKILL)


# What is done to the folder once the ranks are gone


def newest_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(
        p.parent
        for p in (run / "checkpoints").glob("step_*/manifest.json")
        if "." not in p.parent.name
    )


def _data_file(run: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(newest_checkpoints(run)[-1].glob("*.safetensors")))


def _truncate(run: Path, chance: random.Random) -> None:
    file = _data_file(run, chance)
    os.truncate(file, chance.randrange(file.stat().st_size))


def _flip(run: Path, chance: random.Random) -> None:
    file = _data_file(run, chance)
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def _remove_shard(run: Path, chance: random.Random) -> None:
    _data_file(run, chance).unlink()


def _remove_manifest(run: Path, chance: random.Random) -> None:
    (newest_checkpoints(run)[-1] / "manifest.json").unlink()


def _lose_pointer(run: Path, chance: random.Random) -> None:
    """As if the machine went down between the rename of a checkpoint and the move of the pointer."""
    latest = run / "checkpoints" / "latest"
    if chance.random() < 0.5:
        latest.unlink(missing_ok=True)
    elif found := newest_checkpoints(run):
        latest.write_text(f"{found[0].name}\n")


def _leave_half_folder(run: Path, chance: random.Random) -> None:
    """Under the final name of a step to come: it must not stand in the way of its save."""
    found = newest_checkpoints(run)
    step = int(found[-1].name.removeprefix("step_")) if found else 0
    half = run / "checkpoints" / f"step_{step + 4 - step % 4:08d}"
    half.mkdir(parents=True, exist_ok=True)
    (half / "rank_00000_00.safetensors").write_bytes(b"half")


def _tear_records(run: Path, chance: random.Random) -> None:
    path = run / "metrics.jsonl"
    if path.is_file():
        with open(path, "ab") as file:
            file.write(b'{"step": 3, "lo')


def _leave_temporary(run: Path, chance: random.Random) -> None:
    for name in (f"step_{chance.randrange(10_000):08d}.tmp-dead0000", ".trash-dead0000"):
        (run / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / name / "rank_00000_00.safetensors").write_bytes(b"half")


def _leave_lock(run: Path, chance: random.Random) -> None:
    """Of a process that is gone and whose number another one, this one, has now."""
    lock = run / LOCK_FILE
    if lock.is_file():
        holder = json.loads(lock.read_text())
        lock.write_text(json.dumps({**holder, "token": "dead", "pid": os.getpid(), "started": "1"}))


@dataclass(frozen=True)
class Fault:
    """One kind.

    Args:
        instants: one of them is chosen.
        strike: what happens then.
        codes: exit codes a rank may end with; 0 besides, where it was faster.
        after: what is done to the folder afterwards.
        damages: that spoils the newest checkpoint, so that the one before has to be used.
        needs_ranks: it takes several.
    """

    name: str
    instants: tuple[Callable[[Target], None], ...]
    strike: Callable[[Target], None] = _kill_all
    codes: frozenset[int] = frozenset({KILLED})
    after: Callable[[Path, random.Random], None] | None = None
    damages: bool = False
    needs_ranks: bool = False

    def hit(self, target: Target, *, early: bool) -> None:
        """Strike; `early` keeps to instants at which the run gets no further."""
        quiet = [i for i in self.instants if i in (_while_it_opens, _after_ranks_have_met)]
        target.chance.choice(quiet if early and quiet else list(self.instants))(target)
        self.strike(target)


_ANY = (_after_ranks_have_met, _in_a_step, _in_a_save)
FAULTS = (
    Fault("kill -9 of all ranks while it opens", (_while_it_opens,)),
    Fault("kill -9 of all ranks in a step", (_in_a_step,)),
    Fault("kill -9 of all ranks in a save", (_in_a_save,)),
    Fault(
        "kill -9 of one rank",
        (_in_a_step, _in_a_save),
        _kill_one,
        frozenset({KILLED, ExitCode.MACHINE}),
        needs_ranks=True,
    ),
    Fault("SIGTERM", _ANY, _send(signal.SIGTERM), SAVED),
    Fault("SIGUSR1", _ANY, _send(signal.SIGUSR1), SAVED),
    Fault("SIGUSR2", _ANY, _send(signal.SIGUSR2), SAVED),
    Fault("a signal to one rank", _ANY, _send_to_one, SAVED, needs_ranks=True),
    Fault("two signals", _ANY, _send(signal.SIGUSR2, signal.SIGTERM), SAVED),
    Fault("SIGINT", _ANY, _send(signal.SIGINT), SAVED),
    Fault("STOP file", (_after_ranks_have_met,), _stop_file, SAVED),
    Fault("SAVE file, then kill -9", (_after_ranks_have_met,), _save_file_then_kill),
    Fault("a rank stands still, then kill -9", (_in_a_step, _in_a_save), _pause_one_then_kill),
    Fault("full disk, then kill -9", (_in_a_step,), _full_disk_then_kill, needs_ranks=True),
    Fault("truncated shard", (_in_a_step,), after=_truncate, damages=True),
    Fault("flipped bit", (_in_a_step,), after=_flip, damages=True),
    Fault("missing shard", (_in_a_step,), after=_remove_shard, damages=True),
    Fault("missing manifest", (_in_a_step,), after=_remove_manifest, damages=True),
    Fault("lost pointer", (_in_a_save,), after=_lose_pointer),
    Fault("torn records", (_in_a_step,), after=_tear_records),
    Fault("half a checkpoint", (_in_a_step,), after=_leave_half_folder),
    Fault("leftovers of a save", (_in_a_step,), after=_leave_temporary),
    Fault("lock of a dead process", (_in_a_step,), after=_leave_lock),
)
