"""`weft status`: all runs of a folder in one table, or one run with its history. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import LaunchError
from .options import looks_like_run, print_table, run_folder

if TYPE_CHECKING:
    from ..trainer.attempts import Attempt
    from .run_state import RunState

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft status
  weft status runs/sweep --watch
  weft status runs/first
  weft status --json
"""
COLUMNS = ["run", "job", "state", "start", "step", "loss", "tokens/s", "ETA", "saved", "goodput"]
HISTORY = ["start", "job", "on", "ranks", "began", "lasted", "steps", "saved", "ended", "why"]


@click.command(epilog=EXAMPLES)
@click.argument("place", metavar="[RUN|FOLDER]", default="runs")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
@click.option(
    "--every", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(place: str, watch: bool, every: float, as_json: bool) -> None:
    """Show how runs stand: RUN with its history, or all runs of FOLDER (runs if left out)."""
    while True:
        folders = _folders(place)
        if watch:
            click.clear()
        _show(
            folders, looks_like_run(str(folders[0])) and str(folders[0]) == _plain(place), as_json
        )
        if not watch:
            return
        time.sleep(every)


def _folders(place: str) -> list[Path]:
    from .run_state import find_runs

    for folder in (Path(place), Path("runs") / place):
        if found := list(find_runs(folder)):
            return found
    if place == "runs" or Path(place).is_dir():
        raise LaunchError(
            f"there are no runs in {place}; start one with weft train or weft submit, or name another folder"
        )
    return [run_folder(place)]


def _plain(place: str) -> str:
    return str(run_folder(place)) if looks_like_run(place) else str(Path("runs") / place)


def _show(folders: list[Path], is_one: bool, as_json: bool) -> None:
    from ..trainer.attempts import read_attempts
    from .run_state import run_states

    states = run_states(folders)
    if as_json:
        found: list[dict[str, Any]] = [state.to_json() for state in states]
        if is_one:
            found[0]["attempts"] = [asdict(a) for a in read_attempts(folders[0])]
        click.echo(json.dumps(_strict(found[0] if is_one else found), indent=1, allow_nan=False))
        return
    print_table("", COLUMNS, [_row(s) for s in states], right=(3, 4, 5, 6, 7, 8, 9))
    if not is_one:
        return
    if states[0].reason:
        click.echo(f"{states[0].state}: {states[0].reason}")
    if attempts := read_attempts(folders[0]):
        print_table("", HISTORY, [_history_row(a) for a in attempts], right=(0, 3, 5, 7))


def _strict(value: Any) -> Any:
    """JSON has no word for NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _row(s: RunState) -> list[str]:
    state = f"{s.state} ({s.reason})" if s.state == "pending" and s.reason else s.state
    return [
        os.path.relpath(s.run) if Path(s.run).is_absolute() else s.run,
        s.job or "",
        state,
        str(s.attempt or ""),
        f"{s.step:,}/{s.steps:,}" if s.steps else f"{s.step:,}",
        "" if s.loss is None else f"{s.loss:.4f}",
        "" if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}",
        "" if s.eta_s is None else _duration(s.eta_s),
        "" if s.saved_step is None else f"{s.saved_step:,}",
        "" if s.goodput is None else f"{s.goodput:.0%}",
    ]


def _history_row(a: Attempt) -> list[str]:
    return [
        str(a.number),
        _job_of(a),
        ",".join(a.nodes) if isinstance(a.nodes, list) and a.nodes else str(a.nodes or a.host),
        str(a.world_size),
        time.strftime("%m-%d %H:%M:%S", time.localtime(a.start)),
        _duration(a.seconds),
        f"{a.first_step:,} to {a.last_step:,}",
        "" if a.last_saved_step is None else f"{a.last_saved_step:,}",
        (a.outcome or "running").replace("_", " "),
        a.reason,
    ]


def _job_of(a: Attempt) -> str:
    """Job and number of its restart; nothing where there is no scheduler."""
    if not a.job_id:
        return ""
    return f"{a.job_id}{'' if a.array_task_id is None else f'_{a.array_task_id}'} #{a.restart}"


def _duration(seconds: float) -> str:
    """Two of days, hours, minutes and seconds."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
