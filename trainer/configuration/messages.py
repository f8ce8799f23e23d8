"""Pydantic's findings in Weft's words: key, what is wrong, what was found, and where it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .documents import dump_value
from .keys import nearest_key, walk_keys
from .recipes import Layers

__all__ = ["describe", "located", "wrong_kinds"]

_LONGEST_SHOWN = 60
_KINDS = {
    "model_type": "should be a section, with keys below it",
    "model_attributes_type": "should be a section, with keys below it",
    "dict_type": "should be a section, with keys below it",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "int_type": "should be an integer",
    "int_parsing": "should be an integer",
    "int_from_float": "should be an integer",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "string_type": "should be text; put it in quotes",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "none_required": "should be null",
}


def located(key: str, message: str, layers: Layers) -> str:
    """One error line: `key: message [origin]`; values that nobody gave have no origin to show."""
    return _line(key, message, layers.origin(key))


def _line(key: str, message: str, origin: str) -> str:
    return f"{key}: {message}" + ("" if origin == "default" else f" [{origin}]")


def describe(
    error: ValidationError, root: type[BaseModel], prefix: str, layers: Layers
) -> Iterator[tuple[str, str]]:
    """(dotted key, error line) for everything pydantic found in one section.

    Args:
        root: the section's class, for the nearest key of one that does not exist.
        prefix: the section's own key.
    """
    for item in error.errors(include_url=False):
        key = ".".join([prefix, *(str(part) for part in item["loc"])])
        if item["type"] == "extra_forbidden":
            yield key, located(key, f"no such key; {nearest_key(root, key, prefix)}", layers)
        elif item["type"] == "missing":
            # What is absent has no origin; what stands beside it does.
            yield key, _line(key, "required, but not given", layers.origin(key.rpartition(".")[0]))
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            is_section = isinstance(item["input"], dict)
            line = (
                _about_section(key, text, item["input"], layers)
                if is_section
                else located(key, text, layers)
            )
            yield key, line
        else:
            yield key, located(key, f"{_words(item)}, found {_shown(item['input'])}", layers)


def _words(item: ErrorDetails) -> str:
    if item["type"] in _KINDS:
        return _KINDS[item["type"]]
    message = item["msg"].removeprefix("Input ").removeprefix("Value ")
    return message[0].lower() + message[1:]


def _shown(value: Any) -> str:
    text = dump_value(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _about_section(key: str, text: str, given: dict[str, Any], layers: Layers) -> str:
    """A finding about several keys of a section: the origins are those of the keys it speaks of."""
    spoken = set(re.findall(r"\w+", text))
    origins = [layers.origin(f"{key}.{name}") for name in given if name in spoken]
    unique = [origin for origin in dict.fromkeys(origins) if origin != "default"]
    return f"{key}: {text}" + (f" [{', '.join(unique)}]" if unique else "")


def wrong_kinds(data: Any, root: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for values pydantic would take although nobody means them.

    `true` is no number, and no setting may be infinite or not a number.
    """
    keys = {key.name: key for key in walk_keys(root, prefix)}
    for path, value in _scalars(data, prefix):
        key = keys.get(".".join("N" if part.isdigit() else part for part in path.split(".")))
        key = key or keys.get(path.rpartition(".")[0])
        if key is not None and isinstance(value, bool) and not (key.takes_bool or key.is_text):
            yield path, f"expected {key.type_text}, found {_shown(value)}"
        elif isinstance(value, float) and (value != value or abs(value) == float("inf")):
            yield path, f"should be finite, found {_shown(value)}"


def _scalars(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _scalars(item, f"{key}.{name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _scalars(item, f"{key}.{i}")
    else:
        yield key, value
