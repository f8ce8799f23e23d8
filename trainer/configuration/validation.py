"""Plain data against the sections' classes: everything that is wrong, in one go.

Each section is validated by itself, so that no error hides another's; what spans sections is then
checked wherever the values it needs are sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from ...models.errors import ConfigError
from ...models.section import Section
from .checks import cross_field_errors
from .keys import nearest_key, section_class
from .messages import describe, located, wrong_kinds
from .recipes import DEFAULT_FAMILY, Layers
from .schema import TrainingConfig, model_section

__all__ = ["schema_of", "schema_of_data", "validate"]


def schema_of(model: type[Section]) -> type[BaseModel]:
    """TrainingConfig's fields with `model` as the family's own class, for looking keys up."""
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in TrainingConfig.model_fields.items()
    }
    fields["model"] = (model, Field(..., description=fields["model"][1].description))
    return create_model("TrainingConfig", **fields)


def schema_of_data(layers: Layers) -> type[BaseModel]:
    """The same for the family the data names; the default family's where that does not exist."""
    try:
        return schema_of(model_section(_family(layers)))
    except ConfigError:
        return schema_of(model_section(DEFAULT_FAMILY))


def validate(layers: Layers) -> tuple[TrainingConfig | None, list[str]]:
    """The configuration, or None and every error, one line each."""
    schema = schema_of_data(layers)
    errors = [
        _unknown_section(name, schema, layers)
        for name in layers.data
        if name not in schema.model_fields
    ]
    broken = []
    if family_error := _family_error(layers):
        errors.append(family_error)
        broken.append("model")
    sections: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        kind = section_class(field.annotation) or Section
        given = layers.data.get(name)
        if name in broken or given is None:
            given = {}
        found = list(_section_errors(name, kind, given, layers))
        errors.extend(line for _, line in found)
        broken.extend(key for key, _ in found)
        sections[name], is_sound = _best_section(name, kind, given, [key for key, _ in found])
        if not is_sound:
            broken.append(name)
    config = TrainingConfig.model_construct(None, **sections)
    for line in cross_field_errors(config, broken):
        key, _, message = line.partition(": ")
        errors.append(located(key, message, layers))
    return (None, errors) if errors else (TrainingConfig(**sections), [])


def _family(layers: Layers) -> str:
    model = layers.data.get("model")
    return str(model.get("family", DEFAULT_FAMILY)) if isinstance(model, dict) else DEFAULT_FAMILY


def _family_error(layers: Layers) -> str | None:
    try:
        model_section(_family(layers))
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        return located(key, message, layers)
    return None


def _section_errors(
    name: str, kind: type[BaseModel], given: Any, layers: Layers
) -> Iterator[tuple[str, str]]:
    """(dotted key, error line) for one section; each key once."""
    named = set()
    for key, text in wrong_kinds(given, kind, name):
        named.add(key)
        yield key, located(key, text, layers)
    try:
        kind.model_validate(given)
    except ValidationError as error:
        yield from (item for item in describe(error, kind, name, layers) if item[0] not in named)


def _best_section(
    name: str, kind: type[BaseModel], given: Any, bad_keys: list[str]
) -> tuple[BaseModel, bool]:
    """The section with defaults in place of wrong values, and whether the rest of it holds together."""
    kept = given if isinstance(given, dict) else {}
    wrong = {bad.split(".")[1] for bad in bad_keys if "." in bad}
    try:
        return kind.model_validate(
            {k: v for k, v in kept.items() if k not in wrong}
        ), name not in bad_keys
    except ValidationError:
        return kind.model_construct(), False


def _unknown_section(name: str, schema: type[BaseModel], layers: Layers) -> str:
    if "." in name:
        return located(name, "write this as nested sections, one key a line", layers)
    return located(name, f"no such key; {nearest_key(schema, name)}", layers)
