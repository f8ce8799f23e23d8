"""Checks that need all ranks: who came, equal versions, clocks, the shared folder, who is slow, an all-reduce.

Each runs on every rank and gives rank 0's findings; the others give none, so that nothing is told twice.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..files import write_text
from .compute import devices_of, time_work
from .context import Context
from .findings import UNKNOWN, Finding, fail, ok, skipped, warn
from .meeting import Meeting
from .storage import nearest_folder

__all__ = [
    "check_all_reduce",
    "check_clocks",
    "check_equal",
    "check_presence",
    "check_shared_folder",
    "check_slowest",
]

SKEW_S, SKEW_FAILS_S = 0.5, 5.0
SLOW = 1.3
"""A rank that takes this much longer than the median for the same work is slow; 2 times as much fails."""
VALUES, QUICK_VALUES = 16 << 20, 1 << 20
VISIBLE_WITHIN_S = 5.0
HUNG = "hung"


def check_presence(context: Context, meeting: Meeting, host_of: Mapping[int, str]) -> list[Finding]:
    """Who came to the first exchange."""
    place = context.place
    if place.rank:
        return []
    missing = [rank for rank in range(place.world_size) if rank not in host_of]
    nodes = len(set(host_of.values()))
    if not missing:
        return [ok("ranks", f"all {place.world_size} came, from {_count(nodes, 'node')}")]
    # A node none of whose ranks came is known by name only to the scheduler.
    silent = [node for node in place.nodes if node not in host_of.values()]
    hosts = silent or [h for rank in missing if (h := place.node_of(rank))]
    where = f" ({', '.join(hosts)})" if hosts else ""
    return [
        fail(
            "ranks",
            f"{_ranks(missing)}{where} did not come within {meeting.limit_s:g} s; {len(host_of)} of {place.world_size} are here",
            "look at that rank's own output; leave its node out, or open the way to "
            f"{place.address}:{place.port}",
            hosts=hosts or [UNKNOWN],
        )
    ]


def check_equal(
    context: Context, reports: Mapping[int, Sequence[Finding]], host_of: Mapping[int, str]
) -> list[Finding]:
    """Facts that must not differ between nodes; every difference is one finding."""
    values: dict[str, dict[str, list[str]]] = {}
    for rank, findings in reports.items():
        for finding in findings:
            for name, value in finding.facts.items():
                hosts = values.setdefault(name, {}).setdefault(value, [])
                if host_of[rank] not in hosts:
                    hosts.append(host_of[rank])
    found = []
    for name, groups in values.items():
        if len(groups) > 1:
            told = "; ".join(
                f"{value} on {_few(hosts)}"
                for value, hosts in sorted(groups.items(), key=lambda g: -len(g[1]))
            )
            usual = max(groups.values(), key=len)
            odd = [h for hosts in groups.values() if hosts is not usual for h in hosts]
            found.append(
                fail(
                    "equal nodes",
                    f"{name}: {told}",
                    "use the same environment and image on all nodes, or leave the odd ones out",
                    hosts=odd,
                )
            )
    nodes = set(host_of.values())
    if len(nodes) < 2:
        return [skipped("equal nodes", "one node")]
    return found or [ok("equal nodes", f"{', '.join(values)} are the same on {len(nodes)} nodes")]


def check_clocks(context: Context, meeting: Meeting, host_of: Mapping[int, str]) -> list[Finding]:
    """Each node's clock at a signal from rank 0; the shortest of three delays stands for the way there."""
    moments = [meeting.set_off(f"clock{i}", context.clock) for i in range(3)]
    came = meeting.gather("clock", moments)
    if context.place.rank:
        return []
    if len(set(host_of.values())) < 2:
        return [skipped("clocks", "one node")]
    skew: dict[str, float] = {}
    for rank, theirs in came.items():
        offset = min((t - m for t, m in zip(theirs, moments, strict=True)), key=abs)
        host = host_of[rank]
        if host not in skew or abs(offset) < abs(skew[host]):
            skew[host] = offset
    worst = max(skew, key=lambda h: abs(skew[h]))
    here = host_of[0]
    if abs(skew[worst]) < SKEW_S:
        return [ok("clocks", f"within {abs(skew[worst]) * 1e3:.0f} ms of {here} on all nodes")]
    way = "ahead of" if skew[worst] > 0 else "behind"
    found = f"{worst} is {abs(skew[worst]):.1f} s {way} {here}"
    mend = "start chronyd or ntpd there; locks, deadlines and logs go by the clock"
    if abs(skew[worst]) < SKEW_FAILS_S:
        return [warn("clocks", found, mend)]
    return [fail("clocks", found, mend, hosts=[worst])]


def check_shared_folder(
    context: Context, meeting: Meeting, host_of: Mapping[int, str]
) -> list[Finding]:
    """A file that rank 0 writes must be seen, with its content, by everyone."""
    folder = nearest_folder(context.run_dir)
    name, content, problem = f".weft_doctor_shared_{os.getpid()}", f"{time.time_ns()}", ""
    if context.place.rank == 0:
        try:
            write_text(folder / name, content)
        except OSError as error:
            problem = f"{folder} cannot be written: {error.strerror}"
    told = meeting.gather("shared", [str(folder), name, content, problem]).get(0)
    if told is None or told[3]:
        return [] if context.place.rank else [skipped("shared folder", problem)]
    sees = context.place.rank == 0 or _appears(nearest_folder(context.run_dir) / told[1], told[2])
    came = meeting.gather("seen", sees)
    if context.place.rank:
        return []
    (folder / name).unlink(missing_ok=True)
    blind = list(dict.fromkeys(host_of[rank] for rank, seen in came.items() if not seen))
    if len(set(host_of.values())) < 2 and not blind:
        return [ok("shared folder", f"{folder} is seen by all ranks of this node")]
    if not blind:
        return [ok("shared folder", f"{folder} is seen by {len(set(host_of.values()))} nodes")]
    return [
        fail(
            "shared folder",
            f"a file that {host_of[0]} wrote into {folder} is not seen on {_few(blind)}",
            "set run.dir to a folder that all nodes mount; /tmp and local disks are not",
            "configuration" if len(blind) >= len(set(host_of.values())) - 1 else "node",
            hosts=blind,
        )
    ]


def _appears(path: Path, content: str) -> bool:
    """Whether a file is there with this content within a network file system's usual delay."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while time.monotonic() < deadline:
        # Listing the folder makes NFS look again.
        if path.name in os.listdir(path.parent) and path.read_text() == content:
            return True
        time.sleep(0.05)
    return False


def check_slowest(
    context: Context, meeting: Meeting, host_of: Mapping[int, str], work: Any = time_work
) -> list[Finding]:
    """Each rank's time for the same work, taken before any collective, in which all ranks wait for the slowest."""
    device = devices_of(context)[0]
    # Twice: the first round warms up, and shows who is late because others still do something else.
    meeting.gather("work0", work(context, device))
    came = meeting.gather("work", work(context, device))
    if context.place.rank:
        return []
    usual = statistics.median_low(came.values())
    slowest = max(came, key=came.__getitem__)
    ratio = came[slowest] / usual
    what = f"rank {slowest} on {host_of[slowest]}"
    times = (
        f"median {usual * 1e3:.2f} ms, slowest {what} {came[slowest] * 1e3:.2f} ms ({ratio:.2f}x)"
    )
    if len(came) < 2 or ratio < SLOW:
        return [ok("slowest rank", times)]
    slow = sorted((r for r in came if came[r] > SLOW * usual), key=lambda r: -came[r])
    found = f"{times}; slow: {_ranks(slow)}"
    mend = "look for other processes, throttled clocks and a wrong CPU binding there; leave the node out if it stays"
    if ratio < 2 or device.type == "cpu":
        return [warn("slowest rank", found, mend)]
    return [
        fail("slowest rank", found, mend, hosts=[host_of[r] for r in slow if came[r] > 2 * usual])
    ]


def check_all_reduce(
    context: Context, meeting: Meeting, host_of: Mapping[int, str], reduce: Any = None
) -> list[Finding]:
    """A sum over all ranks in a thread, so that one that hangs is left behind and its ranks are named."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result.update((reduce or _all_reduce)(context, meeting))
        except Exception as error:
            result["error"] = str(error).splitlines()[0][:200]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(meeting.limit_s)
    outcome = result or {"error": HUNG}
    came = meeting.gather("all_reduce", outcome)
    if context.place.rank:
        return []
    bad = {rank: told["error"] for rank, told in came.items() if "error" in told}
    bad |= {rank: "silent" for rank in host_of if rank not in came}
    if not bad:
        seconds, size = max(told["seconds"] for told in came.values()), came[0]["bytes"]
        # Each byte of a ring goes out twice, less the rank's own share.
        bus = 2 * (len(came) - 1) / len(came) * size / seconds
        return [
            ok(
                "all-reduce",
                f"{size >> 20} MiB over {len(came)} ranks ({came[0]['backend']}) right, {seconds * 1e3:.1f} ms, {bus / 1e9:.2f} GB/s a rank",
            )
        ]
    return [_blame_for_reduce(bad, meeting, host_of)]


def _blame_for_reduce(
    bad: Mapping[int, str], meeting: Meeting, host_of: Mapping[int, str]
) -> Finding:
    """Ranks that never entered keep all others inside; only where all entered is it those that failed."""
    outside = [r for r in host_of if r in bad and "inside" not in meeting.last_word(r)]
    hung = [r for r, error in bad.items() if error == HUNG]
    suspects = outside if outside and hung else sorted(bad)
    hosts = list(dict.fromkeys(host_of[r] for r in suspects))
    what = "never entered it" if suspects == outside else bad[suspects[0]]
    waited = f"; {len(hung)} of {len(host_of)} ranks waited {meeting.limit_s:g} s" if hung else ""
    return fail(
        "all-reduce",
        f"{_ranks(suspects)} on {_few(hosts)}: {what}{waited}",
        "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the network between nodes, open its ports, "
        "or leave the nodes out; NCCL_DEBUG=INFO tells more",
        hosts=hosts,
    )


def _all_reduce(context: Context, meeting: Meeting) -> dict[str, Any]:
    place = context.place
    device = devices_of(context)[0]
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting.say("all-reduce: joining")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", meeting.store),
        rank=place.rank,
        world_size=place.world_size,
        # Our own limit comes first: NCCL would take the process down with it.
        timeout=timedelta(seconds=10 * meeting.limit_s),
    )
    count = QUICK_VALUES if context.is_quick or device.type == "cpu" else VALUES
    values = torch.full((count,), float(place.rank + 1), device=device)
    times: list[float] = []
    meeting.say("all-reduce: inside")
    for _ in range(4):
        values.fill_(place.rank + 1)
        begin = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    expected = place.world_size * (place.world_size + 1) / 2
    is_right = bool((values == expected).all())
    dist.destroy_process_group()
    meeting.say("all-reduce: done")
    if not is_right:
        return {"error": f"the sum is {values[0].item():g} and not {expected:g}"}
    return {"seconds": min(times), "bytes": values.numel() * 4, "backend": backend}


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_few([str(r) for r in ranks])}"


def _few(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
