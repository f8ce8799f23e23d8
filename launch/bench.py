"""`weft bench`: measure Weft on this machine against its peers, as ratios within one run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bench_kernels import kernels_command
from .bench_memory import memory_command
from .bench_ratios import ratios_command
from .bench_restarts import restarts_command
from .options import load_recipe, print_table

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft bench train
  weft bench train olmo2/debug --steps 20 --json bench.json
  weft bench restarts --ranks 4
  weft bench kernels --op selective_scan
  weft bench memory olmo2/debug --ranks 2 parallel.strategy=fsdp
  weft bench ratios dit/cat-ref-s-2 --images 4,8,4
"""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Measure Weft on this machine against its peers."""


command.add_command(kernels_command)
command.add_command(restarts_command)
command.add_command(memory_command)
command.add_command(ratios_command)


@command.command("train", epilog="\b\nExample:\n  weft bench train olmo2/quickstart --steps 8")
@click.argument("recipe", default="olmo2/quickstart")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--steps",
    type=click.IntRange(min=4),
    default=12,
    show_default=True,
    help="Steps of a turn; each side has four turns.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here."
)
def train_command(
    recipe: str, overrides: tuple[str, ...], steps: int, json_path: str | None
) -> None:
    """Measure the trainer around RECIPE: its step against a bare PyTorch loop, saves, loading, start and resume."""
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise click.BadParameter(
            f"there is no folder {Path(json_path).parent} for {json_path}", param_hint="--json"
        )
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        config = load_recipe(
            recipe, [f"run.dir={folder}/steps", "schedule.warmup_steps=1", *overrides]
        ).config
        results = _measure(config, recipe, list(overrides), steps, Path(folder))
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1) + "\n")
    _print(recipe, results)


def _measure(
    config: TrainingConfig, recipe: str, overrides: list[str], steps: int, folder: Path
) -> dict[str, Any]:
    import torch

    from ..trainer.benchmarks.loading import compare_loading
    from ..trainer.benchmarks.saves import compare_saves
    from ..trainer.benchmarks.steps import compare_steps
    from ..trainer.distributed import initialise_distributed

    topology = initialise_distributed(config.run.device)
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    machine["device"] = torch.cuda.get_device_name() if topology.device.type == "cuda" else "cpu"
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "recipe": recipe,
        "machine": machine,
    }
    for name, measure in (
        ("step", lambda: compare_steps(config, topology, steps)),
        ("save", lambda: compare_saves(_in(config, folder / "saves"), topology)),
        ("data", lambda: compare_loading(config)),
        ("start", lambda: _start_and_resume(recipe, overrides, folder / "start")),
    ):
        click.echo(f"measuring: {name}", err=True)
        results[name] = measure()
    return results


def _in(config: TrainingConfig, folder: Path) -> TrainingConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})


def _start_and_resume(recipe: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
    """Seconds from the command to its first step done, fresh and resumed, and the peak memory of the process."""
    import resource

    settings = [
        "schedule.warmup_steps=0",
        "eval.at_end=false",
        "logging.every=1",
        "train.steps=2",
        "checkpoint.every=1",
        *overrides,
    ]
    fresh = _seconds_to_step(["train", recipe, f"run.dir={run_dir}", *settings], run_dir, 1)
    resumed = _seconds_to_step(["train", "--resume", str(run_dir), "train.steps=4"], run_dir, 3)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"first_step_s": fresh, "resumed_first_step_s": resumed, "peak_bytes": peak}


def _seconds_to_step(arguments: list[str], run_dir: Path, step: int) -> float:
    from ..trainer.metrics.records import read_metrics

    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "weft", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    record = next(r for r in read_metrics(run_dir) if r["step"] == step)
    # What a step took is known from its record; when the process began, from here.
    return record["time"] - begin


def _print(recipe: str, results: dict[str, Any]) -> None:
    step, save, data, start = (results[k] for k in ("step", "save", "data", "start"))
    rows = [
        [
            "trainer step / bare PyTorch loop",
            f"{step['ratio']:.3f}",
            f"{step['trainer_step_s'] * 1e3:.1f} ms / {step['bare_step_s'] * 1e3:.1f} ms",
        ],
        [
            "share of a step spent waiting for data",
            f"{step['data_wait_share']:.2%}",
            f"{step['tokens_per_s']:,.0f} tokens/s",
        ],
        [
            "stall of a background save / waited-for save",
            f"{save['ratio']:.3f}",
            f"{save['async_stall_s'] * 1e3:.0f} ms / {save['sync_s'] * 1e3:.0f} ms, {save['bytes'] / 1e6:,.0f} MB",
        ],
        [
            "preparing / datasets map and pack",
            _ratio(data, "prepare_ratio"),
            f"{data['prepare_bytes_per_s'] / 1e6:.1f} MB/s",
        ],
        [
            "loading / datasets through a DataLoader",
            _ratio(data, "load_ratio"),
            f"{data['load_tokens_per_s'] / 1e6:.1f}M tokens/s",
        ],
        ["command to first step done", "", f"{start['first_step_s']:.1f} s"],
        ["resume to first step done", "", f"{start['resumed_first_step_s']:.1f} s"],
        ["peak memory of the process", "", f"{start['peak_bytes'] / 1e6:,.0f} MB"],
    ]
    machine = results["machine"]
    print_table(
        f"{recipe} on {machine['device']}, torch {machine['torch']}, {machine['threads']} threads, {results['date']}",
        ["measured", "ratio", ""],
        rows,
        right=(1,),
    )


def _ratio(data: dict[str, Any], name: str) -> str:
    return f"{data[name]:.2f}" if name in data else "datasets is not installed"
