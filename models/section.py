"""The base of every configuration section, here because model configurations need it too.

A section is a small frozen pydantic model that stands beside the code that reads it. Each field
carries its own description, which `weft train --help-keys` and docs/configuration.md print.
Importing a module that only defines sections must never import torch.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """Frozen, typed settings; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )

    def for_generation(self) -> Self:
        """Of a model: the same, as generation needs it."""
        return self
