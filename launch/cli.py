"""The `weft` command: a table of contents whose chapters are imported when they are opened.

Nothing heavy is imported here, so `weft --help` answers at once. Each verb is a module of this
folder with a click command called `command`.

Exit codes are those of `trainer/exit_codes.py`; 141 where the reader of a pipe went away.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import sys
from difflib import get_close_matches

import click

from .. import __version__
from ..models.errors import WeftError
from ..trainer.exit_codes import ExitCode

__all__ = ["main"]

_STDOUT = 1
STOPS = (ExitCode.STOPPED, ExitCode.TIME_LIMIT, ExitCode.PREEMPTED)

# Chapter -> verb -> (module of this folder, one line of help).
CHAPTERS = {
    "Start": {
        "quickstart": ("quickstart", "train a real model on this machine in minutes"),
        "train": ("train", "train a recipe, or go on with a run"),
    },
    "Before a run": {
        "doctor": ("doctor", "what is wrong with this machine, or with a job's nodes"),
        "plan": ("plan", "parameters, FLOPs, memory and time of a recipe"),
        "data": ("data", "prepare datasets, look at what training will see"),
        "convert": ("convert", "to and from Hugging Face and DeepSpeed checkpoints"),
    },
    "On a cluster": {
        "submit": ("submit", "a recipe or a run as a job that survives its cluster"),
        "status": ("status", "runs and their jobs: step, loss, speed, state, history"),
        "logs": ("logs", "what a rank of a run says"),
        "stop": ("stop", "save, then end"),
        "requeue": ("requeue", "back into the queue"),
    },
    "After a run": {
        "eval": ("evaluate", "held-out loss, perplexity and bits per byte"),
        "generate": ("generate", "samples from a run"),
        "compare": ("compare", "runs side by side: loss against FLOPs, FLOPs to match, a plot"),
        "checkpoint": ("checkpoint", "list and verify the checkpoints of a run"),
    },
    "Trust": {
        "debug": ("debug", "replay a step, try a recipe out small, prove a resume exact"),
        "bench": ("bench", "measure Weft on this machine against its peers"),
    },
}
VERBS = {verb: entry for chapter in CHAPTERS.values() for verb, entry in chapter.items()}


class _Contents(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            near = get_close_matches(cmd_name, VERBS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; weft --help lists them"
            raise click.UsageError(f"there is no command {cmd_name!r}{hint}")
        module = importlib.import_module(f".{VERBS[cmd_name][0]}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))
        for chapter, verbs in CHAPTERS.items():
            with formatter.section(chapter):
                formatter.write_dl([(verb.ljust(width), text) for verb, (_, text) in verbs.items()])


@click.group(cls=_Contents, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="weft %(version)s")
def cli() -> None:
    """Weft pretrains models that decide from the data where their compute goes.

    Start here: weft quickstart. Every command has --help with an example.
    """


def main() -> None:
    """Entry point. Errors of the user are one line each and exit code 2; tracebacks are for bugs."""
    logging.basicConfig(level=logging.WARNING, format="weft: %(levelname)s: %(message)s")
    try:
        code = _run()
        # What is still buffered must meet a closed pipe here, not at the interpreter's exit.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_stdout_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        code = 141
    if code in STOPS:
        _leave_at_once(code)
    sys.exit(code)


def _leave_at_once(code: int) -> None:
    """A run that stopped has saved and closed everything; taking torch's modules apart would cost a second that the scheduler may not give."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _run() -> int:
    try:
        code = _invoke()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        _complain(error.format_message() + _where_to_look(error))
        return 2
    except WeftError as error:
        _complain(str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    return code if isinstance(code, int) else 0


def _invoke() -> object:
    """What click's own `main` does, except that it would end on any broken pipe without a word."""
    with cli.make_context("weft", sys.argv[1:]) as ctx:
        return cli.invoke(ctx)


def _is_stdout_broken() -> bool:
    """Whether it is our own reader that went away; any other broken pipe is a bug to be seen."""
    poller = select.poll()
    poller.register(_STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def _where_to_look(error: click.ClickException) -> str:
    ctx: click.Context | None = getattr(error, "ctx", None)
    if ctx is None or ctx.parent is None:
        return ""
    return f" (see: {ctx.command_path} --help)"


def _complain(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"weft: error: {line}", err=True)
