"""`weft bench restarts`: what it costs to be able to stop at any step, and how long a stop and a start take."""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from ..models.errors import LaunchError
from .local import LocalRanks
from .options import load_recipe, print_table

__all__ = ["restarts_command"]

STEPS_BEFORE = 12
LIMIT_S = 300.0


@click.command("restarts", epilog="\b\nExample:\n  weft bench restarts olmo2/debug --ranks 4")
@click.argument("recipe", default="olmo2/quickstart")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Processes on this machine.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here."
)
@click.option("--on-rank", type=click.Path(), hidden=True, help="Of the ranks it starts.")
def restarts_command(
    recipe: str,
    overrides: tuple[str, ...],
    ranks: int,
    json_path: str | None,
    on_rank: str | None,
) -> None:
    """Measure signal to exit, start to first step, and what agreeing on stops costs a step of RECIPE."""
    if on_rank is not None:
        _measure_on_rank(Path(on_rank))
        return
    settings = [
        "logging.every=1",
        "checkpoint.every=null",
        "eval.at_end=false",
        "run.device=cpu",
        "run.threads=1",
        *overrides,
    ]
    load_recipe(recipe, settings)
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        results = _measure(recipe, settings, ranks, Path(folder))
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1) + "\n")
    _print(recipe, results)


def _measure(recipe: str, settings: list[str], ranks: int, folder: Path) -> dict[str, Any]:
    from ..trainer.attempts import read_attempts
    from ..trainer.metrics.records import read_metrics

    run = folder / "run"
    click.echo("measuring: start, signal to exit", err=True)
    group = LocalRanks(["train", recipe, *settings, f"run.dir={run}"], ranks, folder / "first")
    _wait_for_step(group, run, STEPS_BEFORE)
    begin = time.time()
    group.processes[-1].send_signal(signal.SIGTERM)
    codes = group.wait()
    exit_s = time.time() - begin
    if set(codes) != {75}:
        raise LaunchError(f"the run did not stop on request; its output ends:\n{group.tail()}")
    steps = [r["step_s"] for r in read_metrics(run) if "step_s" in r]
    click.echo("measuring: resume", err=True)
    more = [f"train.steps={len(steps) + 1}", "schedule.warmup_steps=0"]
    group = LocalRanks(["train", "--resume", str(run), *more], ranks, folder / "second")
    if any(group.wait()):
        raise LaunchError(f"the resume failed; its output ends:\n{group.tail()}")
    click.echo("measuring: agreement", err=True)
    out = folder / "agreement.json"
    group = LocalRanks(["bench", "restarts", "--on-rank", str(out)], ranks, folder / "third")
    if any(group.wait()):
        raise LaunchError(f"the measurement failed; its output ends:\n{group.tail()}")
    first, second = read_attempts(run)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "recipe": recipe,
        "ranks": ranks,
        "cores": os.cpu_count(),
        "step_s": statistics.median(steps[2:]),
        "signal_to_exit_s": exit_s,
        "save_s": first.save_seconds,
        "first_step_s": first.seconds_to_first_step,
        "resumed_first_step_s": second.seconds_to_first_step,
        **json.loads(out.read_text()),
    }


def _wait_for_step(group: LocalRanks, run: Path, step: int) -> None:
    from ..trainer.metrics.records import read_metrics

    deadline = time.monotonic() + LIMIT_S
    while group.is_running() and time.monotonic() < deadline:
        records = read_metrics(run)
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)
    group.kill()
    raise LaunchError(f"the run came to no step {step}; its output ends:\n{group.tail()}")


def _measure_on_rank(out: Path) -> None:
    from ..trainer.benchmarks.agreement import measure_agreement
    from ..trainer.distributed import initialise_distributed, shutdown_distributed
    from ..trainer.files import write_json

    topology = initialise_distributed("cpu")
    found = measure_agreement(topology)
    if topology.is_main:
        write_json(out, found)
    shutdown_distributed()


def _print(recipe: str, results: dict[str, Any]) -> None:
    added = max(0.0, results["reduction_s"] - results["reduction_without_s"]) + results["look_s"]
    rows = [
        ["step", f"{results['step_s'] * 1e3:.1f} ms", ""],
        ["its reduction on the host", f"{results['reduction_s'] * 1e6:.0f} us", ""],
        [
            "of that for stops, saves, rollback; looks; watchdog",
            f"{added * 1e6:.0f} us",
            f"{added / results['step_s']:.3%} of a step",
        ],
        ["signal to exit", f"{results['signal_to_exit_s']:.2f} s", "of one rank, until all ended"],
        ["of that the save", f"{results['save_s']:.2f} s", ""],
        ["start to first step done", f"{results['first_step_s']:.1f} s", ""],
        ["resume to first step done", f"{results['resumed_first_step_s']:.1f} s", ""],
    ]
    print_table(
        f"{recipe}, {results['ranks']} ranks on {results['cores']} cores, {results['date']}",
        ["measured", "", ""],
        rows,
        right=(1,),
    )
