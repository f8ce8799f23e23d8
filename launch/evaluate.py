"""`weft eval`: held-out loss, perplexity and bits per byte of a run."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from .options import overrides_argument, print_table, run_argument, run_folder

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft eval runs/quickstart
  weft eval runs/quickstart --step 500 --baselines
  weft eval runs/quickstart run.device=cpu eval.max_tokens=100000 --json
  torchrun --nproc-per-node 2 -m weft eval runs/quickstart
"""

COLUMNS = ("source", "loss", "perplexity", "bits/byte", "tokens", "bytes")


@click.command(epilog=EXAMPLES)
@run_argument
@overrides_argument
@click.option(
    "--step", type=click.IntRange(min=0), help="Checkpoint to load; the newest by default."
)
@click.option("--baselines", is_flag=True, help="Compare with gzip -9 and xz -9 on the same bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    run: str, overrides: tuple[str, ...], step: int | None, baselines: bool, as_json: bool
) -> None:
    """Evaluate RUN on its held-out documents, by source and in total.

    The report is also written to RUN/eval/step_XXXXXXXX.json. Bits per byte count every bit of the
    cross-entropy, ends of documents included, over the raw bytes.
    """
    folder = run_folder(run)
    from ..trainer.run_evaluation import evaluate_trained, report_path
    from ..trainer.trained import open_trained

    with open_trained(folder, step, overrides) as trained:
        report = evaluate_trained(trained, overrides, with_baselines=baselines)
        is_main = trained.topology.is_main
    if not is_main:
        return
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    _print_report(run, report)
    # Where the file could not be written, a warning has said so.
    if os.access(folder, os.W_OK):
        click.echo(f"written to {report_path(folder, report['step'])}")


def _print_report(run: str, report: dict[str, Any]) -> None:
    rows = [_row(name, scores) for name, scores in report["sources"].items()]
    if len(rows) > 1:
        rows.append(_row("total", report["total"]))
    title = f"{run}, step {report['step']:,}"
    print_table(title, COLUMNS, rows, right=range(1, len(COLUMNS)))
    for name, value in report.get("baselines", {}).items():
        click.echo(f"{name}: {value:.4f} bits/byte on the same documents, all in one file")


def _row(name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    def shown(key: str, form: str) -> str:
        value = scores.get(key)
        # A perplexity past all bounds comes as a word.
        return "-" if value is None else value if isinstance(value, str) else f"{value:{form}}"

    return (
        name,
        shown("loss", ".4f"),
        shown("perplexity", ",.3f"),
        shown("bits_per_byte", ".4f"),
        shown("tokens", ",d"),
        shown("bytes", ",d"),
    )
