"""From a recipe, the recipes it extends and the overrides to one checked configuration.

Every error of a load is found in one go and names where its value came from and, for a
key that does not exist, the nearest that does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ...models.errors import ConfigError
from .documents import parse_value, read_document
from .schema import TrainingConfig, cross_field_errors, model_section

__all__ = ["Loaded", "config_hash", "dump_config", "known_keys", "load_config", "load_run_config"]


@dataclass(frozen=True)
class Loaded:
    """A checked configuration and where each of its values came from (dotted key -> origin)."""

    config: TrainingConfig
    origins: dict[str, str]


def load_config(recipe: str, overrides: list[str], recipe_folder: Path) -> Loaded:
    """Load a recipe by name or path.

    Args:
        recipe: a name under `recipe_folder` (`olmo2/1b`) or a path to a YAML file.
        overrides: `dotted.key=value`, the value in YAML.
        recipe_folder: where named recipes are.

    Raises:
        ConfigError: every error found, one a line.
    """
    data, origins = _merge_chain(find_recipe(recipe, recipe_folder), recipe_folder, ())
    if "run" not in data or "name" not in (data["run"] or {}):
        stem = recipe.removesuffix(".yaml").strip("/")
        name = stem.replace("/", "-") if not Path(recipe).is_file() else Path(stem).name
        data.setdefault("run", {})
        data["run"] = {**(data["run"] or {}), "name": name}
        origins["run.name"] = "recipe name"
    return _finish(data, origins, overrides)


def load_run_config(run_dir: Path, overrides: list[str]) -> Loaded:
    """The configuration a run was started with, with overrides on top.

    Raises:
        ConfigError: not a run folder, or an override that cannot work.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml; give the folder a run was started in")
    data = read_document(path).data
    origins = {key: "config.yaml" for key in _leaves(data)}
    data.setdefault("run", {})["dir"] = str(run_dir)
    return _finish(data, origins, overrides)


def find_recipe(recipe: str, folder: Path) -> Path:
    """The file a recipe argument means.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    direct = Path(recipe)
    if direct.suffix in (".yaml", ".yml"):
        if direct.is_file():
            return direct
        raise ConfigError(f"there is no recipe file {recipe}; give a path to a YAML file or a name such as olmo2/1b")
    named = folder / f"{recipe}.yaml"
    if named.is_file():
        return named
    names = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    near = get_close_matches(recipe, names, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    raise ConfigError(f"there is no recipe {recipe!r}; {hint}")


def _merge_chain(path: Path, folder: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: recipes extend each other in a circle")
    document = read_document(path)
    parent = document.data.pop("extends", None)
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if parent is not None:
        beside = path.parent / f"{parent}.yaml"
        target = beside if beside.is_file() else find_recipe(str(parent), folder)
        data, origins = _merge_chain(target, folder, (*seen, path.resolve()))
    for key in _leaves(document.data):
        origins = {k: v for k, v in origins.items() if not k.startswith(f"{key}.")}
        origins[key] = f"{_short(path, folder)}:{document.lines.get(key, 1)}"
    return _merge(data, document.data), origins


def _short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`; a model of another family replaces the whole model section."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        swaps_family = isinstance(value, dict) and isinstance(old, dict) and value.get("family", old.get("family")) != old.get("family")
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and not swaps_family else value
    return merged


def _leaves(data: Any, key: str = "") -> list[str]:
    if isinstance(data, dict) and data:
        return [leaf for name, value in data.items() for leaf in _leaves(value, f"{key}.{name}" if key else str(name))]
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return [leaf for i, value in enumerate(data) for leaf in _leaves(value, f"{key}.{i}")]
    return [key] if key else []


def _finish(data: dict[str, Any], origins: dict[str, str], overrides: list[str]) -> Loaded:
    errors = []
    for text in overrides:
        try:
            key = _apply_override(data, text)
            origins = {k: v for k, v in origins.items() if not k.startswith(f"{key}.")}
            origins[key] = "override"
        except ConfigError as error:
            errors.append(str(error))
    config, found = _validate(data, origins)
    errors.extend(found)
    if config is not None and not errors:
        errors.extend(cross_field_errors(config))
    if errors or config is None:
        raise ConfigError("\n".join(errors))
    full = {key: origins.get(key) or _inherited(key, origins) for key in _leaves(config.dump())}
    return Loaded(config, full)


def _inherited(key: str, origins: dict[str, str]) -> str:
    """The origin of the nearest enclosing value that was given whole, such as a list."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:length]) in origins:
            return origins[".".join(parts[:length])]
    return "default"


def _apply_override(data: dict[str, Any], text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value")
    place: Any = data
    parts = key.split(".")
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"{key}: {'.'.join(parts[:i])} has items 0 to {len(place) - 1}, not {part!r} [override]")
            index: Any = int(part)
        elif isinstance(place, dict):
            index = part
            if place.get(part) is None and not is_last:
                place[part] = {}
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:i])} is a value, not a section [override]")
        if is_last:
            place[index] = parse_value(value)
        else:
            place = place[index]
    return key


def _validate(data: dict[str, Any], origins: dict[str, str]) -> tuple[TrainingConfig | None, list[str]]:
    errors = []
    # The model section is checked apart, so that its errors do not hide the others'.
    model: Any = None
    plain = dict(data)
    try:
        section = model_section(str((data.get("model") or {}).get("family", "transformer")))
        model = section.model_validate(data.get("model") or {})
    except ConfigError as error:
        errors.append(str(error))
    except ValidationError as error:
        errors.extend(_describe(error, section, "model", origins))
    placeholder = model_section("transformer")()
    plain["model"] = model if model is not None else placeholder
    try:
        config = TrainingConfig.model_validate(plain)
    except ValidationError as error:
        return None, [*errors, *_describe(error, TrainingConfig, "", origins)]
    return (config if model is not None else None), errors


def _describe(error: ValidationError, root: type[BaseModel], prefix: str, origins: dict[str, str]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join([*([prefix] if prefix else []), *(str(part) for part in item["loc"])])
        given = next((v for k, v in origins.items() if k == key or k.startswith(f"{key}.")), _inherited(key, origins))
        where = "" if given == "default" else f" [{given}]"
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: no such key; {_nearest(key, root, prefix)}{where}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required, but not given{where}")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {str(item['ctx']['error'])}{where}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{key}: {message}, found {item['input']!r}{where}")
    return lines


def _nearest(key: str, root: type[BaseModel], prefix: str) -> str:
    keys = [f"{prefix}.{name}" if prefix else name for name in known_keys(root)]
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    tail = plain.rpartition(".")[2]
    near = get_close_matches(plain, keys, n=1, cutoff=0.75) or [k for k in keys if k.rpartition(".")[2] == tail][:1]
    if near:
        return f"did you mean {near[0]}?"
    section = plain.rpartition(".")[0]
    inside = sorted({k[len(section) + 1 :].split(".")[0] for k in keys if k.startswith(f"{section}.")} if section else {k.split(".")[0] for k in keys})
    return f"{section or 'a recipe'} has {', '.join(inside)}"


def known_keys(root: type[BaseModel] = TrainingConfig, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Every dotted key under a section class, with its pydantic field; items of lists stand for all."""
    keys: dict[str, Any] = {}
    for name, item in root.model_fields.items():
        keys[name] = item
        inner = model_section("transformer") if root is TrainingConfig and name == "model" else _section_of(item.annotation)
        if model is not None and root is TrainingConfig and name == "model":
            inner = model
        if inner is not None:
            keys.update({f"{name}.{key}": value for key, value in known_keys(inner).items()})
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def dump_config(config: TrainingConfig, origins: dict[str, str] | None = None) -> str:
    """The complete configuration as YAML; with `origins`, each value's origin in a comment."""
    text = yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)
    if origins is None:
        return text
    lines = []
    _dump_lines(config.dump(), "", 0, origins, lines)
    width = min(60, max(len(line) for line, _ in lines) + 2)
    return "".join(f"{line:<{width}}# {origin}\n" if origin else f"{line}\n" for line, origin in lines)


def _dump_lines(value: Any, key: str, depth: int, origins: dict[str, str], lines: list[tuple[str, str]]) -> None:
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = f"{key}.{name}" if key else str(name)
        label = f"{'  ' * depth}{name}:" if isinstance(value, dict) else f"{'  ' * depth}-"
        nested = (isinstance(item, dict) and item) or (isinstance(item, list) and any(isinstance(i, dict) for i in item))
        if nested:
            lines.append((label, ""))
            _dump_lines(item, inner, depth + 1, origins, lines)
        else:
            shown = yaml.safe_dump(item, default_flow_style=True, width=1000).replace("\n...", "").strip()
            lines.append((f"{label} {shown}", origins.get(inner, "default")))


def config_hash(config: TrainingConfig) -> str:
    """Hash of what the result of a run depends on: not its name, folder, logging or checkpoint rhythm."""
    data = config.dump()
    for section in ("run", "logging", "checkpoint", "eval", "parallel"):
        data.pop(section)
    data["seed"] = config.run.seed
    data["data"] = {k: v for k, v in data["data"].items() if k not in ("cache_dir", "prepare_workers", "prefetch_steps", "allow_changed")}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
