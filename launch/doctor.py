"""`weft doctor`: what is wrong with this machine or this job's nodes, before a run finds out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..trainer.doctor.examination import Examination
    from ..trainer.doctor.findings import Line

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft doctor
  weft doctor runs/first --quick
  srun --nodes 4 --ntasks-per-node 8 weft doctor /scratch/me/run --exclude-file unfit
  torchrun --nproc-per-node 2 -m weft doctor
"""
WORDS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skipped": "skipped"}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "bright_black"}
CHECK_WIDTH = 14


@click.command(epilog=EXAMPLES)
@click.argument("run_dir", metavar="[RUN_DIR]", default="runs", type=click.Path(file_okay=False))
@click.option("--quick", is_flag=True, help="Smaller sizes and no compiler: under 5 seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@click.option(
    "--exclude-file",
    type=click.Path(dir_okay=False),
    help="Write the names of unfit nodes here, one a line, for weft submit --exclude-file.",
)
@click.option(
    "--limit",
    "limit_s",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Longest wait for the other ranks, in seconds.",
)
def command(
    run_dir: str, quick: bool, as_json: bool, exclude_file: str | None, limit_s: float
) -> int:
    """Look over this machine or, started on every node by srun or torchrun, the nodes of a job.

    RUN_DIR is where the run is, or will be. Exit codes: 0 fit, 2 something a person has to mend,
    4 nodes that are unfit.
    """
    from ..trainer.doctor.context import Context
    from ..trainer.doctor.examination import examine
    from ..trainer.doctor.place import find_place
    from ..trainer.files import write_text

    if exclude_file and not Path(exclude_file).absolute().parent.is_dir():
        raise click.BadParameter(
            f"there is no folder {Path(exclude_file).parent} for {exclude_file}",
            param_hint="--exclude-file",
        )
    # What torch's C++ side has to say of a rank that does not come fills screens.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    context = Context(find_place(), Path(run_dir), is_quick=quick, limit_s=limit_s)
    found = examine(context)
    if exclude_file and context.place.rank == 0:
        write_text(Path(exclude_file), "".join(f"{host}\n" for host in found.unfit_hosts))
    if found.lines and as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    elif found.lines:
        _print(found)
    _leave(found.exit_code, context.place.world_size)
    return found.exit_code


def _leave(code: int, ranks: int) -> None:
    """A collective that hangs would keep the interpreter from ending."""
    if ranks > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _print(found: Examination) -> None:
    ranks = "one process" if found.ranks == 1 else f"{found.ranks} ranks"
    nodes = found.hosts[0] if len(found.hosts) == 1 else f"{len(found.hosts)} nodes"
    click.echo(f"Doctor: {ranks} on {nodes}\n")
    for line in found.lines:
        click.echo(_line(line, found))
        if line.finding.mend:
            click.echo(f"{'':8}{'':{CHECK_WIDTH}} mend: {line.finding.mend}")
    click.echo(f"\n{_verdict(found)}")


def _line(line: Line, found: Examination) -> str:
    finding = line.finding
    word = click.style(f"{WORDS[finding.status]:<8}", fg=COLOURS[finding.status])
    where = ""
    is_bad = finding.status in ("fail", "warn")
    if is_bad and found.ranks > 1 and not finding.hosts:
        on_all = len(line.hosts) == len(found.hosts) and len(found.hosts) > 1
        names = ", ".join(line.hosts[:4]) + (", ..." if len(line.hosts) > 4 else "")
        ranks = f"rank {line.ranks[0]}" if len(line.ranks) == 1 else f"{len(line.ranks)} ranks"
        where = f" [{'all nodes' if on_all else names}, {ranks}]"
    return f"{word}{finding.check:<{CHECK_WIDTH}} {finding.found}{where}"


def _verdict(found: Examination) -> str:
    warnings = sum(line.finding.status == "warn" for line in found.lines)
    also = f"; {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
    failures = [line.finding for line in found.lines if line.finding.status == "fail"]
    if not failures:
        return f"fit to train{also}"
    names = ", ".join(dict.fromkeys(finding.check for finding in failures))
    unfit = f"; unfit nodes: {', '.join(found.unfit_hosts)}" if found.unfit_hosts else ""
    return f"failed: {names}{unfit}{also} (exit code {int(found.exit_code)})"
