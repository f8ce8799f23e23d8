"""`weft eval`: held-out loss, perplexity and bits per byte of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import overrides_argument, print_table, run_argument, run_folder

if TYPE_CHECKING:
    from ..trainer.noise import Noise

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft eval runs/quickstart
  weft eval runs/quickstart --step 500 --baselines
  weft eval runs/quickstart run.device=cpu eval.max_tokens=100000 --json
  weft eval runs/quickstart --noise all
  weft eval runs/quickstart --noise drop --noise-level 0.3 --json
  torchrun --nproc-per-node 2 -m weft eval runs/quickstart
"""

NOISES = ("all", "drop", "repeat", "upper", "random-case", "antspeak")
PARTS = "denoising"
COLUMNS = ("source", "loss", "perplexity", "bits/byte", "tokens", "bytes")
NOISE_COLUMNS = (
    "noise",
    "level",
    "source",
    "before",
    "after",
    "ratio",
    "a byte before",
    "bytes after",
)


@click.command(epilog=EXAMPLES)
@run_argument
@overrides_argument
@click.option(
    "--step", type=click.IntRange(min=0), help="Checkpoint to load; the newest by default."
)
@click.option("--baselines", is_flag=True, help="Compare with gzip -9 and xz -9 on the same bytes.")
@click.option(
    "--noise",
    type=click.Choice(NOISES),
    help="Put noise on the held-out text: bits per byte before and after.",
)
@click.option(
    "--noise-level",
    type=click.FloatRange(0, 1),
    help="Share of the characters; by default 0.1 drop, 0.2 repeat, 0.5 random-case.",
)
@click.option(
    "--noise-repeats",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="repeat: most copies of a chosen character.",
)
@click.option(
    "--noise-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of what is drawn.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    run: str,
    overrides: tuple[str, ...],
    step: int | None,
    baselines: bool,
    noise: str | None,
    noise_level: float | None,
    noise_repeats: int,
    noise_seed: int,
    as_json: bool,
) -> None:
    """Evaluate RUN on its held-out documents, by source and in total.

    The report is also written to RUN/eval/step_XXXXXXXX.json, with noise step_XXXXXXXX_noise.json. Bits per byte count every
    bit of the cross-entropy, ends of documents included, over the raw bytes.
    """
    folder = run_folder(run)
    if noise is None:
        if noise_level is not None:
            raise click.UsageError("--noise-level needs --noise, the kind it is a level of")
        _evaluate(run, folder, overrides, step, baselines, as_json)
        return
    if baselines:
        raise click.UsageError("--baselines compresses the text as it is; leave out --noise")
    from ..trainer.noise import noises

    # Before torch and the checkpoint: a wrong level is answered at once.
    chosen = noises(noise, noise_level, max_repeats=noise_repeats, seed=noise_seed)
    _evaluate_noise(run, folder, chosen, overrides, step, as_json)


def _evaluate(
    run: str,
    folder: Path,
    overrides: tuple[str, ...],
    step: int | None,
    baselines: bool,
    as_json: bool,
) -> None:
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
    _say_where(folder, report_path(folder, report["step"]))


def _evaluate_noise(
    run: str,
    folder: Path,
    chosen: Sequence[Noise],
    overrides: tuple[str, ...],
    step: int | None,
    as_json: bool,
) -> None:
    from ..trainer.run_evaluation import evaluate_noise, open_for_noise, report_path

    with open_for_noise(folder, step, overrides) as trained:
        report = evaluate_noise(trained, chosen, overrides)
        is_main = trained.topology.is_main
    if not is_main:
        return
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    _print_noise(run, report)
    _say_where(folder, report_path(folder, report["step"], noise=True))


def _say_where(folder: Path, path: Path) -> None:
    # Where the file could not be written, a warning has said so.
    if os.access(folder, os.W_OK):
        click.echo(f"written to {path}")


def _print_noise(run: str, report: dict[str, Any]) -> None:
    sources = report["clean"]["sources"]
    parts = [*sources, *(["total"] if len(sources) > 1 else [])]
    rows = []
    for kind, found in report["noise"].items():
        for part in parts:
            before, after = (
                scores["total"] if part == "total" else scores["sources"][part]
                for scores in (report["clean"], found)
            )
            rows.append(_noise_row(kind, found["level"], part, before, after))
    title = f"{run}, step {report['step']:,}: bits per byte before and after noise"
    print_table(title, NOISE_COLUMNS, rows, right=(1, 3, 4, 5, 6, 7))


def _noise_row(
    kind: str, level: float | None, part: str, before: dict[str, Any], after: dict[str, Any]
) -> tuple[str, ...]:
    def shown(value: Any) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:.4f}"

    pair = before.get("bits_per_byte"), after.get("bits_per_byte")
    is_known = all(isinstance(value, float) for value in pair)
    return (
        kind,
        "" if level is None else f"{level:g}",
        part,
        shown(pair[0]),
        shown(pair[1]),
        f"{pair[1] / pair[0]:.3f}" if is_known and pair[0] else "-",
        shown(after.get("bits_per_clean_byte")),
        f"{after['bytes']:,}",
    )


def _print_report(run: str, report: dict[str, Any]) -> None:
    rows = [_row(name, scores) for name, scores in report["sources"].items()]
    if len(rows) > 1:
        rows.append(_row("total", report["total"]))
    title = f"{run}, step {report['step']:,}"
    print_table(title, COLUMNS, rows, right=range(1, len(COLUMNS)))
    _print_parts(report)
    for name, value in report.get("baselines", {}).items():
        click.echo(f"{name}: {value:.4f} bits/byte on the same documents, all in one file")


def _print_parts(report: dict[str, Any]) -> None:
    """Losses by modality and by noise level, of models that have them."""
    names = [name for name in report["total"] if name.startswith(PARTS) or name.endswith("_loss")]
    names = [name for name in names if name != "z_loss"]
    if not names:
        return
    parts = dict(report["sources"])
    if len(parts) > 1:
        parts["total"] = report["total"]
    rows = [
        (source, *(f"{scores[name]:.4f}" if name in scores else "-" for name in names))
        for source, scores in parts.items()
    ]
    titles = [name.removesuffix("_loss").replace("_", " ") for name in names]
    print_table("By part", ("source", *titles), rows, right=range(1, len(titles) + 1))


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
