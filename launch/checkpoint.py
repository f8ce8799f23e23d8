"""`weft checkpoint`: what a run has saved, and whether every byte of it is sound."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..models.errors import CheckpointError
from .options import print_table, run_folder

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft checkpoint list runs/first
  weft checkpoint verify runs/first
  weft checkpoint verify runs/first --step 500
"""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """List and verify the checkpoints of a run."""


@command.command("list", epilog="\b\nExample:\n  weft checkpoint list runs/first")
@click.argument("run")
def list_command(run: str) -> None:
    """List the checkpoints of RUN, oldest first."""
    from ..trainer.checkpoint.reading import list_checkpoints

    folder = run_folder(run)
    infos = list_checkpoints(folder)
    if not infos:
        raise CheckpointError(
            f"{run} has no checkpoints yet; the first comes after checkpoint.every steps or at the end"
        )
    pointer = folder / "checkpoints" / "latest"
    latest = pointer.read_text().strip() if pointer.is_file() else ""
    rows = [
        [
            info.step,
            _age(info.manifest.created) if info.manifest else "",
            f"{info.bytes / 1e6:,.1f} MB",
            info.manifest.kind if info.manifest else "",
            info.manifest.world_size if info.manifest else "",
            "" if info.score is None else f"{info.score:.4f}",
            info.problem or ("complete, latest" if info.path.name == latest else "complete"),
        ]
        for info in infos
    ]
    print_table(
        f"checkpoints of {run}",
        ["step", "age", "size", "kind", "ranks", "held-out loss", "state"],
        rows,
        right=(0, 1, 2, 4, 5),
    )


def _age(created: float) -> str:
    seconds = max(0, int(time.time() - created))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


@command.command("verify", epilog="\b\nExample:\n  weft checkpoint verify runs/first")
@click.argument("run")
@click.option("--step", type=int, help="Only the checkpoint of this step.")
def verify_command(run: str, step: int | None) -> int:
    """Compare every byte of RUN's checkpoints with its checksum; exit code 2 if one is damaged."""
    from ..trainer.checkpoint.reading import find_checkpoint, list_checkpoints, verify_checkpoint

    infos = [i for i in list_checkpoints(run_folder(run)) if step in (None, i.step)]
    if not infos:
        raise CheckpointError(
            f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; see weft checkpoint list {run}"
        )
    sound: list[Path] = []
    damaged: list[Path] = []
    for info in infos:
        problems = verify_checkpoint(info.path)
        (damaged if problems else sound).append(info.path)
        for line in problems or ["every byte sound"]:
            click.echo(f"{info.path}: {line}")
    if damaged:
        newest = sound[-1] if sound else find_checkpoint(run_folder(run))
        hint = f"the newest sound one is {newest.name}" if newest else "no sound one is left"
        raise CheckpointError(
            f"{len(damaged)} of {len(infos)} checkpoints of {run} damaged, {damaged[-1].name} the newest of them; {hint}"
        )
    return 0
