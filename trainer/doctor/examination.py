"""All checks in order, on one process or on all ranks of a job, and what they come to.

To add a check: a function that takes a `Context` and gives one `Finding`, and a line in one of the tuples below. A check that
raises is a failure with its reason; nothing here ends in a traceback.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...models.errors import WeftError
from .context import Context
from .findings import UNKNOWN, Finding, Line, exit_code, fail, merge, skipped, unfit_hosts

if TYPE_CHECKING:
    from .meeting import Meeting

__all__ = ["Examination", "examine"]

# Name -> module:function. A module is imported when its check runs: torch may be what is broken.
NODE_CHECKS = (
    ("versions", "system:check_versions"),
    ("packages", "system:check_packages"),
    ("hostname", "system:check_hostname"),
    ("shared memory", "system:check_shared_memory"),
    ("limits", "system:check_limits"),
    ("slurm", "system:check_slurm"),
    ("wandb", "system:check_wandb"),
    ("loopback", "network:check_loopback"),
    ("disk space", "storage:check_disk_space"),
    ("disk speed", "storage:check_disk_speed"),
    ("triton cache", "storage:check_triton_cache"),
    ("gpus", "gpus:check_driver"),
    ("gpu memory", "gpus:check_gpu_memory"),
    ("ecc", "gpus:check_ecc"),
    ("gpu clocks", "gpus:check_throttling"),
)
"""Once a node, before any process opens a GPU."""
PORT_CHECKS = (("master port", "network:check_master_port"),)
"""On every rank, before they meet."""
DEVICE_CHECKS = (
    ("cuda", "compute:check_cuda"),
    ("matmul", "compute:check_matmul"),
)
COMPILER_CHECKS = (("triton", "compute:check_triton"),)
JOINT_CHECKS = (
    ("clocks", "check_clocks"),
    ("shared folder", "check_shared_folder"),
    ("slowest rank", "check_slowest"),
    ("all-reduce", "check_all_reduce"),
)
"""Functions of `together`, on every rank at once."""


@dataclass(frozen=True)
class Examination:
    """What came of it; of ranks that met, all but 0 know only `exit_code`, and have no `lines`."""

    ranks: int
    hosts: tuple[str, ...]
    lines: tuple[Line, ...]
    exit_code: int

    @property
    def unfit_hosts(self) -> list[str]:
        return unfit_hosts(self.lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        lines = [
            {**line.finding.to_json(), "ranks": line.ranks, "hosts": line.hosts}
            for line in self.lines
        ]
        return {
            "ranks": self.ranks,
            "hosts": self.hosts,
            "checks": lines,
            "unfit_hosts": self.unfit_hosts,
            "exit_code": self.exit_code,
        }


def examine(context: Context, open_store: Callable[..., Any] | None = None) -> Examination:
    """Collective: run every check.

    Args:
        open_store: takes (place, limit_s); tests put ranks of one process together with it.

    Raises:
        NoAnswer: rank 0 fell silent half-way.
    """
    port = _run(PORT_CHECKS, context)
    if context.place.world_size == 1:
        findings = [*_run(NODE_CHECKS, context), *port]
        findings += _run(DEVICE_CHECKS + COMPILER_CHECKS, context)
        findings += [skipped(name, "one process") for name, _ in JOINT_CHECKS]
        return _conclude({0: findings}, {0: context.place.host}, context)
    if any(finding.status == "fail" for finding in port):
        # Nobody can come to a port that is taken; the others find out by their own limit.
        return _alone(context, port)
    try:
        from . import meeting as meetings

        store = (open_store or meetings.open_store)(context.place, context.limit_s)
    except Exception as error:
        return _alone(context, [*port, _met_nobody(error)])
    return _meet(context, meetings.Meeting(store, context.place, context.limit_s), port)


def _alone(context: Context, findings: list[Finding]) -> Examination:
    """What a rank that meets nobody can say: its own node's checks, by the first rank of it."""
    mine = _run(NODE_CHECKS, context) if context.place.local_rank == 0 else []
    rank = context.place.rank
    return _conclude({rank: [*mine, *findings]}, {rank: context.place.host}, context)


def _met_nobody(error: Exception) -> Finding:
    if isinstance(error, WeftError):
        mend = "look at rank 0's output, and open the way to that port"
        # It may be rank 0's node, or any between.
        return fail("ranks", str(error), mend, hosts=[UNKNOWN])
    return _broken("ranks", error)


def _meet(context: Context, meeting: Meeting, findings: list[Finding]) -> Examination:
    from . import together

    host_of = meeting.gather("host", context.place.host)
    findings += together.check_presence(context, meeting, host_of)
    first_here = min((r for r, host in host_of.items() if host == context.place.host), default=-1)
    is_first = context.place.rank == first_here
    findings += _run(NODE_CHECKS, context, meeting) if is_first else []
    # Also the point before which no rank opens a GPU: what lies in its memory is others'.
    meeting.gather("node checks", True, 2 * context.limit_s)
    findings += _run(DEVICE_CHECKS, context, meeting)
    findings += _run(COMPILER_CHECKS, context, meeting) if is_first else []
    meeting.gather("device checks", True, 2 * context.limit_s)
    for name, function in JOINT_CHECKS:
        if name == "all-reduce" and (meeting.absent or len(host_of) < context.place.world_size):
            findings += [skipped(name, "ranks are missing")] if context.place.rank == 0 else []
            continue
        findings += _guard_joint(name, getattr(together, function), context, meeting, host_of)
    reports = {
        rank: [Finding.from_json(f) for f in found]
        for rank, found in meeting.gather("report", [f.to_json() for f in findings]).items()
    }
    if context.place.rank == 0:
        reports[0] += together.check_equal(context, reports, host_of)
        reports[0] += _stuck(meeting, host_of)
        result = _conclude(reports, host_of, context)
        meeting.gather("exit code", int(result.exit_code), limit_s=1)
    else:
        codes = meeting.gather("exit code", None)
        result = Examination(context.place.world_size, (), (), codes[0])
    meeting.leave()
    return result


def _stuck(meeting: Meeting, host_of: Mapping[int, str]) -> list[Finding]:
    """Ranks that came and then fell silent, each with what it was at."""
    return [
        fail(
            "answers",
            f"rank {rank} on {host_of[rank]} fell silent ({exchange}); last heard of at: {meeting.last_word(rank)}",
            "look at that rank's own output; leave its node out",
            hosts=[host_of[rank]],
        )
        for rank, exchange in sorted(meeting.absent.items())
        if rank in host_of
    ]


def _conclude(
    reports: Mapping[int, Sequence[Finding]], host_of: Mapping[int, str], context: Context
) -> Examination:
    lines = merge(reports, host_of)
    hosts = tuple(dict.fromkeys(host_of.values()))
    return Examination(context.place.world_size, hosts, tuple(lines), exit_code(lines))


def _run(
    checks: Sequence[tuple[str, str]], context: Context, meeting: Meeting | None = None
) -> list[Finding]:
    found = []
    for name, path in checks:
        if meeting is not None:
            meeting.say(name)
        found.append(_within_limit(name, path, context))
    return found


def _within_limit(name: str, path: str, context: Context) -> Finding:
    """One check in a thread: a dead file system or driver holds whoever asks it, and no signal wakes them."""
    answers: list[Finding] = []

    def work() -> None:
        module, _, function = path.partition(":")
        try:
            check = getattr(importlib.import_module(f".{module}", __package__), function)
            answers.append(check(context))
        except Exception as error:
            answers.append(_broken(name, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    # Half of it: the others wait longer for this rank than this rank for its check.
    limit_s = context.limit_s / 2
    thread.join(limit_s)
    if answers:
        return answers[0]
    return fail(
        name,
        f"no answer within {limit_s:g} s",
        "the file system or the driver it asks does not answer: dmesg on that node; leave it out",
    )


def _guard_joint(
    name: str, function: Any, context: Context, meeting: Meeting, host_of: Mapping[int, str]
) -> list[Finding]:
    from .meeting import NoAnswer

    meeting.say(name)
    try:
        found: list[Finding] = function(context, meeting, host_of)
    except NoAnswer:
        raise
    except Exception as error:
        found = [_broken(name, error)]
    return found


def _broken(name: str, error: Exception) -> Finding:
    """A check that could not be made; the machine is taken to be at fault."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
    return fail(
        name,
        f"the check broke off: {type(error).__name__}: {reason}",
        "mend what the reason names; if it is weft's own fault, report it with this line",
    )
