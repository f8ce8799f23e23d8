"""A configuration back as text: complete YAML, YAML with origins, and a hash of what matters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .documents import dump_value, dump_yaml
from .schema import TrainingConfig

__all__ = ["config_hash", "dump_config"]

# Settings that change how a run is carried out, but not what it computes.
_WITHOUT_EFFECT = {
    "run": {"name", "dir", "device", "threads"},
    "data": {"cache_dir", "prepare_workers", "prefetch_steps", "allow_changed"},
    "logging": None,
    "eval": None,
    "parallel": None,
    "checkpoint": {
        "every",
        "keep",
        "permanent_every",
        "asynchronous",
        "max_failed_saves",
        "timeout_s",
    },
}
_WIDEST_COMMENT_COLUMN = 60


def dump_config(config: TrainingConfig, origins: Mapping[str, str] | None = None) -> str:
    """The complete configuration as YAML; loading it gives an equal configuration.

    Args:
        origins: where given, each value's origin stands in a comment beside it.
    """
    if origins is None:
        return dump_yaml(config.dump())
    lines = list(_lines(config.dump(), "", 0, origins))
    widths = [len(text) for text, origin in lines if origin]
    column = min(_WIDEST_COMMENT_COLUMN, max(widths, default=0)) + 2
    return "".join(
        f"{text:<{column}}# {origin}\n" if origin else f"{text}\n" for text, origin in lines
    )


def config_hash(config: TrainingConfig) -> str:
    """Hash of what a run's result depends on: not its name, its folders, its world or what it logs."""
    data = config.dump()
    for section, names in _WITHOUT_EFFECT.items():
        if names is None:
            del data[section]
        else:
            data[section] = {k: v for k, v in data[section].items() if k not in names}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _lines(
    value: Any, key: str, depth: int, origins: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(line of YAML, origin) pairs; lines that only open a section have no origin."""
    is_mapping = isinstance(value, dict)
    for name, item in value.items() if is_mapping else enumerate(value):
        inner = f"{key}.{name}" if key else str(name)
        indent = "  " * depth
        if is_mapping and _has_sections(item):
            yield f"{indent}{name}:", ""
            yield from _lines(item, inner, depth + 1, origins)
        elif is_mapping:
            yield f"{indent}{name}: {dump_value(item)}", origins.get(inner, "default")
        else:
            # An item of a list: its first key stands on the line of the dash.
            inside = list(_lines(item, inner, depth + 1, origins))
            first, origin = inside[0]
            yield f"{indent}- {first.lstrip()}", origin
            yield from inside[1:]


def _has_sections(item: Any) -> bool:
    return (isinstance(item, dict) and bool(item)) or (
        isinstance(item, list) and any(isinstance(part, dict) for part in item)
    )
