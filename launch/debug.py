"""`weft debug`: prove on this machine that a run can be killed and resumed without a trace."""

from __future__ import annotations

import click

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft debug seam olmo2/debug
  weft debug seam olmo2/quickstart --steps 5 --ranks 2
"""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Prove that a resume is exact."""


@command.command("seam", epilog="\b\nExample:\n  weft debug seam olmo2/debug --steps 6 --ranks 2")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="N: the undisturbed run has 2N.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Processes of the run.",
)
@click.option(
    "--other-ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes of the resume on another world size.",
)
@click.option("--keep", type=click.Path(), help="Keep the three runs in this folder.")
def seam(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    ranks: int,
    other_ranks: int,
    keep: str | None,
) -> int:
    """Compare an undisturbed run with one that was killed and resumed, to the bit.

    Trains RECIPE for 2N steps. Trains it again, kills every rank with SIGKILL after step N, resumes for N more, and
    compares losses, gradient norms, sample ids, the data itself, random generators and every tensor of the last checkpoint. Then resumes the
    killed run on another number of ranks, where the data must be the same and losses equal up to the order of sums.
    """
    from .seam import run_seam

    return run_seam(recipe, list(overrides), steps, ranks, other_ranks, keep)
