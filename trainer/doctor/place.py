"""Which rank this is, on which node, and where ranks meet, read from the launcher without torch.

torch itself may be what is wrong with a node, so this cannot be asked of `trainer/distributed.py`.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field

from ...models.errors import LaunchError
from ..slurm import slurm_ranks, slurm_rendezvous

__all__ = ["Place", "expand_hosts", "find_place"]


@dataclass(frozen=True)
class Place:
    """See the module.

    Args:
        nodes: all nodes of the job step, as the scheduler names them; empty where no scheduler says.
        address, port: where rank 0 listens; None with one process.
        is_held_by_agent: torchrun already listens there.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = field(default_factory=lambda: socket.gethostname().split(".")[0])
    nodes: tuple[str, ...] = ()
    address: str | None = None
    port: int | None = None
    is_held_by_agent: bool = False

    def node_of(self, rank: int) -> str | None:
        """The node a rank was to run on, if the scheduler laid the ranks out in blocks."""
        index = rank // self.local_world_size
        is_block = self.world_size == self.local_world_size * len(self.nodes)
        return self.nodes[index] if is_block else None


def find_place() -> Place:
    """The place a launcher (torchrun, accelerate, srun) gave this process; a single process without one.

    Raises:
        LaunchError: a number that is none, or half of what is needed.
    """
    env = os.environ
    host = env.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    ranks = _torchrun_ranks() or slurm_ranks()
    if ranks is None or ranks[1] == 1:
        return Place(host=host)
    meeting = {**slurm_rendezvous(), **env}
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not meeting.get(name)]:
        raise LaunchError(
            f"{ranks[1]} ranks but no {' and no '.join(absent)}; start with torchrun or srun, or export both"
        )
    return Place(
        *ranks,
        host=host,
        nodes=expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")),
        address=meeting["MASTER_ADDR"],
        port=_number("MASTER_PORT", meeting["MASTER_PORT"]),
        is_held_by_agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _torchrun_ranks() -> tuple[int, int, int, int] | None:
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    world = _number("WORLD_SIZE", env["WORLD_SIZE"])
    return (
        _number("RANK", env["RANK"]),
        world,
        _number("LOCAL_RANK", env.get("LOCAL_RANK", "0")),
        _number("LOCAL_WORLD_SIZE", env.get("LOCAL_WORLD_SIZE", str(world))),
    )


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise LaunchError(
            f"{name} is {text!r}, expected a whole number; it is the launcher that sets it"
        )
    return int(text)


def expand_hosts(text: str) -> tuple[str, ...]:
    """SLURM's short form of a list of nodes, written out: `n[1-3,07],m` is n1, n2, n3, n07, m."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]+(?:\[[^\]]*\])?)+", text):
        hosts += _expand(part)
    return tuple(hosts)


def _expand(part: str) -> list[str]:
    found = re.search(r"\[([^\]]*)\]", part)
    if not found:
        return [part]
    before, after = part[: found.start()], _expand(part[found.end() :])
    hosts = []
    for span in found[1].split(","):
        first, _, last = span.partition("-")
        for value in range(int(first), int(last or first) + 1):
            hosts += [f"{before}{value:0{len(first)}d}{rest}" for rest in after]
    return hosts
