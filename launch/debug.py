"""`weft debug`: take a step of a run apart, try a recipe out small, prove that a run can be killed and resumed without a trace."""

from __future__ import annotations

from typing import Any

import click

from .options import looks_like_run, overrides_argument, run_folder

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft debug runs/first --step 1234
  weft debug runs/first --step 1234 --module blocks.3 --pdb
  weft debug olmo2/1b --builtin-data --ranks 2
  weft debug seam olmo2/debug
  weft debug soak olmo2/debug --faults 20
"""
PLAIN = "replay"
"""The hidden command that `weft debug RECIPE|RUN` means."""


class _DebugGroup(click.Group):
    """A group whose first argument may also be a recipe or a run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if is_named or not args else [PLAIN, *args])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.commands else [PLAIN, *args])


@click.group(
    cls=_DebugGroup,
    epilog=EXAMPLES,
    subcommand_metavar="RECIPE|RUN [KEY=VALUE]... [OPTIONS]  or  COMMAND",
)
def command() -> None:
    """Replay a step of a run, or try a recipe out small, on this machine.

    \b
    weft debug RUN --step K   the step again in one process: is it the same, where
                              do values go wrong, which samples, which parameters
    weft debug RECIPE         its smallest faithful form for 20 steps, with checks
    weft debug replay --help  lists the options of both
    """


@command.command(PLAIN, hidden=True, epilog=EXAMPLES)
@click.argument("target", metavar="RECIPE|RUN")
@overrides_argument
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Ranks: those RUN had, where its folder does not say; processes of RECIPE (gloo, 1).",
)
@click.option(
    "--step", type=int, help="RUN: the step to replay; the last recorded one if left out."
)
@click.option("--rank", type=click.IntRange(min=0), help="RUN: only this rank's share of the step.")
@click.option(
    "--module", metavar="PART", help="RUN: only modules and parameters with PART in their name."
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="RUN: print modules down to this many dots.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="RUN: lines of each ranking.",
)
@click.option(
    "--pdb", "use_pdb", is_flag=True, help="RUN: debugger where a value first goes wrong."
)
@click.option(
    "--break", "break_at", metavar="MODULE", help="RUN: debugger after this module's forward."
)
@click.option(
    "--reference", is_flag=True, help="RUN: compare with the reference kernels, module by module."
)
@click.option("--fp32", is_flag=True, help="RUN: compute in fp32 whatever the run did.")
@click.option(
    "--stream",
    is_flag=True,
    help="RUN: read the model block by block; for steps right after a checkpoint.",
)
@click.option("--no-samples", is_flag=True, help="RUN: leave out the loss of each sample.")
@click.option("--json", "as_json", is_flag=True, help="RUN: print everything as JSON.")
@click.option("--out", is_flag=True, help="RUN: also write RUN/debug/step_XXXXXXXX.json.")
@click.option("--builtin-data", is_flag=True, help="RECIPE: train on the built-in corpus instead.")
@click.option("--keep", type=click.Path(), help="RECIPE: keep the runs in this folder.")
def replay(target: str, overrides: tuple[str, ...], **options: Any) -> int:
    """Replay a step of RUN, or try RECIPE out small."""
    is_run = looks_like_run(target) or looks_like_run(f"runs/{target}")
    _refuse_options_of_the_other(target, is_run)
    if is_run:
        from .replay import run_replay

        return run_replay(run_folder(target), list(overrides), **options)
    from .trial import run_trial

    return run_trial(
        target,
        list(overrides),
        options["ranks"] or 1,
        use_builtin=options["builtin_data"],
        keep=options["keep"],
    )


def _refuse_options_of_the_other(target: str, is_run: bool) -> None:
    """An option that means nothing for this kind of target is a mistake, not a wish to be ignored."""
    ctx = click.get_current_context()
    other = "RECIPE: " if is_run else "RUN: "
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        is_given = source is click.core.ParameterSource.COMMANDLINE
        if is_given and (getattr(parameter, "help", None) or "").startswith(other):
            kind = "a run" if is_run else "a recipe, not a run folder"
            raise click.UsageError(f"{parameter.opts[0]} has no meaning here: {target} is {kind}")


@command.command("trial-rank", hidden=True)
@click.argument("target", metavar="RECIPE|RUN")
@click.option("--resume", is_flag=True)
def trial_rank(target: str, resume: bool) -> int:
    """One rank of `weft debug RECIPE --ranks N`."""
    from .trial import train_with_checks

    return train_with_checks(target, resume=resume)


@command.command("seam", epilog="\b\nExample:\n  weft debug seam olmo2/debug --steps 6 --ranks 2")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="N: the undisturbed run has 2N.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Processes of the run.",
)
@click.option(
    "--other-ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes of the resume on another world size.",
)
@click.option("--keep", type=click.Path(), help="Keep the three runs in this folder.")
def seam(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    ranks: int,
    other_ranks: int,
    keep: str | None,
) -> int:
    """Compare an undisturbed run with one that was killed and resumed, to the bit.

    Trains RECIPE for 2N steps. Trains it again, kills every rank with SIGKILL after step N, resumes for N more, and
    compares losses, gradient norms, sample ids, the data itself, random generators and every tensor of the last checkpoint. Then resumes the
    killed run on another number of ranks, where the data must be the same and losses equal up to the order of sums.
    """
    from .seam import run_seam

    return run_seam(recipe, list(overrides), steps, ranks, other_ranks, keep)


@command.command("soak", epilog="\b\nExample:\n  weft debug soak olmo2/debug --faults 20 --ranks 2")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--faults", type=click.IntRange(min=1), default=20, show_default=True, help="How many."
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Processes of the run.",
)
@click.option(
    "--other-ranks",
    type=click.IntRange(min=1),
    help="Each attempt has, by chance, this many processes instead; losses are then compared up to the order of sums.",
)
@click.option("--steps", type=click.IntRange(min=8), help="Of the run; 12 a fault if left out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the faults.")
@click.option(
    "--fork/--no-fork",
    default=True,
    show_default=True,
    help="Ranks are forks of this process, which saves them the imports; else processes of their own.",
)
@click.option("--keep", type=click.Path(), help="Keep both runs in this folder.")
def soak(recipe: str, overrides: tuple[str, ...], **options: Any) -> int:
    """Put one run through random faults and compare it with one that was left alone, to the bit.

    Ranks are killed at random instants of opening, steps and saves; signals and switch files come; checkpoints are cut, flipped and lose files;
    locks and half saves are left behind. In the end every step must be there once, with the numbers and samples of the undisturbed run.
    """
    from .soak import run_soak

    return run_soak(recipe, list(overrides), **options)
