"""What a check found, and what the findings of many ranks come to. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..exit_codes import ExitCode

__all__ = [
    "UNKNOWN",
    "Finding",
    "Line",
    "exit_code",
    "fail",
    "merge",
    "ok",
    "skipped",
    "unfit_hosts",
    "warn",
]

Status = Literal["ok", "warn", "fail", "skipped"]
Blame = Literal["node", "configuration"]
UNKNOWN = "?"
"""Stands for a node that no one can name."""
_WORST_FIRST: tuple[Status, ...] = ("fail", "warn", "ok", "skipped")


@dataclass(frozen=True)
class Finding:
    """One check's answer on one rank.

    Args:
        found: what is so, in a few words.
        mend: what to do about it; every `fail` has one.
        blame: `node`: another node would do; `configuration`: a person has to change something.
        facts: values that must be equal on all nodes, by name.
        hosts: the nodes it is about; empty means the one it was found on.
    """

    check: str
    status: Status
    found: str
    mend: str = ""
    blame: Blame = "node"
    facts: dict[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Finding:
        return Finding(**{**data, "hosts": tuple(data["hosts"])})


def ok(check: str, found: str, **facts: str) -> Finding:
    return Finding(check, "ok", found, facts=facts)


def warn(check: str, found: str, mend: str) -> Finding:
    return Finding(check, "warn", found, mend)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, "skipped", why)


def fail(
    check: str, found: str, mend: str, blame: Blame = "node", hosts: Sequence[str] = ()
) -> Finding:
    return Finding(check, "fail", found, mend, blame, hosts=tuple(hosts))


@dataclass(frozen=True)
class Line:
    """The same answer of one check on one or more ranks."""

    finding: Finding
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    is_everywhere: bool
    """Whether every rank that made this check answered so."""


def merge(reports: Mapping[int, Sequence[Finding]], host_of: Mapping[int, str]) -> list[Line]:
    """One line a check where all agree; where some do not, one for each answer that is not good, worst first.

    A failure that every one of several nodes has is no node's: it is put down to the configuration.

    Args:
        reports: findings by rank.
        host_of: the node of each rank.
    """
    by_check: dict[str, list[tuple[int, Finding]]] = {}
    for rank, findings in sorted(reports.items()):
        for finding in findings:
            by_check.setdefault(finding.check, []).append((rank, finding))
    lines: list[Line] = []
    for answers in by_check.values():
        lines += _merge_check(answers, host_of)
    return lines


def _merge_check(answers: Sequence[tuple[int, Finding]], host_of: Mapping[int, str]) -> list[Line]:
    asked = {rank for rank, _ in answers}
    groups: dict[tuple[str, str], list[tuple[int, Finding]]] = {}
    for rank, finding in answers:
        # What is well need not be told once a rank: the first one's words stand for all.
        words = finding.found if finding.status in ("fail", "warn") else ""
        groups.setdefault((finding.status, words), []).append((rank, finding))
    is_bad = any(status in ("fail", "warn") for status, _ in groups)
    failing = {host_of[rank] for rank, finding in answers if finding.status == "fail"}
    is_all_nodes = len(failing) > 1 and failing == set(host_of.values())
    lines: list[Line] = []
    for status, words in sorted(groups, key=lambda key: _WORST_FIRST.index(key[0])):  # type: ignore[arg-type]
        # "Does not apply here" beside an answer says nothing.
        if (is_bad and status not in ("fail", "warn")) or (status == "skipped" and lines):
            continue
        members = groups[status, words]
        finding = members[0][1]
        hosts = tuple(dict.fromkeys(h for r, f in members for h in (f.hosts or (host_of[r],))))
        if is_all_nodes and status == "fail" and not finding.hosts:
            finding = replace(finding, blame="configuration")
        ranks = tuple(rank for rank, _ in members)
        lines.append(Line(finding, ranks, hosts, is_everywhere=set(ranks) == asked))
    return lines


def unfit_hosts(lines: Sequence[Line]) -> list[str]:
    """Nodes with a failure that another node would not have, in order of their first one."""
    bad = [x for x in lines if x.finding.status == "fail" and x.finding.blame == "node"]
    return [h for h in dict.fromkeys(host for line in bad for host in line.hosts) if h != UNKNOWN]


def exit_code(lines: Sequence[Line]) -> ExitCode:
    """0; 2 where a person has to mend something, whatever else there is; 4 where other nodes would do."""
    blames = {line.finding.blame for line in lines if line.finding.status == "fail"}
    if "configuration" in blames:
        return ExitCode.USER_ERROR
    return ExitCode.MACHINE if blames else ExitCode.FINISHED
