"""What nvidia-smi says of the GPUs, asked before this process opens any of them. Imports no torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from .context import Context
from .findings import Finding, fail, ok, skipped, warn

__all__ = ["check_driver", "check_ecc", "check_gpu_memory", "check_throttling"]

OTHERS_MIB = 1000
NO_GPU = "no GPU"


def _query(*fields: str) -> list[list[str]] | None:
    """Rows of `nvidia-smi --query-gpu`, or None without it; an old driver that lacks a field gives no rows."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu=index,{','.join(fields)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        return []
    return [
        [cell.strip() for cell in line.split(",")]
        for line in done.stdout.splitlines()
        if line.strip()
    ]


def _mine(context: Context, rows: Sequence[list[str]]) -> list[list[str]]:
    """Rows of the GPUs this job may use."""
    visible = context.environment.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [part.strip() for part in visible.split(",")]
    if not visible or not all(part.isdigit() for part in numbers):
        return list(rows)
    return [row for row in rows if row[0] in numbers]


def check_driver(context: Context) -> Finding:
    rows = _query("name", "driver_version", "memory.total")
    if rows is None:
        return skipped("gpus", NO_GPU)
    rows = _mine(context, rows)
    if not rows:
        return fail(
            "gpus",
            "nvidia-smi shows no GPU",
            "ask the job for GPUs (--gpus-per-node), or look at the driver: nvidia-smi",
        )
    names = sorted({row[1] for row in rows})
    driver = rows[0][2]
    found = f"{len(rows)} x {', '.join(names)}, {int(rows[0][3]) / 1024:.0f} GiB, driver {driver}"
    return ok("gpus", found, GPUs=f"{len(rows)} x {', '.join(names)}", driver=driver)


def check_gpu_memory(context: Context) -> Finding:
    rows = _query("memory.used")
    if not rows:
        return skipped("gpu memory", NO_GPU)
    used = [(row[0], int(row[1])) for row in _mine(context, rows) if row[1].isdigit()]
    busy = [f"GPU {index}: {size / 1024:.1f} GiB" for index, size in used if size > OTHERS_MIB]
    if busy:
        return fail(
            "gpu memory",
            f"held by others: {', '.join(busy)}",
            "end what holds it: nvidia-smi --query-compute-apps=pid,used_memory --format=csv",
        )
    most = max((size for _, size in used), default=0)
    return ok("gpu memory", f"at most {most} MiB held by others")


def check_ecc(context: Context) -> Finding:
    rows = _query("ecc.errors.uncorrected.volatile.total")
    if rows is None:
        return skipped("ecc", NO_GPU)
    bad = [
        f"GPU {i} has {count}"
        for i, count in _mine(context, rows)
        if count.isdigit() and int(count)
    ]
    if bad:
        return fail(
            "ecc",
            f"uncorrected memory errors: {', '.join(bad)}",
            "leave this node out and tell its operators; a GPU reset clears the count",
        )
    remapped = _mine(context, _query("remapped_rows.pending", "remapped_rows.failure") or [])
    pending = [row[0] for row in remapped if "Yes" in row[1:] or "1" in row[1:]]
    if pending:
        return fail(
            "ecc",
            f"memory rows of GPU {', '.join(pending)} wait to be remapped or could not be",
            "leave this node out; its GPUs need a reset",
        )
    return ok("ecc", "no uncorrected errors") if rows else skipped("ecc", "the driver does not say")


def check_throttling(context: Context) -> Finding:
    reasons = (
        "hw_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "sw_thermal_slowdown",
    )
    # Renamed in newer drivers, which know the old name for some time.
    for prefix in ("clocks_event_reasons", "clocks_throttle_reasons"):
        rows = _query(*(f"{prefix}.{reason}" for reason in reasons))
        if rows is None:
            return skipped("gpu clocks", NO_GPU)
        if rows:
            break
    if not rows:
        return skipped("gpu clocks", "the driver does not say")
    slow = []
    for index, *states in _mine(context, rows):
        active = [r for r, state in zip(reasons, states, strict=False) if state == "Active"]
        if active:
            slow.append(f"GPU {index} ({', '.join(active)})")
    if slow:
        return warn(
            "gpu clocks",
            f"throttled: {'; '.join(slow)}",
            "look at cooling and power: nvidia-smi -q -d PERFORMANCE,TEMPERATURE; leave the node out if it stays",
        )
    return ok("gpu clocks", "not throttled")
