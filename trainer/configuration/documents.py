"""Strict YAML with the line of every value, so that an error can point at it.

Safe loading only. Unlike PyYAML's default, `1e-4` is a number and a key given twice is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...models.errors import ConfigError

__all__ = ["Document", "parse_value", "read_document"]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's floats and no `yes`/`no` booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


@dataclass
class Document:
    """A parsed file: plain data, and the line each dotted key stands on."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read_document(path: Path) -> Document:
    """Parse one recipe.

    Raises:
        ConfigError: unreadable, not YAML, a repeated key, or not a mapping.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; a recipe is a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    if node is None:
        return Document()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:1: expected sections (run:, model:, ...), found a {node.id}")
    document = Document()
    document.data = _construct(node, "", document.lines, path)
    return document


def _construct(node: yaml.Node, key: str, lines: dict[str, int], path: Path) -> Any:
    lines[key] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            if name in result:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: key {name!r} is given twice")
            inner = f"{key}.{name}" if key else name
            result[name] = _construct(value_node, inner, lines, path)
            lines[inner] = key_node.start_mark.line + 1
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, f"{key}.{i}", lines, path) for i, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        value = loader.construct_object(node)
    finally:
        loader.dispose()
    return value


def parse_value(text: str) -> Any:
    """An override's value, as YAML: `1e-4` a number, `[1, 2]` a list, `null` nothing.

    Raises:
        ConfigError: not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {text!r} as a value: {error.__class__.__name__}") from error
