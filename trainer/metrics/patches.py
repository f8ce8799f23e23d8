"""Numbers of patched models: patches a second, their spread over ranks, and the share of the time that parts take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["add_part_shares", "add_patch_values"]


def add_part_shares(records: Sequence[dict[str, Any]], seconds: Mapping[str, float]) -> None:
    """Add NAME_share to the records of one flush: what parts of their steps took on this rank, of the steps' time."""
    total = sum(record["step_s"] for record in records)
    if total > 0:
        for record in records:
            record.update({f"{name}_share": part / total for name, part in seconds.items()})


def add_patch_values(record: dict[str, Any], positions: int, ranks: int) -> None:
    """Add `patches_per_s` and `patch_spread` where a model has patches.

    Args:
        record: of one step, with `patches` of all ranks, and `patches_squared` as a mean over positions.
        positions: of the step over all ranks.
        ranks: that see different data.
    """
    squares = record.pop("patches_squared", None)
    patches = record.get("patches")
    if not patches:
        return
    if "tokens_per_s" in record:
        record["patches_per_s"] = record["tokens_per_s"] / positions * patches
    if squares is not None and ranks > 1:
        # Relative standard deviation of the ranks' patches.
        record["patch_spread"] = math.sqrt(max(0.0, ranks * squares * positions / patches**2 - 1))
