"""Where the ranks of a SLURM step meet: a store on rank 0 that the others can tell from whatever else listens there.

torch's own client trusts the port. A program that listens but never answers holds it for ever, and the store of another job
takes it in as a rank of that job. Both happen where rank 0 finds its port taken.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from ..models.errors import RankLostError

__all__ = ["is_port_taken", "join_store", "taken_port"]

ANSWER_S = 30.0
"""How long rank 0 may take to name its job once its port is open; it does so at once."""
LOOK_EVERY_S = 0.5
JOB = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_SRUN_COMM_PORT",
)


def join_store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Collective: the store at MASTER_ADDR and MASTER_PORT, opened by rank 0.

    Args:
        timeout_s: how long a rank waits for the others.

    Raises:
        RankLostError: another program answers at the port, or nobody does.
        RuntimeError: torch's own, where rank 0 cannot listen; see `is_port_taken`.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = "weft/" + ".".join(os.environ.get(variable, "") for variable in JOB)
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:
        store = dist.TCPStore(host, port, world_size, True, timeout, wait_for_workers=False)
        store.set(name, "")
        return store
    _wait_until_open(host, port, timeout_s)
    return _ask(host, port, world_size, timeout, name)


def is_port_taken(error: BaseException) -> bool:
    """Whether this is torch's way to say that another program listens where rank 0 was to listen."""
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()


def taken_port(host: str, port: int | str, found: str = "") -> RankLostError:
    return RankLostError(
        f"port {port} of {host} is taken by another program{found}; export MASTER_PORT=... (a free one), or start again"
    )


def _wait_until_open(host: str, port: int, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RankLostError(
                    f"rank 0 did not come to {host}:{port} within {timeout_s:g} s ({error}); "
                    "are all ranks running, and is the address theirs?"
                ) from error
        time.sleep(LOOK_EVERY_S)


def _ask(host: str, port: int, world_size: int, timeout: timedelta, name: str) -> dist.Store:
    """The store behind an open port, if it knows this job."""
    found: list[dist.Store] = []
    errors: list[str] = []

    def join() -> None:
        try:
            limit = timedelta(seconds=ANSWER_S)
            store = dist.TCPStore(host, port, world_size, False, limit, wait_for_workers=False)
            store.wait([name], limit)
            store.set_timeout(timeout)
            found.append(store)
        except RuntimeError as error:
            errors.append(str(error).splitlines()[0])

    # torch waits for a first answer without a limit; a thread that is left behind ends with the process.
    thread = threading.Thread(target=join, name="weft-rendezvous", daemon=True)
    thread.start()
    thread.join(ANSWER_S + 1)
    if found:
        return found[0]
    said = errors[0] if errors else "it says nothing"
    raise taken_port(host, port, f", which does not answer as rank 0 of this job would ({said})")
