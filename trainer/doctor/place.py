"""Which rank this is, on which node, and where ranks meet, read from the launcher without torch.

torch itself may be what is wrong with a node, so this cannot be asked of `trainer/distributed.py`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...models.errors import LaunchError

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


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place a launcher (torchrun, accelerate, srun) gave this process; a single process without one.

    Raises:
        LaunchError: a number that is none, or half of what is needed.
    """
    job = environment.get("SLURM_JOB_ID")
    nodes = expand_hosts(
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    )

    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default)).split("(")[0]
        if not text.isdigit():
            raise LaunchError(
                f"{name} is {environment[name]!r}, expected a whole number; it is the launcher that sets it"
            )
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        world = number("WORLD_SIZE", 1)
        here = (
            number("RANK", 0),
            world,
            number("LOCAL_RANK", 0),
            number("LOCAL_WORLD_SIZE", world),
        )
    elif "SLURM_PROCID" in environment and number("SLURM_NTASKS", 1) > 1:
        world = number("SLURM_NTASKS", 1)
        local = number("SLURM_NTASKS_PER_NODE", max(1, world // max(1, len(nodes))))
        here = (number("SLURM_PROCID", 0), world, number("SLURM_LOCALID", 0), local)
    else:
        here = (0, 1, 0, 1)
    own = environment.get("SLURMD_NODENAME")
    place = {"host": own} if own else {}
    if here[1] == 1:
        return Place(nodes=(), **place)
    port = number("MASTER_PORT", 20_000 + int(job) % 10_000 if job and job.isdigit() else 0)
    address = environment.get("MASTER_ADDR") or (
        nodes[0] if nodes else environment.get("SLURM_LAUNCH_NODE_IPADDR")
    )
    if not address or not port:
        raise LaunchError(
            f"{here[1]} ranks but no MASTER_ADDR and MASTER_PORT; start with torchrun or srun, or export both"
        )
    return Place(
        *here,
        nodes=nodes,
        address=address,
        port=port,
        is_held_by_agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        **place,
    )


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
