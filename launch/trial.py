"""`weft debug RECIPE`: any recipe in its smallest faithful form for a few steps, and what has to hold after them.

The data path, the losses, the optimizer and the checkpoints are the recipe's own. What is made smaller is printed.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from ..models.errors import ConfigError, DataError, LaunchError
from ..trainer.configuration.checks import BYTE_VOCABULARY_SIZE
from .local import LocalRanks
from .options import load_recipe, print_table
from .seam import Verdict, compare_exactly

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig
    from ..trainer.data.dataset import Dataset

__all__ = ["run_trial", "smallest_settings", "train_with_checks"]

STEPS = 20
SAVED = STEPS // 2
LENGTH = 128
ROWS = 4
EVAL_TOKENS = 2048
BUILTIN = {"name": "python-stdlib", "path": "builtin:python-stdlib"}
BUILTIN_IMAGES = {"name": "shapes", "path": "builtin:shapes-images:images=400"}


def run_trial(
    recipe: str, overrides: list[str], ranks: int, *, use_builtin: bool, keep: str | None
) -> int:
    """Train the smallest form of a recipe, resume it from its middle, and check both.

    Returns:
        0 if every check holds, else 3.

    Raises:
        WeftError: the recipe cannot work, its data is not here, or the run fails.
    """
    # A length that is asked for need not go with the recipe's own schedule: only with the one made small.
    apart = [o for o in overrides if not o.startswith(("train.", "schedule."))]
    config = load_recipe(recipe, apart).config
    changes = smallest_settings(config, ranks, use_builtin=use_builtin)
    # What the user asks for wins over what is made small.
    settings = [*(f"{key}={yaml_value(value)}" for key, value in changes.items()), *overrides]
    small = load_recipe(recipe, settings).config
    data = _open_data(small, recipe)
    _print_changes(config, small, changes)
    with contextlib.ExitStack() as stack:
        folder = (
            Path(keep)
            if keep
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-debug-")))
        )
        started = time.monotonic()
        whole, resumed = folder / "whole", folder / "resumed"
        _train(small, whole, folder, ranks, resume=False)
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "checkpoints" / f"step_{small.train.steps:08d}")
        _train(small, resumed, folder, ranks, resume=True)
        evaluates = small.eval.at_end and any(s.held_out.tokens for s in data.sources)
        verdicts = [*_checks(whole, small, evaluates), _resume_check(whole, resumed, small)]
        seconds = time.monotonic() - started
    rows = [["ok" if v.is_good else "FAILS", v.what, v.found] for v in verdicts]
    print_table(
        f"{recipe}, smallest form: {small.train.steps} steps on {_ranks(ranks)}",
        ["", "check", "found"],
        rows,
    )
    is_good = all(v.is_good for v in verdicts)
    where = f"; the runs are in {folder}" if keep else ""
    click.echo(f"{'all checks hold' if is_good else 'SOMETHING IS WRONG'} ({seconds:.0f} s){where}")
    return 0 if is_good else 3


def yaml_value(value: Any) -> str:
    """A value as an override writes it."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
    )


def _ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def smallest_settings(
    config: TrainingConfig, ranks: int, *, use_builtin: bool = False
) -> dict[str, Any]:
    """What is set to make a recipe small, by dotted key; only what differs from the recipe.

    The model shrinks by its family's own rule (`Config.debug_size`); a family that has none keeps its size.
    """
    images = config.data.images
    # A row of codes is an image, of which nothing can be cut off.
    length = config.data.sequence_length if images else min(config.data.sequence_length, LENGTH)
    rows = max(ROWS, 2 * ranks)
    wanted: dict[str, Any] = {
        "train.steps": STEPS,
        "data.sequence_length": length,
        "train.batch_tokens": rows * length,
        # Two micro-batches a rank, so that accumulation runs.
        "train.micro_batch_tokens": rows // ranks // 2 * length,
        "schedule.warmup_steps": 2,
        "schedule.warmup_tokens": None,
        "schedule.horizon_steps": None,
        "schedule.horizon_tokens": None,
        "optimizer.skip_step_minimum": min(config.optimizer.skip_step_minimum, STEPS // 2),
        "precision.compute": "fp32",
        "parallel.compile": False,
        "parallel.replicate_ranks": None,
        "parallel.shard_ranks": ranks if config.parallel.strategy == "hsdp" else None,
        "checkpoint.every": SAVED,
        "checkpoint.keep": 2,
        "checkpoint.keep_best": 0,
        "checkpoint.permanent_every": None,
        "logging.every": 1,
        "logging.progress": "none",
        "logging.wandb.enabled": False,
        "logging.tensorboard": False,
        "eval.every": None,
        "eval.at_end": config.data.held_out.documents > 0,
        "eval.max_tokens": min(config.eval.max_tokens or EVAL_TOKENS, EVAL_TOKENS),
        "run.threads": config.run.threads,
    }
    shrink = getattr(config.model, "debug_size", None)
    if shrink is not None:
        wanted |= dict(_flat("model", shrink().model_dump(mode="json")))
    if use_builtin and images is not None:
        if images.kind != "pixels":
            raise ConfigError(
                f"there are no built-in {images.kind} of images; encode some with weft data encode, and name them with "
                "data.sources.0.path=DIR"
            )
        wanted["data.sources"] = [BUILTIN_IMAGES]
    elif use_builtin:
        wanted |= {"data.sources": [BUILTIN], "data.vocabulary": "bytes"}
        if hasattr(config.model, "vocab_size"):
            wanted["model.vocab_size"] = BYTE_VOCABULARY_SIZE
    changes = {key: value for key, value in wanted.items() if _value(config, key) != value}
    if any(
        value is None and isinstance(_value(config, key), dict) for key, value in changes.items()
    ):
        # A section that is left out (a base) may have decided keys that the recipe does not write.
        changes |= {key: value for key, value in wanted.items() if key.startswith("model.")}
    return changes


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(f"{key}.{name}", item)
    else:
        yield key, value


def _value(config: TrainingConfig, key: str) -> Any:
    found: Any = config.dump()
    for name in key.split("."):
        found = found[name]
    return found


def _print_changes(config: TrainingConfig, small: TrainingConfig, changes: dict[str, Any]) -> None:
    rows = [
        (key, _short(_value(config, key)), _short(_value(small, key)))
        for key in changes
        if _value(config, key) != _value(small, key)
    ]
    print_table("Made smaller or plainer", ("key", "recipe", "here"), rows)


def _short(value: Any) -> str:
    if value is None:
        return "null"
    text = value if isinstance(value, str) else yaml_value(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _open_data(config: TrainingConfig, recipe: str) -> Dataset:
    """The recipe's data; that it is elsewhere is told before anything starts.

    Raises:
        DataError: with the two ways to go on.
    """
    from ..trainer.data.dataset import open_data

    try:
        return open_data(config.data)
    except (DataError, LaunchError) as error:
        raise DataError(
            f"{error}; name data that is here (data.sources.0.path=..., data.vocabulary=...), or try it out on the "
            f"built-in corpus: weft debug {recipe} --builtin-data"
        ) from error


def _train(
    config: TrainingConfig, run_dir: Path, folder: Path, ranks: int, *, resume: bool
) -> None:
    """The run's ranks: this process where there is one, so that a `breakpoint()` in a model stops here."""
    from ..trainer.configuration.load import dump_config
    from ..trainer.files import write_text

    click.echo(f"{'resuming from the middle' if resume else 'training'}", err=True)
    recipe = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    run = config.run.model_copy(update={"dir": str(run_dir)})
    write_text(recipe, dump_config(config.model_copy(update={"run": run})))
    target = str(run_dir if resume else recipe)
    if ranks == 1:
        train_with_checks(target, resume=resume)
        return
    flags = ["--resume"] if resume else []
    group = LocalRanks(
        ["debug", "trial-rank", target, *flags], ranks, folder / "logs" / run_dir.name
    )
    if any(group.wait()):
        raise LaunchError(f"the run failed; the end of its output:\n{group.tail(40)}")


def train_with_checks(target: str, *, resume: bool) -> int:
    """Collective: train with deterministic algorithms and with autograd's anomaly mode, which names the operation at fault."""
    # Read when cuBLAS starts; without it, it refuses to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from ..trainer.train import train
    from .options import load_run

    config = (load_run(target) if resume else load_recipe(target)).config
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    # Filling fresh memory would find no fault that anomaly mode does not, and slows every allocation down.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            return train(config, config.run_dir, resume=resume)
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


def _checks(run_dir: Path, config: TrainingConfig, evaluates: bool) -> list[Verdict]:
    from ..trainer.metrics.records import read_metrics

    records = [r for r in read_metrics(run_dir) if "loss" in r]
    verdicts = [_loss_check(records), _finite_check(records), _gradient_check(run_dir, config)]
    if evaluates:
        verdicts.append(_evaluation_check(records))
    times = sorted(r["step_s"] for r in records[1:])
    verdicts.append(
        Verdict("time of a step", f"{times[len(times) // 2] * 1000:.0f} ms (median)", True)
    )
    return verdicts


def _loss_check(records: list[dict[str, Any]]) -> Verdict:
    few = max(1, len(records) // 4)
    first, last = (sum(r["loss"] for r in part) / few for part in (records[:few], records[-few:]))
    return Verdict("the loss goes down", f"{first:.3f} to {last:.3f}", last < first)


def _finite_check(records: list[dict[str, Any]]) -> Verdict:
    bad = [
        r["step"]
        for r in records
        if not (math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]))
    ]
    largest = max(r["grad_norm"] for r in records)
    found = f"first not at step {bad[0]}" if bad else f"norms up to {largest:.3g}"
    return Verdict("losses and gradients are finite", found, not bad)


def _gradient_check(run_dir: Path, config: TrainingConfig) -> Verdict:
    """By the second moments: they are zero as long as no gradient came."""
    from ..trainer.checkpoint.layout import step_folder
    from ..trainer.checkpoint.reading import read_manifest, read_tensor

    path = step_folder(run_dir, config.train.steps)
    moments = [n for n in read_manifest(path).tensors if n.startswith("optimizer/exp_avg_sq/")]
    without = [
        n.removeprefix("optimizer/exp_avg_sq/") for n in moments if not read_tensor(path, n).any()
    ]
    found = f"none: {', '.join(without)}" if without else f"{len(moments)} parameters"
    return Verdict("every trained parameter got a gradient", found, bool(moments) and not without)


def _evaluation_check(records: list[dict[str, Any]]) -> Verdict:
    loss = records[-1].get("eval/loss")
    is_good = loss is not None and math.isfinite(loss)
    found = f"held-out loss {loss:.3f}" if is_good else f"held-out loss {loss}"
    return Verdict("evaluation works", found, is_good)


def _resume_check(whole: Path, resumed: Path, config: TrainingConfig) -> Verdict:
    differing = [v for v in compare_exactly(whole, resumed, config.train.steps) if not v.is_good]
    what = f"saved at {config.checkpoint.every}, resumed: the same to the bit"
    if differing:
        return Verdict(what, f"{differing[0].what}: {differing[0].found}", False)
    return Verdict(what, "records and every tensor of the last checkpoint", True)
