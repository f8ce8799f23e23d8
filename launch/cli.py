"""The `weft` command: a table of contents whose chapters are imported when they are opened.

Nothing heavy is imported here, so `weft --help` answers at once. Each verb is a module of this
folder with a click command called `command`.
"""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches

import click

from ..models.errors import WeftError

__all__ = ["main"]

VERBS = {
    "quickstart": ("quickstart", "train a real model on this machine in minutes, from nothing"),
    "train": ("train", "train a recipe, or go on with a run"),
    "eval": ("evaluate", "held-out loss, perplexity and bits per byte of a run"),
    "generate": ("generate", "samples from a run"),
    "debug": ("debug", "prove a resume exact"),
    "plan": ("plan", "parameters, FLOPs, memory and time of a recipe, without running it"),
    "data": ("data", "prepare datasets, look at what training will see"),
    "checkpoint": ("checkpoint", "list and verify the checkpoints of a run"),
    "convert": ("convert", "to and from Hugging Face checkpoints"),
    "bench": ("bench", "measure this machine against the alternatives"),
}


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
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(cls=_Contents, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weft", message="weft %(version)s")
def cli() -> None:
    """Weft pretrains models that decide from the data where their compute goes.

    Start here: weft quickstart. Every command has --help with an example.
    """


def main() -> None:
    """Entry point. Errors of the user are one line each and exit code 2; tracebacks are for bugs."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        _complain(error.format_message())
        code = 2
    except WeftError as error:
        _complain(str(error))
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        code = 130
    except BrokenPipeError:
        # The reader of a pipe went away (`weft ... | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"weft: error: {line}", err=True)
