"""Where the ranks of an examination meet: a key-value store that never waits for ever, so that who is absent has a name.

Ranks may be one a node or one a GPU. `Meeting.gather` is the only exchange; rank 0 waits for all until a limit and goes on
with those who came.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ...models.errors import LaunchError
from .place import Place

__all__ = ["Meeting", "NoAnswer", "open_store"]

GRACE_S = 10.0
"""How much longer than rank 0 the others wait: it has to hear of everyone first."""
_PAUSE_S = 0.01


class NoAnswer(LaunchError):
    """Rank 0 was not heard from in time."""

    exit_code = 4


def open_store(place: Place, limit_s: float) -> dist.Store:
    """The store rank 0 serves on the master port; torchrun's own where its agent serves one.

    Raises:
        NoAnswer: nobody serves it in time, or rank 0 could not.
    """
    if place.address is None or place.port is None:
        raise LaunchError("one process has nobody to meet")
    try:
        store = dist.TCPStore(
            place.address,
            place.port,
            world_size=None,
            is_master=place.rank == 0 and not place.is_held_by_agent,
            timeout=timedelta(seconds=limit_s),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError) as error:
        what = (
            "could not listen at"
            if place.rank == 0 and not place.is_held_by_agent
            else "found nobody at"
        )
        raise NoAnswer(
            f"rank {place.rank} on {place.host} {what} {place.address}:{place.port} within {limit_s:g} s: "
            f"{str(error).splitlines()[0][:160]}"
        ) from error
    return dist.PrefixStore("weft_doctor", store)


@dataclass
class Meeting:
    """One rank's seat.

    Args:
        store: shared by all ranks.
        limit_s: longest wait of one exchange.
    """

    store: dist.Store
    place: Place
    limit_s: float
    absent: dict[int, str] = field(default_factory=dict)
    """Ranks that missed an exchange, with its name; they are not waited for again."""

    def gather(self, name: str, value: Any, limit_s: float | None = None) -> dict[int, Any]:
        """Every rank's JSON-able value by rank, of those who came in time; the same on all of them.

        Raises:
            NoAnswer: rank 0 did not say what came of it.
        """
        limit = self.limit_s if limit_s is None else limit_s
        self._set(f"{name}/{self.place.rank}", value)
        if self.place.rank != 0:
            found = self._wait_for(f"{name}/all", limit + GRACE_S)
            return {int(rank): value for rank, value in found.items()}
        came = self._collect(name, limit)
        self._set(f"{name}/all", came)
        return came

    def say(self, doing: str) -> None:
        """Leave word of what this rank is at, for whoever looks for it."""
        self._set(f"doing/{self.place.rank}", doing)

    def last_word(self, rank: int) -> str:
        """What a rank was at when it was last heard of."""
        key = f"doing/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else "never heard of"

    def set_off(self, name: str, clock: Any) -> float:
        """The moment of a signal that rank 0 gives when all are listening, on this node's clock."""
        self.store.add(f"{name}/listening", 1)
        here = self.place.world_size - len(self.absent)
        if self.place.rank == 0:
            deadline = time.monotonic() + self.limit_s
            while self.store.add(f"{name}/listening", 0) < here and time.monotonic() < deadline:
                time.sleep(0.001)
            now: float = clock()
            self._set(f"{name}/signal", now)
            return now
        self._wait_for(f"{name}/signal", self.limit_s + GRACE_S)
        return float(clock())

    def leave(self) -> None:
        """Rank 0 serves the store, so it stays until the others have read their last answer."""
        self.store.add("left", 1)
        deadline = time.monotonic() + min(self.limit_s, GRACE_S)
        here = self.place.world_size - len(self.absent)
        while self.place.rank == 0 and self.store.add("left", 0) < here:
            if time.monotonic() > deadline:
                return
            time.sleep(_PAUSE_S)

    def _collect(self, name: str, limit_s: float) -> dict[int, Any]:
        waiting = [r for r in range(self.place.world_size) if r not in self.absent]
        came: dict[int, Any] = {}
        deadline = time.monotonic() + limit_s
        while waiting:
            for rank in list(waiting):
                if self.store.check([f"{name}/{rank}"]):
                    came[rank] = json.loads(self.store.get(f"{name}/{rank}"))
                    waiting.remove(rank)
            if waiting and time.monotonic() > deadline:
                self.absent |= dict.fromkeys(waiting, name)
                break
            if waiting:
                time.sleep(_PAUSE_S)
        return dict(sorted(came.items()))

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _wait_for(self, key: str, limit_s: float) -> Mapping[str, Any]:
        deadline = time.monotonic() + limit_s
        try:
            # A short wait at a time: the server answers the moment the key is set.
            self.store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except (dist.DistError, RuntimeError) as error:
            raise NoAnswer(
                f"rank {self.place.rank} on {self.place.host} waited {limit_s:g} s for rank 0 ({key}) in vain"
            ) from error
        found: Mapping[str, Any] = json.loads(self.store.get(key))
        return found
