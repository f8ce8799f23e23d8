"""The seam test: the same run undisturbed, killed and resumed, and resumed on another number of ranks."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..models.errors import LaunchError
from .local import LocalRanks
from .options import load_recipe, print_table

__all__ = ["Verdict", "compare_closely", "compare_exactly", "last_step", "run_seam"]

EXACT = (
    "loss",
    "z_loss",
    "grad_norm",
    "lr",
    "skipped",
    "tokens",
    "first_sample",
    "last_sample",
    "target_tokens",
    "data_digest",
)
SAME_DATA = ("first_sample", "last_sample", "target_tokens", "tokens", "data_digest")
CLOSE = ("loss", "grad_norm")
TOLERANCE = 1e-4
"""Largest relative difference of a loss on another number of ranks, where sums have another order."""
LIMIT_S = 600.0


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    what: str
    found: str
    is_good: bool


def run_seam(
    recipe: str, overrides: list[str], steps: int, ranks: int, other_ranks: int, keep: str | None
) -> int:
    """Run the comparison and print it.

    Returns:
        0 if nothing differs, else 3.

    Raises:
        LaunchError: a run failed for another reason.
    """
    settings = [
        f"train.steps={2 * steps}",
        f"checkpoint.every={steps}",
        "checkpoint.keep=4",
        "logging.every=1",
        "eval.at_end=false",
        "run.threads=1",
        "run.device=cpu",
        "schedule.warmup_steps=1",
        "schedule.warmup_tokens=null",
        *overrides,
    ]
    load_recipe(recipe, settings)
    with contextlib.ExitStack() as stack:
        folder = (
            Path(keep)
            if keep
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-seam-")))
        )
        begin = time.monotonic()
        whole, killed, moved = (folder / name for name in ("whole", "killed", "moved"))
        _train(
            [recipe, *settings, f"run.dir={whole}"],
            ranks,
            folder,
            "undisturbed run",
            f"{2 * steps} steps",
        )
        _train_and_kill([recipe, *settings, f"run.dir={killed}"], ranks, folder, steps)
        shutil.copytree(killed, moved)
        _train(["--resume", str(killed)], ranks, folder, "resumed", f"on {ranks} ranks")
        _train(
            ["--resume", str(moved)],
            other_ranks,
            folder,
            "resumed elsewhere",
            f"on {other_ranks} ranks",
        )
        verdicts = [
            *compare_exactly(whole, killed, 2 * steps),
            *compare_closely(whole, moved, 2 * steps, ranks, other_ranks),
        ]
        seconds = time.monotonic() - begin
    rows = [["ok" if v.is_good else "DIFFERS", v.what, v.found] for v in verdicts]
    print_table(
        f"seam of {recipe}: 2 x {steps} steps, {ranks} ranks, killed with SIGKILL",
        ["", "compared", "found"],
        rows,
    )
    is_good = all(v.is_good for v in verdicts)
    click.echo(f"{'the seam is exact' if is_good else 'THE SEAM SHOWS'} ({seconds:.0f} s)")
    return 0 if is_good else 3


def _train(arguments: list[str], ranks: int, folder: Path, name: str, detail: str) -> None:
    click.echo(f"{name}: {detail}", err=True)
    group = LocalRanks(["train", *arguments], ranks, folder / "logs" / name.replace(" ", "_"))
    if any(group.wait()):
        raise LaunchError(f"the {name} failed; the end of its output:\n{group.tail()}")


def _train_and_kill(arguments: list[str], ranks: int, folder: Path, steps: int) -> None:
    """Start a run and kill it once step N is committed and a later step is logged."""
    click.echo(f"run to be killed: after step {steps}", err=True)
    run_dir = Path(arguments[-1].partition("=")[2])
    group = LocalRanks(["train", *arguments], ranks, folder / "logs" / "killed")
    committed = run_dir / "checkpoints" / f"step_{steps:08d}" / "manifest.json"
    deadline = time.monotonic() + LIMIT_S
    while group.is_running() and time.monotonic() < deadline:
        if committed.exists() and last_step(run_dir) > steps:
            break
        time.sleep(0.005)
    else:
        group.kill()
        raise LaunchError(
            f"the run ended before it could be killed; the end of its output:\n{group.tail()}"
        )
    group.kill()
    last = run_dir / "checkpoints" / f"step_{2 * steps:08d}"
    if last.exists():
        # It was faster than the kill; without its last checkpoint it is a run that died after step N all the same.
        shutil.rmtree(last)


def last_step(run_dir: Path) -> int:
    """The last step in a run's records; 0 where there is none."""
    records = _records(run_dir)
    return max(records, default=0)


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """Records of training steps, as they stand in the file."""
    path = run_dir / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        # The last line of a run that is still writing may be half there.
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if "loss" in record:
                found.append(record)
    return found


def _records(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in _lines(run_dir)}


def compare_exactly(whole: Path, resumed: Path, steps: int) -> list[Verdict]:
    """Records of every step, and every tensor of the last checkpoint, of two runs that must be the same."""
    ours, theirs = _records(whole), _records(resumed)
    verdicts = [_steps_verdict(whole, resumed, steps)]
    for key in EXACT:
        differing = [s for s in ours if ours[s].get(key) != theirs.get(s, {}).get(key)]
        found = (
            f"{len(ours)} steps, equal to the bit"
            if not differing
            else f"first at step {differing[0]}: {ours[differing[0]].get(key)} and {theirs.get(differing[0], {}).get(key)}"
        )
        verdicts.append(Verdict(key, found, not differing))
    return [*verdicts, *_compare_checkpoints(whole, resumed, steps)]


def _steps_verdict(whole: Path, resumed: Path, steps: int) -> Verdict:
    for run_dir in (whole, resumed):
        found = [record["step"] for record in _lines(run_dir)]
        if found != list(range(1, steps + 1)):
            return Verdict("steps in metrics.jsonl", f"{run_dir.name}: {found}", False)
    return Verdict("steps in metrics.jsonl", f"{steps}, each once", True)


def _compare_checkpoints(whole: Path, resumed: Path, steps: int) -> list[Verdict]:
    from ..trainer.checkpoint.layout import step_folder
    from ..trainer.checkpoint.reading import read_manifest

    a, b = read_manifest(step_folder(whole, steps)), read_manifest(step_folder(resumed, steps))
    sums_a, sums_b = (
        {n: [c.sha256 for c in t.chunks] for n, t in m.tensors.items()} for m in (a, b)
    )
    differing = sorted(n for n in sums_a.keys() | sums_b.keys() if sums_a.get(n) != sums_b.get(n))
    tensors = Verdict(
        "tensors of the last checkpoint",
        f"{len(sums_a)}, equal to the bit"
        if not differing
        else f"{len(differing)} differ, {differing[0]} the first",
        not differing,
    )
    return [
        tensors,
        Verdict("random generators", f"those of {len(a.ranks)} ranks", a.ranks == b.ranks),
    ]


def compare_closely(whole: Path, moved: Path, steps: int, ranks: int, other: int) -> list[Verdict]:
    """Two runs of which one was for a time on another number of ranks: the same data, and losses up to the order of sums."""
    ours, theirs = _records(whole), _records(moved)
    label = f"{ranks} -> {other} ranks:"
    verdicts = [_steps_verdict(whole, moved, steps)]
    different = [
        s for s in ours for key in SAME_DATA if ours[s].get(key) != theirs.get(s, {}).get(key)
    ]
    verdicts.append(
        Verdict(
            f"{label} samples and their content",
            f"{len(ours)} steps, the same" if not different else f"first at step {different[0]}",
            not different,
        )
    )
    for key in CLOSE:
        worst = max(
            (_relative_difference(ours[s][key], theirs.get(s, {}).get(key)) for s in ours),
            default=math.inf,
        )
        verdicts.append(
            Verdict(
                f"{label} {key}", f"largest relative difference {worst:.1e}", worst <= TOLERANCE
            )
        )
    return verdicts


def _relative_difference(ours: float | str, theirs: float | str | None) -> float:
    """Values that are no numbers come as words; one of them beside a number is as far off as can be."""
    if ours == theirs:
        return 0.0
    if theirs is None or not math.isfinite(float(ours)) or not math.isfinite(float(theirs)):
        return math.inf
    return abs(float(theirs) - float(ours)) / max(abs(float(ours)), 1e-30)
