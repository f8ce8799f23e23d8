"""All cases in turn, as records and as the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .case import Case
from .measure import copy_bytes_per_s, measure_case

__all__ = ["COLUMNS", "all_cases", "measure_kernels", "table_rows"]

COLUMNS = ("op", "size", "pass", "ms", "GB/s", "of copy", "error", "against", "its ms", "faster")


def all_cases(device: torch.device, wanted: Sequence[str] = ()) -> list[Case]:
    """Cases whose op contains one of the words; all without words."""
    from . import layers, patching, routing, scans

    found = [case for part in (scans, layers, patching, routing) for case in part.cases(device)]
    return [case for case in found if not wanted or any(word in case.op for word in wanted)]


def measure_kernels(
    device: torch.device, wanted: Sequence[str] = (), say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure every case.

    Returns:
        `copy_bytes_per_s` of the device and `records` (see `measure_case`).
    """
    speed = copy_bytes_per_s(device)
    records: list[dict[str, Any]] = []
    for case in all_cases(device, wanted):
        say(f"{case.op}: {case.size}")
        try:
            records += measure_case(case, device, speed)
        except torch.OutOfMemoryError as error:
            # One case too large for this device must not cost the table.
            problem = str(error).splitlines()[0][:120]
            base = {"op": case.op, "size": case.size, "pass": "forward", "side": "weft"}
            records.append({**base, "problem": problem})
            torch.cuda.empty_cache()
    return {"copy_bytes_per_s": speed, "records": records}


def table_rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """A row for each pass and peer; what is ours is written once."""
    ours: dict[tuple[str, str, str], dict[str, Any]] = {}
    peers: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["op"], record["size"], record["pass"])
        if record["side"] == "weft":
            ours[key] = record
        else:
            peers.setdefault(key, []).append(record)
    rows = []
    for key, record in ours.items():
        left = _our_columns(record)
        beside = [_peer_columns(peer) for peer in peers.get(key, [])]
        for right in beside or [[""] * 3]:
            rows.append([*left, *right])
            left = [""] * len(left)
    return rows


def _our_columns(record: dict[str, Any]) -> list[str]:
    first = [record["op"], record["size"], record["pass"]]
    if "problem" in record:
        return [*first, record["problem"], "", "", ""]
    speed, share, error = (record.get(name) for name in ("bytes_per_s", "of_copy", "error"))
    waits = " (waits)" if record.get("waits") else ""
    return [
        *first,
        f"{record['seconds'] * 1e3:.3g}{waits}",
        "" if speed is None else f"{speed / 1e9:.3g}",
        "" if share is None else f"{share:.0%}",
        "" if error is None else f"{error:.0e}",
    ]


def _peer_columns(record: dict[str, Any]) -> list[str]:
    if "problem" in record:
        return [record["side"], record["problem"], ""]
    return [record["side"], f"{record['seconds'] * 1e3:.3g}", f"{record['ratio']:.2f}x"]
