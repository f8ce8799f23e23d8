"""`weft quickstart`: from nothing to a trained model, a score, a sample and a plot, on the machine at hand.

Everything it does is one of the other commands; it ends by naming them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import load_recipe

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig

__all__ = ["command"]

ENTROPY_RECIPE, RECIPE, BYTES_RECIPE = (
    "blt/quickstart-entropy",
    "blt/quickstart",
    "olmo2/quickstart",
)
ENTROPY_KEYS = "entropy."
SHARED_KEYS = ("data.", "run.")
SMOOTHED_OVER = 150
"""Steps: of four documents each, their losses would cross by chance."""
PROMPT = 'class Reader:\n    """'
EXAMPLES = """\b
Examples:
  weft quickstart
  weft quickstart --compare
  weft quickstart train.steps=200 entropy.train.steps=60 run.dir=runs/short
"""


@click.command(epilog=EXAMPLES)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--compare",
    is_flag=True,
    help="Also train the byte-level transformer of olmo2/quickstart, and draw both over FLOPs: about twice the time.",
)
def command(overrides: tuple[str, ...], compare: bool) -> int:
    """Train a small Byte Latent Transformer on the Python standard library, and show what came of it.

    Minutes on two CPU cores: an entropy model first, which decides where patches of bytes start, then the BLT. KEY=VALUE
    pairs override the recipe blt/quickstart; entropy.KEY=VALUE overrides blt/quickstart-entropy, and keys of data and run
    hold for every model.
    """
    begin = time.monotonic()
    steps = _Steps(5 + compare)
    run_dir = _folder(overrides)
    entropy_dir, bytes_dir = _beside(run_dir, "entropy"), _beside(run_dir, "bytes")
    own = [o for o in overrides if not o.startswith((ENTROPY_KEYS, "run.dir="))]
    shared = [o for o in own if o.startswith(SHARED_KEYS)]
    chosen = [o.removeprefix(ENTROPY_KEYS) for o in overrides if o.startswith(ENTROPY_KEYS)]
    entropy = _config(ENTROPY_RECIPE, entropy_dir, [*shared, *chosen])
    config = _config(RECIPE, run_dir, [f"model.patching.entropy_model={entropy_dir}", *own])
    trained = [(ENTROPY_RECIPE, entropy), (RECIPE, config)]
    if compare:
        trained.append((BYTES_RECIPE, _config(BYTES_RECIPE, bytes_dir, shared)))

    for name, one in trained:
        steps.tell(f"training {name} for {one.train.steps} steps on this machine's Python standard library")  # fmt: skip
        code = _train(one)
        if code:
            return code
    steps.tell("scoring on files that were held out")
    scores, baselines = _score(run_dir, bytes_dir if compare else None)
    steps.tell(f"a sample, continuing {PROMPT!r}, with a | where a patch starts")
    sample = _sample(run_dir)
    steps.tell("drawing the curves")
    plot = _plot(run_dir, bytes_dir if compare else None, baselines)
    _print_sample(sample)
    _print_scores(scores, baselines, {RECIPE: run_dir, BYTES_RECIPE: bytes_dir})
    _print_patches(run_dir, entropy_dir)
    _print_folders(run_dir, plot, time.monotonic() - begin)
    return 0


class _Steps:
    """Says which of how many steps begins."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def tell(self, what: str) -> None:
        self.done += 1
        click.echo(f"{self.done}/{self.total}  {what}")


def _folder(overrides: Sequence[str]) -> Path:
    """The run folder that is asked for, or the first of its kind that is free, together with those beside it."""
    for override in overrides:
        if override.startswith("run.dir="):
            return Path(override.partition("=")[2])
    folder, number = Path("runs/quickstart"), 1
    while any(p.exists() for p in (folder, _beside(folder, "entropy"), _beside(folder, "bytes"))):
        number += 1
        folder = Path(f"runs/quickstart-{number}")
    return folder


def _beside(run_dir: Path, what: str) -> Path:
    return run_dir.with_name(f"{run_dir.name}-{what}")


def _config(recipe: str, run_dir: Path, overrides: Sequence[str]) -> TrainingConfig:
    return load_recipe(recipe, [*overrides, f"run.dir={run_dir}"]).config


def _train(config: TrainingConfig) -> int:
    from ..trainer.train import train

    return train(config, config.run_dir)


def _score(run_dir: Path, bytes_dir: Path | None) -> tuple[dict[str, Any], dict[str, float]]:
    """Held-out scores by model, and what compressors make of the same bytes."""
    from ..trainer.run_evaluation import evaluate_run

    report = evaluate_run(run_dir, with_baselines=True)
    scores = {RECIPE: report["total"]}
    if bytes_dir is not None:
        scores[BYTES_RECIPE] = evaluate_run(bytes_dir)["total"]
    return scores, report["baselines"]


def _sample(run_dir: Path) -> str:
    from ..trainer.data.vocabulary import open_vocabulary
    from ..trainer.generated_text import completion_with_borders
    from ..trainer.generation import generate
    from ..trainer.trained import open_trained

    with open_trained(run_dir, for_generation=True) as trained:
        network = trained.network_for_generation()
        vocabulary = open_vocabulary(trained.config.data.vocabulary)
        (completion,) = generate(
            network, vocabulary, [PROMPT], max_new_tokens=240, temperature=0.9, top_p=0.95, seed=1
        )
    return completion_with_borders(completion, vocabulary)


def _plot(run_dir: Path, bytes_dir: Path | None, baselines: dict[str, float]) -> Path:
    """The run's own curves, and beside another's where there is one."""
    from ..trainer.metrics.plot import plot_run

    plot = plot_run(run_dir, baselines=baselines)
    if bytes_dir is None:
        return plot
    from ..trainer.compare import compare_runs
    from ..trainer.metrics.compare_plot import plot_comparison

    found = compare_runs([run_dir, bytes_dir], window=SMOOTHED_OVER)
    return plot_comparison(found, plot.with_name("compare.png"))


def _print_sample(sample: str) -> None:
    click.echo("\n" + "\n".join(f"    {line}" for line in sample.splitlines()) + "\n")


def _print_scores(
    scores: dict[str, Any], baselines: dict[str, float], folders: dict[str, Path]
) -> None:
    """Held-out results, and what the models' training cost; FLOPs as `weft compare` counts them."""
    from ..trainer.compare import read_run
    from .options import print_table

    values = {name: score["bits_per_byte"] for name, score in scores.items()}
    rows = []
    for name, value in values.items():
        run = read_run(folders[name])
        cost = [f"{run.seconds[-1]:.0f}", f"{run.training_flops[-1]:.3g}"]
        rows.append([name, f"{value:.3f}", *cost])
    rows += [[name, f"{value:.3f}", "", ""] for name, value in baselines.items()]
    columns = ["", "bits/byte", "seconds", "training FLOPs"]
    ours = scores[RECIPE]
    print_table(f"{ours['bytes']:,} held-out bytes", columns, rows, right=(1, 2, 3))
    others = [(name, value) for name, value in (values | baselines).items() if name != RECIPE]
    beaten = [name for name, value in others if ours["bits_per_byte"] < value]
    if beaten:
        click.echo(f"{RECIPE} beats {' and '.join(beaten)}.")


def _print_patches(run_dir: Path, entropy_dir: Path) -> None:
    """What patches and their entropy model came to, from the records."""
    from ..trainer.compare import read_run

    run, entropy = read_run(run_dir), read_run(entropy_dir)
    shares = [r["entropy_model_share"] for r in run.records if "entropy_model_share" in r]
    share = sum(shares) / len(shares) if shares else 0.0
    click.echo(
        f"Patches of {run.patch_size:.1f} bytes on average. The entropy model was trained in {entropy.seconds[-1]:.0f} s and took "
        f"{share:.0%} of the time of the BLT's steps, which were {run.seconds[-1]:.0f} s."
    )


def _print_folders(run_dir: Path, plot: Path, seconds: float) -> None:
    click.echo(f"\nDone in {seconds / 60:.1f} minutes. Everything is in {run_dir}/:")
    for name, what in (
        ("config.yaml", "the complete configuration"),
        ("metrics.jsonl", "one line a step"),
        ("checkpoints/", "complete, checksummed; latest names the newest"),
        (str(plot.relative_to(run_dir)), "the curves"),
    ):
        click.echo(f"  {name:<18} {what}")
    typed, entropy, beside = (
        shlex.quote(str(p))
        for p in (run_dir, _beside(run_dir, "entropy"), _beside(run_dir, "bytes"))
    )
    click.echo(f"The entropy model is in {_beside(run_dir, 'entropy')}/.\n\nTry next:")
    for line, what in (
        (f"weft train --resume {typed} train.steps=4000", "go on with it"),
        (f"weft generate {typed} --prompt 'import os' --show-patches", "more samples"),
        (f"weft data patches {typed} --text 400", "its patches"),
        (f"weft train olmo2/quickstart run.dir={beside}", "a transformer over bytes, same data"),
        (f"weft compare {typed} {beside} --plot compare.png", "the two at equal FLOPs"),
        (
            f"weft train blt/quickstart run.dir=runs/wider model.patching.entropy_model={entropy} model.latent.d_model=384",
            "change it",
        ),
        ("weft debug seam olmo2/debug", "kill a run, resume it, compare every bit"),
        ("weft plan blt/1b --gpus 64", "what a real size needs"),
        ("weft submit blt/1b --nodes 4 --gpus-per-node 8 --dry-run", "submit it to a cluster"),
    ):
        click.echo(f"  {line}\n      {what}")
