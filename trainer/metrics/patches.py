"""Numbers of patched models: mean patch size, patches a second, overflow, spread over ranks, parts of the step's time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["add_patch_values"]


def add_patch_values(
    records: Sequence[dict[str, Any]],
    positions: int,
    ranks: int,
    part_seconds: Mapping[str, float],
) -> None:
    """Turn the sums that a task and the loop made of patches into what is reported; other records stay as they are.

    Args:
        records: of one flush; `patches`, `patch_overflow` and `patches_squared` are means over the step's targets.
        positions: of one step over all ranks.
        ranks: that see different data.
        part_seconds: what parts of these steps took on this rank; each becomes NAME_share of their time.
    """
    seconds = sum(record["step_s"] for record in records)
    shares = {f"{name}_share": s / seconds for name, s in part_seconds.items()} if seconds else {}
    for record in records:
        record.update(shares)
        if "patches" not in record:
            continue
        targets = max(1, record["target_tokens"])
        patches = round(record["patches"] * targets)
        record["patches"] = patches
        record["patch_overflow"] = round(record.get("patch_overflow", 0) * targets)
        record["patch_size"] = positions / max(1, patches)
        if "tokens_per_s" in record:
            record["patches_per_s"] = record["tokens_per_s"] / positions * patches
        squares = record.pop("patches_squared", None)
        if squares is not None and ranks > 1 and patches:
            # Relative standard deviation over ranks: needs sums alone, which ranks exchange anyway.
            variance = ranks * squares * targets / patches**2 - 1
            record["patch_spread"] = math.sqrt(max(0.0, variance))
