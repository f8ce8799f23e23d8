"""`weft bench kernels`: every op against float64 and against its peers, as one table and one JSON file.

Needs torch alone (no configuration is read), so it runs from a bare checkout.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import click

from ..models.errors import LaunchError

__all__ = ["kernels_command"]

EXAMPLES = """\b
Examples:
  weft bench kernels
  weft bench kernels --op selective_scan --op causal --json kernels.json
  weft bench kernels --device cpu --markdown kernels.md
"""


@click.command("kernels", epilog=EXAMPLES)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--op", "ops", multiple=True, metavar="WORD", help="Only ops whose name holds WORD.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here."
)
@click.option(
    "--markdown",
    "markdown_path",
    type=click.Path(dir_okay=False),
    help="Also write the table here, as it stands in docs/benchmarks.md.",
)
def kernels_command(
    device: str, ops: tuple[str, ...], json_path: str | None, markdown_path: str | None
) -> None:
    """Measure the kernels: accuracy against float64, speed against peers that are installed.

    `of copy` is the share of the device's own copy speed, measured in the same run; `error` the largest relative RMS
    distance of the result and its gradients; `faster` the peer's time over ours.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise LaunchError("--device cuda: torch sees no CUDA device; leave it out, or --device cpu")
    wants_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    _forbid_interpreter(wants_gpu)
    from ..trainer.benchmarks.kernels.table import COLUMNS, all_cases, measure_kernels, table_rows

    place = torch.device("cuda" if wants_gpu else "cpu")
    if not all_cases(place, ops):
        known = ", ".join(sorted({case.op for case in all_cases(place)}))
        raise LaunchError(f"--op {' '.join(ops)}: no such op; there are {known}")
    found = measure_kernels(place, ops, lambda line: click.echo(f"measuring {line}", err=True))
    results = {"date": time.strftime("%Y-%m-%d"), "machine": _machine(place), **found}
    rows = table_rows(found["records"])
    title = _title(results)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1) + "\n")
    if markdown_path:
        Path(markdown_path).write_text(_markdown(title, COLUMNS, rows))
    from .options import print_table

    print_table(title, COLUMNS, rows, right=(3, 4, 5, 6, 8, 9))


def _forbid_interpreter(on_gpu: bool) -> None:
    if on_gpu and os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise LaunchError("TRITON_INTERPRET=1 runs kernels in Python; unset it to measure them")


def _machine(device: Any) -> dict[str, Any]:
    import importlib.metadata

    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "mamba-ssm", "causal-conv1d"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def _title(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(
        f"{k} {v}" for k, v in machine.items() if k not in ("device", "threads", "python")
    )
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    copy = f"copies {results['copy_bytes_per_s'] / 1e9:.0f} GB/s"
    return f"Kernels on {machine['device']}{threads}, {versions}, {copy}, {results['date']}"


def _markdown(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [title, "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
