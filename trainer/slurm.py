"""What SLURM tells a task about its place and about where the ranks meet. Imports no torch.

Nothing has to be exported by the job script: `srun python -m weft train ...` is enough. The script of weft submit looks for a
free port, and exports it, all the same.
"""

from __future__ import annotations

import os
import re
import socket

from ..models.errors import LaunchError

__all__ = ["first_host", "rendezvous_port", "slurm_ranks", "slurm_rendezvous"]

FIRST_PORT, PORTS = 20_000, 10_000
"""Below the range from which Linux hands out ports of its own (32768 on)."""
PORT_STRIDE = 7
"""From a job's port to the next one's, with room for steps."""


def slurm_ranks() -> tuple[int, int, int, int] | None:
    """(rank, world size, local rank, local world size) of a task of a step with several; else None."""
    env = os.environ
    world = _integer("SLURM_STEP_NUM_TASKS", _integer("SLURM_NTASKS", 1))
    if "SLURM_PROCID" not in env or world < 2:
        return None
    if "SLURM_JOB_ID" in env and "SLURM_STEP_NUM_TASKS" not in env:
        # The batch script itself: it has the job's number of tasks, and is none of them.
        return None
    rank, local, node = (
        _integer("SLURM_PROCID"),
        _integer("SLURM_LOCALID"),
        _integer("SLURM_NODEID"),
    )
    return rank, world, local, _tasks_of_node(node, world)


def _integer(name: str, default: int = 0) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{name} is {text!r}, expected a whole number; it is srun that sets it"
        ) from None


def _tasks_of_node(node: int, world: int) -> int:
    """From a list such as `4(x2),3`: four tasks on each of two nodes, three on the third."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    text = next((os.environ[name] for name in names if os.environ.get(name)), "")
    if "," not in text and "(" not in text and text.isdigit():
        return int(text)
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else world


def first_host(nodes: str) -> str:
    """The first name of SLURM's compressed list: `gpu[007-010,2],login` -> `gpu007`."""
    # Commas inside brackets part numbers, those outside part names.
    name = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name[0] if name else nodes)


def rendezvous_port(job: int, step: int = 0) -> int:
    """A port that two jobs on one node are unlikely to share, the same on all ranks; the job script computes it too."""
    return FIRST_PORT + (job * PORT_STRIDE + step) % PORTS


def slurm_rendezvous() -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of this step; empty outside one."""
    env = os.environ
    if "SLURM_PROCID" not in env or "SLURM_JOB_ID" not in env:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    step = env.get("SLURM_STEP_ID", "0")
    port = rendezvous_port(int(env["SLURM_JOB_ID"]), int(step) if step.isdigit() else 0)
    return {"MASTER_ADDR": _address(first_host(nodes)), "MASTER_PORT": str(port)}


def _address(host: str) -> str:
    """The host, where its name can be resolved; else where srun was started, which for a batch job is the first node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
