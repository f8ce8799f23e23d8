"""Model sections that are another run's: filled in from its config.yaml, so that the resolved configuration is complete.

A section class says so with `takes_model_of`: its key that holds a model -> its key that names the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ...models.errors import ConfigError
from .documents import read_document
from .keys import section_class
from .recipes import Layers

__all__ = ["fill_borrowed"]


def fill_borrowed(layers: Layers, kind: type[BaseModel], key: str = "model") -> None:
    """Fill what is left out at and below `key`, whose section is of class `kind`.

    Raises:
        ConfigError: the run that is named has no configuration.
    """
    data: Any = layers.data
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        return
    for name, source in getattr(kind, "takes_model_of", {}).items():
        place = data.get(source)
        if data.get(name) is None and isinstance(place, str) and place:
            data[name] = _model_of(Path(place), f"{key}.{source}")
            layers.mark(f"{key}.{name}", data[name], str(place))
    for name, field in kind.model_fields.items():
        inner = section_class(field.annotation)
        if inner is not None and isinstance(data.get(name), dict):
            fill_borrowed(layers, inner, f"{key}.{name}")


def _model_of(place: Path, key: str) -> dict[str, Any]:
    # A checkpoint lies in RUN/checkpoints/step_N.
    for folder in (place, place.parent.parent):
        path = folder / "config.yaml"
        if path.is_file():
            model = read_document(path).data.get("model")
            if isinstance(model, dict):
                return dict(model)
            break
    raise ConfigError(
        f"{key}: {place} is not a run folder (no config.yaml with a model); give that of a trained model, "
        "such as weft train blt/entropy-debug makes"
    )
