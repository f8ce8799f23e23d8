"""`weft plan`: what a recipe costs, before it costs it; imports no torch."""

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
@click.option(
    "--link",
    type=click.FloatRange(min=0, min_open=True),
    default=50.0,
    show_default=True,
    help="GB/s of one GPU to other nodes; 50 is 400 Gbit/s.",
)
@click.option(
    "--node-link",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="GB/s of one GPU to those of its own node.",
)
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="GPUs that --node-link joins.",
)
@click.option(
    "--disk",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="GB/s into the run folder, all ranks together (weft doctor measures one).",
)
@click.option(
    "--zero",
    type=click.IntRange(min=0, max=3),
    help="Plan for DeepSpeed at this ZeRO stage instead of the recipe's strategy.",
)
@click.option(
    "--offload",
    type=click.Choice(["none", "optimizer", "all"]),
    default="none",
    show_default=True,
    help="With --zero: what lives in the host's memory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    gpu_memory: float,
    mfu: float,
    peak_tflops: float,
    link: float,
    node_link: float,
    gpus_per_node: int,
    disk: float,
    zero: int | None,
    offload: str,
    as_json: bool,
) -> None:
    """Parameters, FLOPs, memory a GPU, communication, checkpoints and time of RECIPE, without running it.

    RECIPE is a recipe's name, a YAML file, or a run folder.
    """
    from ..trainer.plan import Hardware, plan_run

    loaded = load_recipe_or_run(recipe, overrides)
    _check_offload(zero, offload)
    parallel = loaded.config.parallel
    if zero is None and parallel.engine == "deepspeed":
        from ..trainer.engines.deepspeed_config import zero_layout

        zero, offload = zero_layout(parallel.deepspeed)
    hardware = Hardware(
        memory_bytes=gpu_memory * GB,
        peak_flops=peak_tflops * 1e12,
        mfu=mfu,
        link_bytes_per_s=link * GB,
        node_link_bytes_per_s=node_link * GB,
        gpus_per_node=gpus_per_node,
        disk_bytes_per_s=disk * GB,
        zero_stage=zero,
        offload=offload,
    )
    plan = plan_run(loaded.config, gpus, hardware)
    if as_json:
        click.echo(json.dumps(plan.to_dict(), indent=1))
    else:
        _print_plan(recipe, loaded.config, plan, hardware)


def _check_offload(zero: int | None, offload: str) -> None:
    if offload != "none" and not zero:
        raise click.BadParameter("needs --zero 1, 2 or 3", param_hint="--offload")
    if offload == "all" and zero != 3:
        raise click.BadParameter(
            "all needs --zero 3; optimizer goes with 1 and 2", param_hint="--offload"
        )


def _print_plan(recipe: str, config: TrainingConfig, plan: Plan, hardware: Hardware) -> None:
    from ..trainer.plan import ASSUMPTIONS

    _print_size(recipe, config, plan)
    _print_memory(config, plan, hardware)
    _print_proposals(config, plan, hardware)
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
    memory = plan.memory
    rows = [
        ("weights" if hardware.zero_stage else "weights, fp32", memory.parameters),
        ("gradients", memory.gradients),
        (
            "fp32 weights and moments" if hardware.zero_stage else "optimizer moments",
            memory.optimizer,
        ),
        (f"{config.precision.compute} copies and gathered layers", memory.compute_copies),
        ("gradients on their way", memory.communication),
        *(
            (f"activations: {name.replace('_', ' ')}", size)
            for name, size in memory.activations.items()
        ),
        ("CUDA, buffers, fragmentation", memory.total - memory.allocated),
        ("in all", memory.total),
    ]
    table = [(name, f"{size / GB:.2f}") for name, size in rows]
    print_table(f"Memory of one GPU as {memory.moment}", ("part", "GB"), table, right=(1,))
    click.echo(f"{_mesh(plan)}; {_micro(plan)}; {_recompute(config)}")
    verdict = "fits" if plan.fits else "does not fit"
    click.echo(f"{verdict}: {_gb(memory.total)} of {_gb(hardware.memory_bytes)} a GPU")
    if memory.host:
        click.echo(f"host memory: {_gb(memory.host)} a GPU")
    sent = plan.communication
    click.echo(
        f"sent by a GPU a step: {_gb(sent.total)} (weights {_gb(sent.gather)}, gradients "
        f"{_gb(sent.scatter + sent.reduce)}{f', table rows {_gb(sent.rows)}' if sent.rows else ''}), "
        f"{_time(plan.communication_seconds)} on the wire of a step of {_time(plan.step_seconds)}"
    )
    click.echo(
        f"save: {_time(plan.checkpoint_bytes / hardware.disk_bytes_per_s)} in the background at "
        f"{hardware.disk_bytes_per_s / GB:g} GB/s"
    )
    click.echo(
        f"time: {_time(plan.seconds)} on {_gpus(plan.gpus)} at {hardware.mfu:.0%} of {hardware.peak_flops / 1e12:g} "
        f"TFLOP/s ({plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU)\n"
    )


def _print_proposals(config: TrainingConfig, plan: Plan, hardware: Hardware) -> None:
    from ..trainer.plan import propose, propose_more

    if hardware.zero_stage is not None:
        return
    proposals = propose(config, plan.gpus, hardware)
    if not proposals:
        more = propose_more(config, plan.gpus, hardware)
        way = f"--gpus {more.plan.gpus} {more.overrides}" if more else "more memory a GPU"
        click.echo(f"nothing fits on {_gpus(plan.gpus)}; it fits with: {way}\n")
        return
    click.echo("layouts that fit, fastest first:")
    for proposal in proposals:
        p = proposal.plan
        click.echo(
            f"  {_time(p.step_seconds)} a step, {p.memory.total / GB:.1f} GB a GPU, "
            f"{_gb(p.communication.total)} sent: {proposal.overrides or 'as configured'}"
        )
    click.echo()


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
    names = {"zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
    return f"{names.get(plan.strategy, plan.strategy)} on {_gpus(plan.gpus)}"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _micro(plan: Plan) -> str:
    times = "" if plan.micro_batches == 1 else f"{plan.micro_batches} x "
    return f"{times}{plan.micro_batch_tokens:,} tokens a rank and step"


def _recompute(config: TrainingConfig) -> str:
    mode = config.parallel.activation_checkpointing
    return "no recomputation" if mode == "none" else f"{mode} recomputation"


def _gb(size: float) -> str:
    if size < 1e7:
        return f"{size / 1e6:.3g} MB"
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
    return f"{seconds:.1f} seconds" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
