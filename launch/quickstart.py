"""`weft quickstart`: from nothing to a trained model, a score, a sample and a plot, on the machine at hand.

Everything it does is one of the other commands; it ends by naming them.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import load_recipe

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig

__all__ = ["command"]

RECIPE = "olmo2/quickstart"
PROMPT = 'class Reader:\n    """'
EXAMPLES = """\b
Examples:
  weft quickstart
  weft quickstart train.steps=200 run.dir=runs/short
"""


@click.command(epilog=EXAMPLES)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(overrides: tuple[str, ...]) -> int:
    """Train a small byte-level OLMo 2 on the Python standard library, and show what came of it.

    Minutes on two CPU cores. KEY=VALUE pairs override the recipe olmo2/quickstart.
    """
    begin = time.monotonic()
    chosen = (
        [] if any(o.startswith("run.dir=") for o in overrides) else [f"run.dir={_free_folder()}"]
    )
    config = load_recipe(RECIPE, [*chosen, *overrides]).config
    run_dir = config.run_dir
    click.echo(
        f"1/4  training {RECIPE} for {config.train.steps} steps on this machine's Python standard library"
    )
    from ..trainer.train import train

    code = train(config, run_dir)
    if code:
        return code
    click.echo("2/4  scoring it on files it has not seen")
    scores, baselines = _score(run_dir, config)
    click.echo(f"3/4  a sample, continuing {PROMPT!r}")
    sample = _sample(run_dir)
    click.echo("4/4  drawing the curves")
    from ..trainer.metrics.plot import plot_run

    plot = plot_run(run_dir, baselines=baselines)
    _report(run_dir, plot, scores, baselines, sample, time.monotonic() - begin)
    return 0


def _free_folder() -> Path:
    folder, number = Path("runs/quickstart"), 1
    while folder.exists():
        number += 1
        folder = Path(f"runs/quickstart-{number}")
    return folder


def _score(run_dir: Path, config: TrainingConfig) -> tuple[dict[str, Any], dict[str, float]]:
    from ..trainer.run_evaluation import evaluate_run

    report = evaluate_run(run_dir, with_baselines=True)
    return report["total"], report["baselines"]


def _sample(run_dir: Path) -> str:
    from ..trainer.data.vocabulary import open_vocabulary
    from ..trainer.generation import generate
    from ..trainer.trained import open_trained

    with open_trained(run_dir, for_generation=True) as trained:
        network = trained.network_for_generation()
        vocabulary = open_vocabulary(trained.config.data.vocabulary)
        (completion,) = generate(
            network, vocabulary, [PROMPT], max_new_tokens=240, temperature=0.9, top_p=0.95, seed=1
        )
    return PROMPT + completion.text


def _report(
    run_dir: Path,
    plot: Path,
    scores: dict[str, Any],
    baselines: dict[str, float],
    sample: str,
    seconds: float,
) -> None:
    from .options import print_table

    click.echo("\n" + "\n".join(f"    | {line}" for line in sample.splitlines()) + "\n")
    ours = scores["bits_per_byte"]
    rows = [
        ["this model", f"{ours:.3f}"],
        *([name, f"{value:.3f}"] for name, value in baselines.items()),
    ]
    print_table(
        f"bits per byte on {scores['bytes']:,} held-out bytes", ["", "bits/byte"], rows, right=(1,)
    )
    beaten = [name for name, value in baselines.items() if ours < value]
    if beaten:
        click.echo(f"The model beats {' and '.join(beaten)}.")
    click.echo(f"\nDone in {seconds / 60:.1f} minutes. Everything is in {run_dir}/:")
    for name, what in (
        ("config.yaml", "the complete configuration"),
        ("metrics.jsonl", "one line a step"),
        ("checkpoints/", "complete, checksummed; latest names the newest"),
        (str(plot.relative_to(run_dir)), "the curves"),
    ):
        click.echo(f"  {name:<18} {what}")
    click.echo("\nTry next:")
    typed = shlex.quote(str(run_dir))
    for line, what in (
        (f"weft train --resume {typed} train.steps=4000", "go on with it"),
        (f"weft generate {typed} --prompt 'import os' --temperature 0.8", "more samples"),
        ("weft debug seam olmo2/debug", "kill a run, resume it, compare every bit"),
        ("weft train olmo2/quickstart run.dir=runs/wider model.d_model=192", "change it"),
        ("weft plan olmo2/7b --gpus 64", "what a real size needs"),
        (
            "torchrun --nproc-per-node 2 -m weft train olmo2/quickstart run.dir=runs/two",
            "on several processes or GPUs",
        ),
        ("weft submit olmo2/1b --nodes 4 --gpus-per-node 8 --dry-run", "submit it to a cluster"),
    ):
        click.echo(f"  {line:<76} {what}")
