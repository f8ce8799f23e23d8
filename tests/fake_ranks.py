"""Ranks as threads of one process, with the exchanges of a Topology: enough to test what ranks say to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class FakeTopology:
    """One rank of a world of threads."""

    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.world_size, self._world = rank, world.size, world
        self.local_rank, self.local_world_size = rank, world.size
        self.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        self._world.exchange(self.rank, None)

    def broadcast_json(self, value: Any) -> Any:
        return self._world.exchange(self.rank, value)[0]

    def gather_json(self, value: Any) -> list[Any]:
        return self._world.exchange(self.rank, value)

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        return [
            sum(column)
            for column in zip(*self._world.exchange(self.rank, list(values)), strict=True)
        ]


class World:
    """Where the threads meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Any] = [None] * size
        self._meet = threading.Barrier(size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._meet.wait(timeout=30)
        found = list(self._slots)
        self._meet.wait(timeout=30)
        return found


def on_ranks(size: int, work: Callable[[FakeTopology], Any]) -> list[Any]:
    """Call `work` on every rank; results or exceptions, in rank order."""
    world = World(size)
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(FakeTopology(rank, world))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
