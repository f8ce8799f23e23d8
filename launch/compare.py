"""`weft compare`: runs side by side, loss against FLOPs. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..models.errors import ConfigError
from .options import print_table, run_folder

if TYPE_CHECKING:
    from ..trainer.compare import ComparedRun, Comparison
    from ..trainer.matching import Matching

__all__ = ["command"]

AXES = ("training-flops", "inference-flops", "bytes", "tokens", "seconds")
EXAMPLES = """\b
Examples:
  weft compare runs/blt runs/bpe
  weft compare runs/blt runs/bpe --metric eval/bits_per_byte --plot compare.png
  weft compare runs/* --against inference-flops
  weft compare runs/a runs/b --metric loss --against tokens --smooth 50 --json compare.json
  weft compare runs/dense runs/dense-2 runs/mixture --baseline runs/dense --metric eval/image_loss --metric eval/text_loss
"""
MODEL_COLUMNS = (
    "run",
    "family",
    "parameters",
    "tables",
    "auxiliary",
    "training",
    "without aux.",
    "inference",
    "without aux.",
    "bytes a patch",
)


@click.command(epilog=EXAMPLES)
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="bits_per_byte, loss or eval/NAME; smaller is better. Bits per byte by default; several with --baseline.",
)
@click.option(
    "--baseline",
    metavar="RUN",
    help="The share of this run's cost that each other needs to match it, by each metric.",
)
@click.option(
    "--against",
    type=click.Choice(AXES),
    default=AXES[0],
    show_default=True,
    help="What the runs are put against.",
)
@click.option(
    "--smooth",
    type=click.IntRange(min=1),
    help="Records around a value that it is the mean of; by default 2 % of a run, at least 10, and 1 for eval/NAME.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write all of it as JSON; - prints it.")
@click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), metavar="PNG", help="Draw it."
)
def command(
    runs: tuple[str, ...],
    metrics: tuple[str, ...],
    baseline: str | None,
    against: str,
    smooth: int | None,
    json_path: str | None,
    plot_path: Path | None,
) -> None:
    """Compare RUNs: what their models cost, what they reached, and at how much of each other's cost.

    Reads metrics.jsonl and config.yaml only. FLOPs are counted alike for every family, with and without the models that a
    run calls besides its own (BLT's entropy model); parameters without hashed tables, which stand apart.
    """
    folders = [run_folder(run) for run in runs]
    found: Comparison | Matching
    if baseline is not None:
        from ..trainer.matching import match_baseline

        if smooth is not None or against == "inference-flops":
            raise ConfigError("--baseline takes no --smooth and no --against inference-flops")
        chosen = metrics or ("eval/loss",)
        found = match_baseline(folders, run_folder(baseline), chosen, against=against)
    else:
        from ..trainer.compare import compare_runs

        if len(metrics) > 1:
            raise ConfigError(
                f"{len(metrics)} metrics without --baseline; name the run that the others are to match, or one metric"
            )
        metric = metrics[0] if metrics else None
        found = compare_runs(folders, metric=metric, against=against, window=smooth)
    if json_path == "-":
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        _show(found)
    if json_path and json_path != "-":
        _write_json(found, Path(json_path))
    if plot_path:
        _draw(found, plot_path)
        click.echo(f"drawn in {plot_path}", err=json_path == "-")


def _draw(found: Comparison | Matching, path: Path) -> None:
    from ..trainer.matching import Matching
    from ..trainer.metrics.compare_plot import plot_comparison, plot_matching

    try:
        if isinstance(found, Matching):
            plot_matching(found, path)
        else:
            plot_comparison(found, path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give --plot another path"
        ) from error


def _write_json(found: Comparison | Matching, path: Path) -> None:
    from ..trainer.files import write_json

    try:
        write_json(path, found.as_dict())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give --json another path"
        ) from error
    click.echo(f"written to {path}")


def _show(found: Comparison | Matching) -> None:
    from ..trainer.matching import Matching

    _print_models(found.runs)
    if isinstance(found, Matching):
        _print_matching(found)
    else:
        _print(found)
    for note in found.notes:
        click.echo(f"note: {note}")


def _print_models(runs: list[ComparedRun]) -> None:
    unit = "byte" if all(run.costs.per_byte for run in runs) else "byte or token"
    print_table(
        f"Models: parameters, and FLOPs a {unit}",
        MODEL_COLUMNS,
        _model_rows(runs),
        right=range(2, len(MODEL_COLUMNS)),
    )


def _print_matching(found: Matching) -> None:
    columns = ("run", "metric", f"final of {found.baseline}", "its own", "share", "by slope")
    rows = [
        (
            match.run + (" (control)" if match.is_control else ""),
            match.metric,
            f"{found.targets[match.metric]:.4f}",
            f"{match.final:.4f}",
            "> 100 %" if match.share is None else f"{100 * match.share:.1f} %",
            "-" if match.slope is None else f"{100 * match.slope:.1f} %",
        )
        for match in found.matches
    ]
    title = f"{_title(found.against)} to match {found.baseline}"
    print_table(title, columns, rows, right=range(2, 6))


def _print(found: Comparison) -> None:
    name = found.metric
    columns: tuple[str, ...] = (
        "run",
        "steps",
        "bytes",
        "training FLOPs",
        "seconds",
        f"final {name}",
        "best",
    )
    if found.against == "inference-flops":
        columns = (*columns, "frontier")
    print_table("What they reached", columns, _reached_rows(found), right=range(1, len(columns)))
    if found.matches:
        columns = ("run", "reaches the final of", name, "at", "which took", "ratio")
        print_table(
            f"{_title(found.against)} to match", columns, _match_rows(found), right=range(2, 6)
        )
    for line in _crossing_lines(found):
        click.echo(line)


def _title(against: str) -> str:
    return "FLOPs" if against == "training-flops" else against.capitalize()


def _model_rows(runs: list[ComparedRun]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for run in runs:
        costs = run.costs
        mark = "" if costs.per_byte == runs[0].costs.per_byte else " a token"
        rows.append(
            (
                run.name,
                str(getattr(run.config.model, "family", "")),
                f"{costs.parameters:,}",
                _count(costs.table_parameters),
                _count(costs.auxiliary_parameters),
                f"{costs.training:.4g}{mark}",
                f"{3 * costs.forward:.4g}",
                f"{costs.inference:.4g}",
                f"{costs.forward:.4g}",
                "-" if run.patch_size is None else f"{run.patch_size:.2f}",
            )
        )
    return rows


def _count(value: int) -> str:
    return f"{value:,}" if value else "-"


def _reached_rows(found: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for i, run in enumerate(found.runs):
        read = run.bytes
        row: tuple[str, ...] = (
            run.name,
            f"{run.records[-1]['step']:,}",
            "-" if read is None else f"{read[-1]:,.0f}",
            f"{run.training_flops[-1]:.4g}",
            f"{run.seconds[-1]:,.0f}",
            f"{found.final(i):.4f}",
            f"{found.best(i):.4f}",
        )
        if found.against == "inference-flops":
            row = (*row, "yes" if run.name in found.frontier else "no")
        rows.append(row)
    return rows


def _match_rows(found: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            match.run,
            match.other,
            f"{match.value:.4f}",
            "never" if match.at is None else f"{'<= ' * match.is_first}{match.at:.4g}",
            f"{match.other_at:.4g}",
            "-" if match.ratio is None else f"{'<= ' * match.is_first}{match.ratio:.3f}",
        )
        for match in found.matches
    ]


def _crossing_lines(found: Comparison) -> list[str]:
    lines = []
    for a, b, item in found.crossings:
        if item.leader is None:
            lines.append(f"{a} and {b} are equal at equal {found.against}")
            continue
        leader, other = (a, b) if item.leader == 0 else (b, a)
        if item.x is None:
            lines.append(f"{leader} is ahead of {other} throughout, at equal {found.against}")
        else:
            last = "" if item.count == 1 else f", the last of {item.count} crossings"
            lines.append(f"{leader} is ahead of {other} from {item.x:.4g} {found.against} on{last}")
    return lines
