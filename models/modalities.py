"""What a position can be of. Imports no torch, because configurations name modalities."""

from __future__ import annotations

from typing import Literal

__all__ = ["MODALITIES", "Modality"]

Modality = Literal["text", "image", "speech"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "speech")
"""All there are, in the numbering of prepared data. A run has some of them, text first, and numbers them by its own list."""
