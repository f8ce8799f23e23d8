"""From a recipe, the recipes it extends and the overrides to one checked configuration.

Every error of a load is found in one go and names where its value came from and, for a key that
does not exist, the nearest that does. Nothing here imports torch: a typo is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...models.errors import ConfigError
from .borrowed import fill_borrowed
from .documents import read_document
from .dump import config_hash, dump_config
from .overrides import apply_override
from .recipes import Layers, find_recipe, leaves, read_chain
from .schema import TrainingConfig
from .validation import schema_of_data, validate

__all__ = ["Loaded", "config_hash", "dump_config", "load_config", "load_run_config"]


@dataclass(frozen=True)
class Loaded:
    """A checked configuration and where each of its values came from.

    `origins` maps every dotted key of `config` to `default`, `FILE:LINE`, `override`, `recipe name`
    or `run folder`.
    """

    config: TrainingConfig
    origins: dict[str, str]


def load_config(recipe: str, overrides: Sequence[str], recipe_folder: Path) -> Loaded:
    """Load a recipe by name or path.

    Args:
        recipe: a name under `recipe_folder` (`olmo2/1b`) or a path to a YAML file.
        overrides: `dotted.key=value`, the value in YAML.
        recipe_folder: where named recipes are.

    Raises:
        ConfigError: every error found, one a line.
    """
    path = find_recipe(recipe, recipe_folder)
    layers = read_chain(path, recipe_folder)
    run = layers.data.setdefault("run", {})
    if run is None:
        run = layers.data["run"] = {}
    if isinstance(run, dict) and "name" not in run:
        is_named = path.is_relative_to(recipe_folder)
        shown = path.relative_to(recipe_folder) if is_named else Path(path.name)
        run["name"] = "-".join(shown.with_suffix("").parts)
        layers.origins["run.name"] = "recipe name"
    return _finish(layers, overrides)


def load_run_config(run_dir: Path, overrides: Sequence[str]) -> Loaded:
    """The configuration a run was started with, with overrides on top.

    `run.dir` is where the folder is now, which need not be where the run began.

    Raises:
        ConfigError: not a run folder, or an override that cannot work.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} is not a run folder: it has no config.yaml; give the folder a run was started in"
        )
    document = read_document(path)
    origins = {key: f"config.yaml:{document.lines.get(key, 1)}" for key in leaves(document.data)}
    layers = Layers(document.data, origins)
    run = layers.data.setdefault("run", {})
    if isinstance(run, dict):
        run["dir"] = str(run_dir)
        layers.mark("run.dir", str(run_dir), "run folder")
    return _finish(layers, overrides)


def _finish(layers: Layers, overrides: Sequence[str]) -> Loaded:
    errors = []
    for text in overrides:
        try:
            # The family may itself be overridden, so its keys are looked up anew each time.
            apply_override(layers, text, schema_of_data(layers))
        except ConfigError as error:
            errors.append(str(error))
    try:
        fill_borrowed(layers, schema_of_data(layers).model_fields["model"].annotation)  # type: ignore[arg-type]
    except ConfigError as error:
        errors.append(str(error))
    config, found = validate(layers)
    if errors or config is None:
        raise ConfigError("\n".join([*errors, *found]))
    origins = {key: layers.origins.get(key, "default") for key in leaves(config.dump())}
    return Loaded(config, origins)
