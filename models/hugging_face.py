"""Finds what a family knows about Hugging Face: its `hugging_face` module, by the family's or their model's name.

Imports no torch. `HuggingFaceLayout` says what such a module has; a family without one has no Hugging Face class.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from .errors import ConfigError
from .section import Section

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HuggingFaceLayout", "export_forms", "layout_for", "layout_of"]

DEFAULT_FAMILY = "transformer"


class HuggingFaceLayout(Protocol):
    """Names, shapes and settings of a family's checkpoints, both ways.

    Our names are those of the network `model`; those of a companion begin with its name and a slash. Two things a module may
    have besides: `export_forms(config)`, see the function here, and `CONFIG_KEYS`, by which a config.json without a
    `model_type` is known to be this family's.
    """

    MODEL_TYPES: tuple[str, ...]
    """Values of `model_type` that are this family's."""
    READS_BYTES: bool
    """Whether the ids are always those of the byte vocabulary, so that a tokenizer beside the weights says nothing."""

    def from_hugging_face_config(self, theirs: Mapping[str, Any]) -> Any: ...

    def to_hugging_face_config(self, config: Any, **said: Any) -> dict[str, Any]: ...

    def longest_positions(self, theirs: Mapping[str, Any]) -> int | None: ...

    def check_exportable(self, config: Any) -> str: ...

    def parameter_shapes(self, config: Any) -> dict[str, tuple[int, ...]]: ...

    def from_hugging_face_name(self, name: str, config: Any) -> str | None: ...

    def to_hugging_face_name(self, name: str, config: Any) -> str: ...

    def arrange(self, name: str, tensor: Tensor, config: Any, *, to_theirs: bool) -> Tensor:
        """The values of the parameter `name`, as the other side orders them."""

    def companions(self, config: Any) -> Mapping[str, Section]:
        """Networks whose weights are runs of their own, by name."""

    def companion_runs(self, config: Any) -> Mapping[str, str]:
        """Where those runs are."""

    def with_companions(self, config: Any, runs: Mapping[str, str]) -> Any:
        """The configuration with those runs at other places."""


def layout_of(config: Section) -> HuggingFaceLayout:
    """The layout of a model's family.

    Raises:
        ConfigError: the family has none.
    """
    family = getattr(config, "family", "?")
    if family not in _families():
        raise ConfigError(f"models of family {family!r} have no Hugging Face class")
    return _load(family)


def layout_for(theirs: Mapping[str, Any]) -> HuggingFaceLayout:
    """The layout that their config.json is of.

    Raises:
        ConfigError: no family has it.
    """
    kind = theirs.get("model_type")
    layouts = [_load(family) for family in _families()]
    if kind is None:
        keys = ((layout, getattr(layout, "CONFIG_KEYS", ())) for layout in layouts)
        known = (layout for layout, own in keys if own and theirs.keys() >= set(own))
        return next(known, _load(DEFAULT_FAMILY))
    found = next((layout for layout in layouts if kind in layout.MODEL_TYPES), None)
    if found is None:
        types = sorted(name for layout in layouts for name in layout.MODEL_TYPES)
        names = f"{', '.join(types[:-1])} and {types[-1]}"
        raise ConfigError(f"config.json has model_type {kind!r}; only {names} can be imported")
    return found


def export_forms(
    layout: HuggingFaceLayout, config: Any
) -> Mapping[str, tuple[Any, Callable[[str], str]]]:
    """What an export of a model writes: nearly always the model itself.

    Returns:
        Folder inside the target, empty for the target itself -> the configuration of the model there, and the name under
        which the run has each of its parameters.
    """
    own = getattr(layout, "export_forms", None)
    return {"": (config, str)} if own is None else own(config)


def _families() -> list[str]:
    package = importlib.import_module(__package__ or "")
    return sorted(
        item.name
        for item in pkgutil.iter_modules(package.__path__)
        if item.ispkg and importlib.util.find_spec(f"{package.__name__}.{item.name}.hugging_face")
    )


def _load(family: str) -> HuggingFaceLayout:
    module = importlib.import_module(f".{family}.hugging_face", __package__)
    return cast(HuggingFaceLayout, module)
