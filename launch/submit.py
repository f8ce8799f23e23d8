"""`weft submit`: a recipe, or a run, as a job of the cluster, or of this machine.

The configuration is checked against the ranks it will have before anything is written. Imports no torch, so that it answers
at once on a login node. Read slurm/submission.py next.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError
from .options import (
    load_recipe,
    load_run,
    looks_like_run,
    print_table,
    run_folder,
    split_arguments,
)

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig
    from .slurm.cluster import ClusterInForce
    from .slurm.submission import Submission
    from .slurm.sweep import Combination

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft submit olmo2/1b --nodes 4 --gpus-per-node 8 --time 24:00:00
  weft submit olmo2/1b --nodes 4 --gpus-per-node 8 --dry-run
  weft submit runs/olmo2-1b --nodes 2 train.steps=20000
  weft submit olmo2/190m --cluster a100 --sweep optimizer.lr=1e-4,3e-4 --seeds 2
  weft submit olmo2/debug --local --ranks-per-node 2
  weft submit --print-cluster --cluster a100
"""

# Options of the command that are keys of a cluster profile.
CLUSTER_OPTIONS: dict[str, tuple[Any, str]] = {
    "nodes": (click.IntRange(min=1), "Nodes."),
    "gpus_per_node": (click.IntRange(min=0), "GPUs a node, one rank each."),
    "ranks_per_node": (click.IntRange(min=1), "Ranks a node on CPUs."),
    "cpus_per_task": (click.IntRange(min=1), "CPUs of one rank."),
    "mem": (str, "Memory a node, as sbatch takes it."),
    "time": (str, "Time limit of one start; the run goes on in the next."),
    "partition": (str, "Partition."),
    "account": (str, "Account that is charged."),
    "qos": (str, "Quality of service."),
    "constraint": (str, "Features nodes must have."),
    "dependency": (str, "Jobs to wait for, such as afterok:123."),
}


def _cluster_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, (kind, text) in reversed(CLUSTER_OPTIONS.items()):
        function = click.option(f"--{name.replace('_', '-')}", type=kind, help=text)(function)
    return function


@click.command(epilog=EXAMPLES)
@click.argument("arguments", metavar="[RECIPE|RUN] [KEY=VALUE]...", nargs=-1)
@_cluster_options
@click.option("--exclude", metavar="NODES", multiple=True, help="Nodes to leave out.")
@click.option(
    "--exclude-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with nodes to leave out, one a line, as weft doctor writes it.",
)
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Same as KEY=VALUE.")
@click.option(
    "--sweep",
    "sweeps",
    metavar="KEY=V,V,...",
    multiple=True,
    help="One run for each value, as a job array; several make every combination.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="One run for each of this many seeds.")
@click.option(
    "--array",
    metavar="SPEC",
    help="Which runs of the sweep, and how many at once, as sbatch takes it: 0-3%2.",
)
@click.option(
    "--cluster", metavar="NAME", help="Cluster profile (else $WEFT_CLUSTER, else default)."
)
@click.option("--print-cluster", is_flag=True, help="Print the profile in force, with origins.")
@click.option("--local", is_flag=True, help="Run it here, restarts included, without a scheduler.")
@click.option("--dry-run", is_flag=True, help="Print the script; write and submit nothing.")
def command(
    arguments: tuple[str, ...],
    exclude: tuple[str, ...],
    exclude_file: Path | None,
    settings: tuple[str, ...],
    sweeps: tuple[str, ...],
    seeds: int | None,
    array: str | None,
    cluster: str | None,
    print_cluster: bool,
    local: bool,
    dry_run: bool,
    **options: Any,
) -> int:
    """Submit RECIPE as a job that saves in time, restarts itself and stops when restarting is no use.

    A RUN folder is submitted again: it goes on from its newest checkpoint, on any number of ranks.
    """
    from .slurm.cluster import load_cluster

    options["exclude"] = _excluded(exclude, exclude_file)
    in_force = load_cluster(cluster, options)
    if print_cluster:
        click.echo(in_force.describe(), nl=False)
        return 0
    recipes, overrides = split_arguments(arguments)
    if len(recipes) != 1:
        raise click.UsageError(
            f"one RECIPE or RUN is expected, found {' and '.join(map(repr, recipes)) or 'none'}"
        )
    plan = _Plan(recipes[0], [*overrides, *settings], sweeps, seeds)
    submission = plan.submission(in_force, cluster, array)
    if dry_run:
        _show(plan, submission)
        return 0
    if local:
        from .local_job import run_here

        return run_here(submission)
    _submit(plan, submission)
    return 0


def _excluded(nodes: tuple[str, ...], file: Path | None) -> str | None:
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    listed = [line.partition("#")[0].strip() for line in lines]
    return ",".join(dict.fromkeys(n for n in (*nodes, *listed) if n)) or None


class _Plan:
    """What is to be trained: one configuration, or one for each combination of a sweep."""

    def __init__(
        self, argument: str, overrides: list[str], sweeps: tuple[str, ...], seeds: int | None
    ) -> None:
        from .slurm.sweep import combinations

        self.argument, self.overrides = argument, overrides
        self.is_run = looks_like_run(argument) or looks_like_run(f"runs/{argument}")
        if self.is_run and (sweeps or seeds):
            raise click.UsageError(
                f"{argument} is a run; --sweep and --seeds start new ones: give a RECIPE"
            )
        self.base = self._load([])
        self.combinations = combinations(sweeps, seeds, self.base.run.seed)
        self.configs = [self._member(c) for c in self.combinations] or [self.base]

    def _load(self, more: list[str]) -> TrainingConfig:
        overrides = [*self.overrides, *more]
        if self.is_run:
            return load_run(str(run_folder(self.argument)), overrides).config
        return load_recipe(self.argument, overrides).config

    def _member(self, combination: Combination) -> TrainingConfig:
        base = self.base
        folder = base.run_dir / combination.name
        try:
            return self._load(
                [
                    *combination.overrides,
                    f"run.name={base.run.name}-{combination.name}",
                    f"run.dir={folder}",
                ]
            )
        except ConfigError as error:
            raise ConfigError(
                "\n".join(f"{combination.name}: {line}" for line in str(error).splitlines())
            ) from None

    def submission(
        self, in_force: ClusterInForce, cluster_name: str | None, array: str | None
    ) -> Submission:
        """Checked against the ranks each run will have.

        Raises:
            ConfigError: a run that does not divide over them.
        """
        from ..trainer.configuration.checks import check_against_world
        from .slurm.submission import Submission

        if array is not None and not self.combinations:
            raise click.UsageError("--array picks runs of a sweep; give --sweep or --seeds too")
        for config in self.configs:
            check_against_world(config, in_force.config.world_size)
        last = len(self.combinations) - 1
        if self.combinations:
            array = f"0-{last}{array}" if array and array.startswith("%") else array or f"0-{last}"
        return Submission(
            name=self.base.run.name,
            configs=self.configs,
            folder=self.base.run_dir,
            cluster=in_force.config,
            cluster_name=cluster_name or os.environ.get("WEFT_CLUSTER"),
            is_resubmission=self.is_run,
            array=array,
        )


def _show(plan: _Plan, submission: Submission) -> None:
    """The script alone on standard output; what is about it on standard error."""
    from .slurm.snapshot import find_code

    submission.check()
    if plan.combinations:
        _print_runs(plan, submission, stderr=True)
    click.echo(submission.script(find_code()).render(), nl=False)


def _print_runs(plan: _Plan, submission: Submission, *, stderr: bool = False) -> None:
    rows = [
        (i, *(o.partition("=")[2] for o in c.overrides), os.path.relpath(run))
        for i, (c, run) in enumerate(zip(plan.combinations, submission.runs, strict=True))
    ]
    keys = [o.partition("=")[0] for o in plan.combinations[0].overrides]
    title = f"{len(rows)} runs, array {submission.array}"
    print_table(title, ["task", *keys, "run"], rows, stderr=stderr)


def _submit(plan: _Plan, submission: Submission) -> None:
    job_id = submission.submit()
    folder = shlex.quote(os.path.relpath(submission.folder))
    cluster = submission.cluster
    ranks = f"{cluster.nodes} x {cluster.ranks} ranks"
    if plan.combinations:
        _print_runs(plan, submission)
        click.echo(f"submitted job array {job_id}: {len(plan.configs)} runs of {ranks} in {folder}")
        click.echo(f"follow them: weft status {folder} --watch")
    else:
        click.echo(f"submitted job {job_id}: {ranks} in {folder}")
        click.echo(f"follow it: weft logs {folder} -f")
