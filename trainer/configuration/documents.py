"""Strict YAML with the line of every value, so that an error can point at it.

Safe loading only, by YAML 1.2's core schema: unlike PyYAML's default `1e-4` is a number, `010` is ten,
and `yes`, `12:30` and `2026-01-31` are text. A key given twice is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...models.errors import ConfigError

__all__ = ["Document", "dump_value", "dump_yaml", "parse_value", "read_document"]

# Aliases can make a short file expand without end; no recipe comes near this.
MAX_VALUES = 100_000

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F][0-9a-fA-F_]*$|^0o[0-7][0-7_]*$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads plain scalars by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader`, or a YAML 1.1 reader, would take for something else."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    return int(text, base)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Plain and single-quoted text would be folded over several lines at a line break.
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


# The order matters: what is an integer would be a float as well.
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(
    f"{_TAG}bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    f"{_TAG}null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_constructor(f"{_TAG}int", _construct_int)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


@dataclass
class Document:
    """A parsed file: plain data, and the line each dotted key stands on."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read_document(path: Path) -> Document:
    """Parse one recipe.

    Raises:
        ConfigError: unreadable, not YAML, a repeated key, or not a mapping; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; a recipe is a YAML file") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return Document()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path}:1: expected sections (run:, model:, ...), found a {_kind(node)}"
            )
        reader = _Reader()
        data = reader.construct(node, "")
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}:{_line_of(error)}: not valid YAML: {_problem(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return Document(data, reader.lines)


def parse_value(text: str) -> Any:
    """An override's value, as YAML: `1e-4` a number, `[1, 2]` a list, `null` or nothing at all null.

    Raises:
        ConfigError: not YAML.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Reader().construct(node, "")
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"cannot read {text!r} as a value: {_problem(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {text!r} as a value: it is not YAML") from error


def dump_yaml(data: Any) -> str:
    """Plain data as block YAML with short lists on one line; `read_document` gives the same back."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
        default_flow_style=None,
    )


def dump_value(value: Any) -> str:
    """One value on one line, as it could stand after `key:` or `key=`."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
        default_flow_style=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")


class _Reader:
    """Turns nodes into plain data, noting each key's line; one for each document."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._scalars = _Loader("")
        self._open: set[int] = set()
        self._count = 0

    def construct(self, node: yaml.Node, key: str) -> Any:
        self._count += 1
        if id(node) in self._open:
            raise _fault("an alias that contains itself", node)
        if self._count > MAX_VALUES:
            raise _fault(f"more than {MAX_VALUES} values; aliases multiply", node)
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            raise _fault(f"tag {node.tag!r} is not allowed", node)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.construct(item, _join(key, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, key)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.Node, key: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _fault("a key must be a word", key_node)
            name = key_node.value
            if name in result:
                raise _fault(f"key {name!r} is given twice", key_node)
            self.lines[_join(key, name)] = key_node.start_mark.line + 1
            result[name] = self.construct(value_node, _join(key, name))
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self._scalars.construct_object(node)
        except ValueError as error:
            raise _fault(f"{node.value!r} does not fit its tag {node.tag!r}", node) from error


def _kind(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _fault(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _line_of(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def _problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's complaint on one line, with the construct it was reading and where that began."""
    problem = " ".join((error.problem or "unreadable").split())
    if error.context and error.context_mark and error.context_mark.line + 1 != _line_of(error):
        return f"{problem}, {error.context} that began on line {error.context_mark.line + 1}"
    return problem
