"""Who this process is among the others, and the small exchanges that happen on the host.

Ranks and addresses are read from whichever launcher is there (torchrun, srun, accelerate). Host
exchanges use a gloo group of their own, so that they never wait for, or stall, the GPU's stream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..models.errors import LaunchError, RankLostError
from .rendezvous import is_port_taken, join_store, taken_port
from .slurm import slurm_ranks, slurm_rendezvous

__all__ = ["Topology", "explain_lost_rank", "initialise_distributed", "shutdown_distributed"]

_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "gloo/transport",
)
"""Words of a collective's error when the other side is gone, not when it was called wrongly."""


@dataclass(frozen=True)
class Topology:
    """This process's place. With one process no process group exists and every exchange is local."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Collective: wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.host_group)

    def broadcast_json(self, value: Any) -> Any:
        """Collective: rank 0's JSON-able value, on every rank."""
        if self.world_size == 1:
            return value
        payload = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self.host_group)
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(data, src=0, group=self.host_group)
        return json.loads(bytes(data.numpy()))

    def gather_json(self, value: Any) -> list[Any]:
        """Collective: every rank's JSON-able value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.sum_integers(
            [len(payload) if r == self.rank else 0 for r in range(self.world_size)]
        )
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(payload)] = payload
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.host_group)
        return [json.loads(bytes(g[:n].numpy())) for g, n in zip(gathered, sizes, strict=True)]

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: elementwise sum over ranks of host integers."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(total, group=self.host_group)
        return [int(v) for v in total]


def _launcher_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as the launcher says, or a single process.

    Raises:
        LaunchError: half of what is needed is there, or it is no number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = _integer("RANK"), _integer("WORLD_SIZE")
        if rank >= world:
            raise LaunchError(f"RANK is {rank} but WORLD_SIZE is {world}; ranks count from 0")
        return rank, world, _integer("LOCAL_RANK", 0), _integer("LOCAL_WORLD_SIZE", world)
    if (place := slurm_ranks()) is not None:
        return place
    if "RANK" in env or _integer("WORLD_SIZE", 1) > 1:
        given, absent = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        # Taken for a single process, every rank would train alone in the same run folder.
        raise LaunchError(
            f"{given} is set but {absent} is not; start with torchrun, or unset {given} for a single process"
        )
    return 0, 1, 0, 1


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{name} is {text!r}, expected a whole number; it is the launcher that sets it"
        ) from None


def initialise_distributed(device: str = "auto", timeout_s: float = 1800.0) -> Topology:
    """Join the process group the launcher describes.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.
        timeout_s: how long a collective may wait.

    Raises:
        LaunchError: CUDA was asked for and is absent, or the launcher's environment is incomplete.
    """
    rank, world_size, local_rank, local_world_size = _launcher_environment()
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise LaunchError("run.device is cuda but torch sees no CUDA device; set run.device=cpu")
    use_cuda = has_cuda and device != "cpu"
    if use_cuda and torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
        # The scheduler shows each task its own GPU and no other.
        local_rank = 0
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start as many processes a node as it has GPUs"
        )
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    if world_size == 1:
        return Topology(device=place)
    for name, value in slurm_rendezvous().items():
        os.environ.setdefault(name, value)
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise LaunchError(
            f"{world_size} ranks but no {' and no '.join(absent)}; start with torchrun, or export both in the job script"
        )
    _integer("MASTER_PORT")
    # What NCCL did last, for the dump of a hang; must be set before the first communicator.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    timeout = timedelta(seconds=timeout_s)
    _join_group("cuda:nccl,cpu:gloo" if use_cuda else "gloo", rank, world_size, timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    return Topology(rank, world_size, local_rank, local_world_size, place, host_group)


def _join_group(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    # torchrun's agent has a store of its own, and ranks that were numbered by hand may be of several steps.
    is_step = not {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    try:
        store = join_store(rank, world_size, timeout.total_seconds()) if is_step else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (dist.DistError, RuntimeError) as error:
        if is_port_taken(error):
            raise taken_port(host, port) from error
        raise RankLostError(
            f"rank {rank} of {world_size} could not join the others at {host}:{port}: "
            f"{str(error).splitlines()[0]}; are all ranks running, and is the address theirs?"
        ) from error


def shutdown_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def explain_lost_rank(error: BaseException) -> str | None:
    """One line where a collective failed because another rank is gone; None where the error is of another kind."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(w in text.lower() for w in _LOST):
        return None
    return f"another rank is gone ({text.splitlines()[0][:160] if text else type(error).__name__})"
