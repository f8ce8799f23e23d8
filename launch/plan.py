"""`weft plan`: what a recipe costs, before it costs it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from .options import load_recipe_or_run, overrides_argument, print_table, recipe_argument

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig
    from ..trainer.plan import Hardware, Plan

__all__ = ["command"]

GB = 1e9
ROWS_OF_SCALING = 6


@click.command(
    epilog="Example: weft plan olmo2/7b --gpus 256 --mfu 0.45 train.micro_batch_tokens=4096"
)
@recipe_argument
@overrides_argument
@click.option(
    "--gpus", type=click.IntRange(min=1), help="GPUs; the fewest that hold the run if left out."
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    default=80.0,
    show_default=True,
    help="Memory of one GPU in GB (1e9 bytes).",
)
@click.option(
    "--mfu",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the peak that training reaches.",
)
@click.option(
    "--peak-tflops",
    type=click.FloatRange(min=0, min_open=True),
    default=989.5,
    show_default=True,
    help="Dense peak of one GPU; the default is an H100's in bf16.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    gpu_memory: float,
    mfu: float,
    peak_tflops: float,
    as_json: bool,
) -> None:
    """Parameters, FLOPs, memory a GPU, checkpoint size and time of RECIPE, without running it.

    RECIPE is a recipe's name, a YAML file, or a run folder.
    """
    from ..trainer.plan import Hardware, plan_run

    loaded = load_recipe_or_run(recipe, overrides)
    hardware = Hardware(gpu_memory * GB, peak_tflops * 1e12, mfu)
    plan = plan_run(loaded.config, gpus, hardware)
    if as_json:
        click.echo(json.dumps(plan.to_dict(), indent=1))
    else:
        _print_plan(recipe, loaded.config, plan, hardware)


def _print_plan(recipe: str, config: TrainingConfig, plan: Plan, hardware: Hardware) -> None:
    from ..trainer.plan import ASSUMPTIONS

    _print_size(recipe, config, plan)
    _print_memory(config, plan, hardware)
    _print_scaling(config, plan, hardware)
    click.echo("Assumed:")
    for line in ASSUMPTIONS:
        click.echo(f"  - {line}")


def _print_size(recipe: str, config: TrainingConfig, plan: Plan) -> None:
    total = sum(plan.parameters.values())
    rows = [
        (f"parameters: {name.replace('_', ' ')}", f"{count:,}")
        for name, count in plan.parameters.items()
        if count
    ]
    rows += [
        ("parameters", f"{total:,}"),
        ("FLOPs a token", f"{plan.flops_per_token:.4g}"),
        ("tokens of the run", f"{plan.tokens:,}"),
        ("FLOPs of the run", f"{plan.flops:.3g}"),
        ("steps x tokens", f"{config.train.steps:,} x {config.train.batch_tokens:,}"),
        ("checkpoint", f"{_gb(plan.checkpoint_bytes)} (weights alone {_gb(plan.weights_bytes)})"),
    ]
    print_table(recipe, ("size", "value"), rows, right=(1,))


def _print_memory(config: TrainingConfig, plan: Plan, hardware: Hardware) -> None:
    from ..trainer.plan import suggest_fitting

    memory = plan.memory
    rows = [
        ("weights, fp32", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer moments", memory.optimizer),
        (f"{config.precision.compute} copies and gathered layers", memory.compute_copies),
        *(
            (f"activations: {name.replace('_', ' ')}", size)
            for name, size in memory.activations.items()
        ),
        ("CUDA, buffers, fragmentation", memory.total - _listed(plan)),
        ("in all", memory.total),
    ]
    table = [(name, f"{size / GB:.2f}") for name, size in rows]
    print_table("Memory of one GPU", ("part", "GB"), table, right=(1,))
    click.echo(f"{_mesh(plan)}; {_micro(plan)}; {_recompute(config)}")
    verdict = "fits" if plan.fits else "does not fit"
    click.echo(f"{verdict}: {_gb(memory.total)} of {_gb(hardware.memory_bytes)} a GPU")
    if not plan.fits:
        ways = suggest_fitting(config, plan.gpus, hardware)
        click.echo(f"it fits with: {'; or '.join(ways) if ways else 'more memory a GPU'}")
    click.echo(
        f"time: {_time(plan.seconds)} on {_gpus(plan.gpus)} at {hardware.mfu:.0%} of {hardware.peak_flops / 1e12:g} "
        f"TFLOP/s ({plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU)\n"
    )


def _listed(plan: Plan) -> int:
    memory = plan.memory
    held = memory.parameters + memory.gradients + memory.optimizer + memory.compute_copies
    return held + sum(memory.activations.values())


def _print_scaling(config: TrainingConfig, plan: Plan, hardware: Hardware) -> None:
    from ..trainer.plan import plan_scaling

    plans = plan_scaling(config, hardware, first=plan.gpus * 2)[: ROWS_OF_SCALING - 1]
    if plans:
        rows = [
            (
                p.gpus,
                p.micro_batches,
                f"{p.memory.total / GB:.1f}",
                "yes" if p.fits else "no",
                _time(p.seconds),
            )
            for p in (plan, *plans)
        ]
        columns = ("GPUs", "micro-batches a step", "GB a GPU", "fits", "time")
        print_table("On more GPUs", columns, rows, right=(0, 1, 2, 4))


def _mesh(plan: Plan) -> str:
    if plan.strategy == "hsdp":
        return f"hsdp on {_gpus(plan.gpus)}: {plan.gpus // plan.shard_ranks} x {plan.shard_ranks}"
    return f"{plan.strategy} on {_gpus(plan.gpus)}"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _micro(plan: Plan) -> str:
    times = "" if plan.micro_batches == 1 else f"{plan.micro_batches} x "
    return f"{times}{plan.micro_batch_tokens:,} tokens a rank and step"


def _recompute(config: TrainingConfig) -> str:
    mode = config.parallel.activation_checkpointing
    return "no recomputation" if mode == "none" else f"{mode} recomputation"


def _gb(size: float) -> str:
    return f"{size / GB:.3g} GB" if size < 1000 * GB else f"{size / GB:,.0f} GB"


def _time(seconds: float) -> str:
    for unit, length in (
        ("years", 365.25 * 86400),
        ("days", 86400),
        ("hours", 3600),
        ("minutes", 60),
    ):
        if seconds >= length * 1.5:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
