"""`weft bench memory`: the peak of real steps beside what `weft plan` says."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from .local import LocalRanks
from .options import load_recipe, print_table

__all__ = ["memory_command"]

MB = 1e6


@click.command(
    "memory",
    epilog="\b\nExample:\n  weft bench memory olmo2/debug --ranks 2 parallel.strategy=fsdp model.d_model=256",
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes of this machine.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here."
)
def memory_command(
    recipe: str, overrides: tuple[str, ...], ranks: int, json_path: str | None
) -> None:
    """Measure the memory of a few steps of RECIPE on made-up data, and compare it with the plan.

    Under torchrun or srun the ranks are theirs. On a GPU it is what the CUDA allocator counts, on a
    CPU what the profiler saw allocated.
    """
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise click.BadParameter(
            f"there is no folder {Path(json_path).parent} for {json_path}", param_hint="--json"
        )
    if ranks == 1 or "RANK" in os.environ:
        found = _measure(recipe, overrides)
    else:
        found = _on_ranks(recipe, overrides, ranks)
    if found is None:
        return
    if json_path:
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n")
    _print(recipe, found)


def _measure(recipe: str, overrides: tuple[str, ...]) -> dict[str, Any] | None:
    """Collective: the fullest rank's numbers on rank 0; None on the others."""
    from ..trainer.benchmarks.memory import measure_memory
    from ..trainer.distributed import initialise_distributed, shutdown_distributed

    config = load_recipe(recipe, list(overrides)).config
    topology = initialise_distributed(config.run.device, config.parallel.timeout_s)
    try:
        every = topology.gather_json(measure_memory(config, topology))
    finally:
        shutdown_distributed()
    return max(every, key=lambda one: one["peak_bytes"]) if topology.is_main else None


def _on_ranks(recipe: str, overrides: tuple[str, ...], ranks: int) -> dict[str, Any]:
    load_recipe(recipe, list(overrides))
    with tempfile.TemporaryDirectory(prefix="weft-memory-") as folder:
        result = Path(folder) / "result.json"
        arguments = ["bench", "memory", recipe, *overrides, "--json", str(result)]
        running = LocalRanks(arguments, ranks, Path(folder) / "rank")
        if any(running.wait()):
            raise click.ClickException(running.tail(1).removeprefix("weft: error: "))
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def _print(recipe: str, found: dict[str, Any]) -> None:
    row = [
        found["strategy"],
        found["ranks"],
        found["recomputation"],
        found["micro_batches"],
        f"{found['peak_bytes'] / MB:,.1f}",
        f"{found['planned_bytes'] / MB:,.1f}",
        f"{found['ratio']:.3f}",
    ]
    columns = [
        "strategy",
        "ranks",
        "recomputation",
        "micro-batches",
        "measured MB",
        "planned MB",
        "planned / measured",
    ]
    print_table(
        f"{recipe}, {found['parameters']:,} parameters, on {found['device']}, torch {found['torch']}, {found['date']}",
        columns,
        [row],
        right=(1, 3, 4, 5, 6),
    )
