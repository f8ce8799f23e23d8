"""Which share of a job this process does: by option, by its place in a SLURM array or job, or by its rank under torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ....models.errors import ConfigError

__all__ = ["part_of"]


def part_of(given: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(k, n): this process is the k-th of n, from 0.

    Args:
        given: `K/N` with K from 1, as people count; None looks at the environment.

    Raises:
        ConfigError: no part of anything.
    """
    if given is not None:
        place, _, count = given.partition("/")
        if not (place.isdigit() and count.isdigit() and 1 <= int(place) <= int(count)):
            raise ConfigError(f"--part {given} is not K/N with K from 1 to N, such as 2/8")
        return int(place) - 1, int(count)
    array = _array_part(environment)
    rank = _rank_part(environment)
    return array[0] * rank[1] + rank[0], array[1] * rank[1]


def _array_part(environment: Mapping[str, str]) -> tuple[int, int]:
    task = environment.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdigit():
        return 0, 1
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    last = int(environment.get("SLURM_ARRAY_TASK_MAX", task))
    return (int(task) - first) // step, (last - first) // step + 1


def _rank_part(environment: Mapping[str, str]) -> tuple[int, int]:
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if environment.get(rank, "").isdigit() and environment.get(world, "").isdigit():
            return int(environment[rank]), int(environment[world])
    return 0, 1
