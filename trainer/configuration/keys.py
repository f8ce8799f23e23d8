"""Every dotted key there is, with its type, default and description, read off the sections themselves.

`weft train --help-keys`, docs/configuration.md, the nearest-key hints and the override parser all
look keys up here, so none of them can drift from the code. Items of a list have the index `N`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .documents import dump_value

__all__ = ["ITEM", "Key", "find_key", "nearest_key", "section_class", "walk_keys"]

ITEM = "N"
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """One dotted key (`data.sources.N.path`) and the field behind it."""

    name: str
    field: FieldInfo

    @property
    def section(self) -> type[BaseModel] | None:
        """The section below this key, if it is one (or a list of some, or may be null)."""
        return section_class(self.field.annotation)

    @property
    def is_list(self) -> bool:
        return any(
            get_origin(part) in (tuple, list) for part in _alternatives(self.field.annotation)
        )

    @property
    def takes_null(self) -> bool:
        return types.NoneType in _alternatives(self.field.annotation)

    @property
    def is_text(self) -> bool:
        return str in _alternatives(self.field.annotation)

    @property
    def takes_bool(self) -> bool:
        return any(part in (bool, Any) for part in _scalar_types(self.field.annotation))

    @property
    def type_text(self) -> str:
        """The type in words, with its bounds: `integer > 0 or null`."""
        parts = [_type_words(part) for part in _alternatives(self.field.annotation)]
        bounds = [
            f"{sign} {getattr(rule, attribute)}"
            for rule in self.field.metadata
            for attribute, sign in _BOUNDS.items()
            if getattr(rule, attribute, None) is not None
        ]
        if bounds:
            parts[0] = f"{parts[0]} {' and '.join(bounds)}"
        return " or ".join(parts)

    @property
    def default_text(self) -> str:
        """The default as YAML; `required` where there is none, empty for a section."""
        if self.field.is_required():
            return "required"
        default = self.field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            return ""
        if isinstance(default, tuple):
            default = [
                # Of a list of sections, what its items set.
                item.model_dump(exclude_unset=True) if isinstance(item, BaseModel) else item
                for item in default
            ]
        return dump_value(default)

    @property
    def description(self) -> str:
        return self.field.description or ""


def walk_keys(root: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key under a section class, sections themselves included, in the order of the fields."""
    for name, field in root.model_fields.items():
        key = Key(f"{prefix}.{name}" if prefix else name, field)
        yield key
        if key.section is not None:
            yield from walk_keys(key.section, f"{key.name}.{ITEM}" if key.is_list else key.name)


def find_key(root: type[BaseModel], name: str) -> Key | None:
    """The key a dotted name means; numbers stand for items of lists."""
    wanted = _generic(name)
    return next((key for key in walk_keys(root) if key.name == wanted), None)


def nearest_key(root: type[BaseModel], name: str, prefix: str = "") -> str:
    """A hint for a key that does not exist: the nearest that does, or what its section has."""
    known = [key.name for key in walk_keys(root, prefix)]
    wanted = _generic(name)
    section, _, last = wanted.rpartition(".")
    near = get_close_matches(wanted, known, n=1, cutoff=0.8)
    near = near or [key for key in known if key.rpartition(".")[2] == last][:1]
    near = near or get_close_matches(wanted, known, n=1, cutoff=0.7)
    if near:
        return f"did you mean {_with_indices(near[0], name)}?"
    inside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    return (
        f"{section or 'a recipe'} has {', '.join(inside)}" if inside else "weft train --help-keys"
    )


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_class(argument) for argument in get_args(annotation))
    return next((item for item in found if item is not None), None)


def _generic(name: str) -> str:
    return ".".join(ITEM if part.isdigit() else part for part in name.split("."))


def _with_indices(known: str, given: str) -> str:
    """`data.sources.N.weight` with the index the user gave, where the two agree so far."""
    parts, given_parts = known.split("."), given.split(".")
    for i, part in enumerate(parts):
        if part == ITEM and i < len(given_parts) and given_parts[i].isdigit():
            parts[i] = given_parts[i]
    return ".".join(parts)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return list(get_args(annotation))
    return [annotation]


def _scalar_types(annotation: Any) -> list[Any]:
    """The types a value may have in the end: alternatives, and the items of lists."""
    found: list[Any] = []
    for part in _alternatives(annotation):
        if get_origin(part) in (tuple, list, dict):
            found.extend(t for item in get_args(part) for t in _scalar_types(item))
        elif get_origin(part) is Literal:
            found.extend(type(value) for value in get_args(part))
        else:
            found.append(part)
    return found


def _type_words(part: Any) -> str:
    if part is types.NoneType:
        return "null"
    if get_origin(part) is Literal:
        return " | ".join(str(value) for value in get_args(part))
    if get_origin(part) in (tuple, list):
        items = get_args(part)
        if len(items) == 2 and items[1] is not Ellipsis:
            return "pair of numbers" if items[0] is float else "pair"
        is_section = isinstance(items[0], type) and issubclass(items[0], BaseModel)
        return "list of sections" if is_section else f"list of {_plural(items[0])}"
    if isinstance(part, type) and issubclass(part, BaseModel):
        return "section"
    return _NAMES.get(part, getattr(part, "__name__", str(part)))


def _plural(part: Any) -> str:
    return {"text": "texts"}.get(_type_words(part), f"{_type_words(part)}s")
