"""Recipe files: where they are found, and how one extends another.

The result of a chain is plain data plus the origin of each value in it (`olmo2/1b.yaml:12`);
nothing is validated here. Read `load.py` next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...models.errors import ConfigError
from .documents import read_document

__all__ = ["Layers", "find_recipe", "leaves", "list_recipes", "read_chain"]

DEFAULT_FAMILY = "transformer"


@dataclass
class Layers:
    """Merged plain data, and where each value in it came from (dotted key -> origin)."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def mark(self, key: str, value: Any, origin: str) -> None:
        """Everything at and below `key` now comes from `origin`."""
        self.forget(key)
        self.origins.update(dict.fromkeys(leaves(value, key), origin))

    def forget(self, key: str) -> None:
        below = f"{key}."
        self.origins = {
            k: v for k, v in self.origins.items() if k != key and not k.startswith(below)
        }

    def origin(self, key: str) -> str:
        """The origin of a key: its own, else the nearest one above it, else the first below it."""
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            if ".".join(parts[:length]) in self.origins:
                return self.origins[".".join(parts[:length])]
        return next((v for k, v in self.origins.items() if k.startswith(f"{key}.")), "default")


def leaves(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of everything that is not itself a section or a list of sections."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, f"{key}.{i}")
    else:
        yield key


def list_recipes(folder: Path) -> list[str]:
    """Names of the recipes under a folder, sorted."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )


def find_recipe(recipe: str, folder: Path, beside: Path | None = None) -> Path:
    """The file a recipe argument means.

    Args:
        recipe: a path to a file, or a name under `folder` such as `olmo2/1b`.
        folder: where named recipes are.
        beside: where relative paths and names are looked for first; default the working directory.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    stem = recipe.removesuffix(".yaml").removesuffix(".yml")
    near_by = beside or Path()
    candidates = [near_by / recipe, folder / f"{stem}.yaml"]
    if beside is not None:
        candidates.insert(1, beside / f"{recipe}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    if (near_by / recipe / "config.yaml").is_file():
        raise ConfigError(
            f"{recipe} is a run folder, not a recipe; to go on with it: weft train --resume {recipe}"
        )
    raise ConfigError(f"there is no recipe {recipe!r}; {_recipe_hint(recipe, stem, folder)}")


def _recipe_hint(recipe: str, stem: str, folder: Path) -> str:
    names = list_recipes(folder)
    path = Path(recipe)
    around = path if path.is_dir() else path.parent
    if around.is_dir():
        names += sorted(str(path) for path in around.glob("*.yaml"))
    near = get_close_matches(recipe, names, n=2, cutoff=0.6)
    near = near or get_close_matches(stem, names, n=2, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    known = ", ".join(list_recipes(folder)) or "none are installed"
    return f"give a path to a YAML file or one of: {known}"


def read_chain(path: Path, folder: Path) -> Layers:
    """A recipe over the recipes it extends; the last word is the recipe's own.

    Raises:
        ConfigError: a file that cannot be read, or recipes that extend each other in a circle.
    """
    return _read_chain(path, folder, ())


def _read_chain(path: Path, folder: Path, seen: tuple[Path, ...]) -> Layers:
    resolved = path.resolve()
    if resolved in seen:
        circle = [_shown(p, folder) for p in (*seen[seen.index(resolved) :], resolved)]
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(circle)}")
    document = read_document(path)
    shown = _shown(path, folder)
    layers = Layers()
    if "extends" in document.data:
        parent = document.data.pop("extends")
        where = f"{shown}:{document.lines['extends']}"
        if not isinstance(parent, str) or not parent:
            raise ConfigError(
                f"extends: expected the name or path of one recipe, found {parent!r} [{where}]"
            )
        try:
            target = find_recipe(parent, folder, beside=path.parent)
        except ConfigError as error:
            raise ConfigError(f"extends: {error} [{where}]") from error
        layers = _read_chain(target, folder, (*seen, resolved))
    _put_over(layers, document.data, document.lines, shown)
    return layers


def _put_over(layers: Layers, data: dict[str, Any], lines: dict[str, int], shown: str) -> None:
    if _swaps_family(layers.data.get("model"), data.get("model")):
        # Settings of one family mean nothing to another: the whole section is replaced.
        layers.data.pop("model")
        layers.forget("model")
    for key in _whole_values(data):
        layers.forget(key)
    for key in leaves(data):
        layers.origins[key] = f"{shown}:{lines.get(key, 1)}"
    layers.data = _merge(layers.data, data)


def _swaps_family(old: Any, new: Any) -> bool:
    if not (isinstance(old, dict) and isinstance(new, dict) and "family" in new):
        return False
    return bool(new["family"] != old.get("family", DEFAULT_FAMILY))


def _whole_values(value: Any, key: str = "") -> Iterator[str]:
    """Keys of what replaces rather than merges: like `leaves`, but lists count as one."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _whole_values(item, f"{key}.{name}" if key else str(name))
    else:
        yield key


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: sections are merged, everything else (lists too) is replaced."""
    merged = dict(base)
    for name, value in top.items():
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[name] = _merge(old, value)
        else:
            merged[name] = value
    return merged


def _shown(path: Path, folder: Path) -> str:
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    resolved, root = path.resolve(), folder.resolve()
    return resolved.relative_to(root).as_posix() if resolved.is_relative_to(root) else str(path)
