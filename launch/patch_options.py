"""Options that name a patcher on the command line, for `weft data patches` and `weft data prepare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError

if TYPE_CHECKING:
    from ..models.blt.patching_config import PatchingConfig

__all__ = ["patch_options", "patching_from"]

OPTIONS = (
    click.option(
        "--scheme",
        type=click.Choice(["entropy", "rise", "both", "stride", "space"]),
        help="Rule of the borders; entropy by default.",
    ),
    click.option("--threshold", type=float, help="Nats above which the next byte opens a patch."),
    click.option("--rise", type=float, help="Nats by which the entropy has to rise."),
    click.option(
        "--patch-size", type=float, help="Mean bytes a patch; the threshold (or rise) is found."
    ),
    click.option("--stride", type=int, help="Bytes a patch, for --scheme stride."),
    click.option("--max-length", type=int, help="Longest patch, in bytes."),
    click.option(
        "--newline-reset",
        type=click.Choice(["off", "after", "before"]),
        help="The entropy model forgets what came before each line.",
    ),
)


def patch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a patcher, all None where they are not given."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def patching_from(
    given: dict[str, Any], run: Path | None, base: PatchingConfig | None = None
) -> tuple[PatchingConfig, str]:
    """A patcher from options, and the number format its entropies are computed in.

    Args:
        given: of `patch_options`.
        run: an entropy model's run, or a run that has patches, whose settings the options then change.
        base: settings to change, where no run has any.

    Raises:
        ConfigError: the settings do not go together, or `run` is no run.
    """
    from pydantic import ValidationError

    from ..models.blt.patching_config import PatchingConfig
    from ..trainer.configuration.load import load_run_config
    from ..trainer.patching import patching_of

    data = base.model_dump() if base else {}
    compute = "fp32"
    if run is not None:
        folder = run if (run / "config.yaml").is_file() else run.parent.parent
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{run} is not a run folder: it has no config.yaml; give that of a trained entropy model, such as "
                "weft train blt/entropy-debug makes"
            )
        config = load_run_config(folder, ()).config
        compute = config.precision.compute
        patched = patching_of(config)
        if patched is not None:
            data = patched.model_dump()
        else:
            data |= {"entropy_model": str(run), "entropy": config.model.model_dump()}
    # A wanted size, or another rule, leaves no old level standing.
    if given.get("patch_size") is not None or given.get("scheme") not in (None, data.get("scheme")):
        data |= {"threshold": None, "rise": None, "patch_size": None, "stride": None}
    data |= {name: value for name, value in given.items() if value is not None} | {"stored": False}
    try:
        return PatchingConfig.model_validate(data), compute
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {message}" if key else message) from error
