"""Dotted `key=value` overrides, laid over plain data before it is validated.

The value is YAML; for a key that holds text, what looks like a number or a truth value stays text.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ...models.errors import ConfigError
from .documents import parse_value
from .keys import Key, find_key
from .recipes import Layers

__all__ = ["apply_override", "split_override"]


def split_override(text: str) -> tuple[str, str]:
    """`key=value` into its two sides.

    Raises:
        ConfigError: there is no `=`, or nothing before it.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"{text!r} is not an override; write key=value, such as train.steps=100")
    return key, value


def apply_override(layers: Layers, text: str, root: type[BaseModel]) -> None:
    """Lay one override over the data, in place.

    Args:
        layers: changed in place, origins included.
        text: `dotted.key=value`; items of lists by number, `data.sources.0.weight=2`.
        root: the class that will validate the data; it says what is text and what the defaults are.

    Raises:
        ConfigError: not of that form, not YAML, or a path that leads nowhere.
    """
    name, text_value = split_override(text)
    parts = name.split(".")
    place: Any = layers.data
    for i, part in enumerate(parts[:-1]):
        here = ".".join(parts[: i + 1])
        place = _step_into(place, part, here, find_key(root, here))
    if not isinstance(place, dict | list):
        raise ConfigError(f"{name}: {'.'.join(parts[:-1])} is a value, not a section [override]")
    try:
        value = _typed(parse_value(text_value), text_value, find_key(root, name))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error} [override]") from error
    place[_index(place, parts[-1], name)] = value
    # A list of plain values is one value to whoever asks where it came from.
    is_plain_item = isinstance(place, list) and not isinstance(value, dict)
    if is_plain_item:
        layers.mark(".".join(parts[:-1]), None, "override")
    else:
        layers.mark(name, value, "override")


def _step_into(place: Any, part: str, here: str, key: Key | None) -> Any:
    """The section or list below `part`, made where the recipe leaves it to the defaults."""
    above = here.rpartition(".")[0]
    if not isinstance(place, dict | list):
        raise ConfigError(f"{above}: is a value, not a section, so {here} cannot be set [override]")
    index = _index(place, part, here)
    inner = place.get(index) if isinstance(place, dict) else place[index]
    if inner is None:
        inner = _default_below(key)
        place[index] = inner
    return inner


def _default_below(key: Key | None) -> Any:
    if key is None or not key.is_list:
        return {}
    default = key.field.get_default(call_default_factory=True)
    if isinstance(default, tuple | list) and not any(
        isinstance(item, BaseModel) for item in default
    ):
        return list(default)
    return []


def _index(place: dict[str, Any] | list[Any], part: str, here: str) -> Any:
    """`part` as it indexes `place`; a list may not grow by an override."""
    if isinstance(place, dict):
        return part
    above = here.rpartition(".")[0]
    if not place:
        raise ConfigError(
            f"{here}: {above} is an empty list; give all of it, {above}=[...] [override]"
        )
    if not part.isdigit() or int(part) >= len(place):
        have = f"items 0 to {len(place) - 1}" if len(place) > 1 else "one item, 0"
        raise ConfigError(f"{here}: {above} has {have}; there is no {part!r} [override]")
    return int(part)


def _typed(value: Any, text: str, key: Key | None) -> Any:
    is_number = isinstance(value, bool | int | float)
    return text.strip() if key is not None and key.is_text and is_number else value
