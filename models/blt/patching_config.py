"""Settings of patching: which rule, whose entropies, how long, and what happens when there are too many. No torch.

The rules are those of `kernels.patch_boundaries`; source: Byte Latent Transformer, arXiv 2412.09871, section 2.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..section import Section
from ..transformer.config import Config as TransformerConfig

__all__ = ["PatchingConfig"]

BYTE_VOCABULARY_SIZE = 260
HEADROOM = 1.15
"""Of the default room over the expected patches, where a micro-batch is large."""
FEW_BYTES = 64.0
"""Adds this over the square root of the bytes: a small micro-batch is further from the mean."""


class PatchingConfig(Section):
    """Where patches of bytes start."""

    scheme: Literal["entropy", "rise", "both", "stride", "space"] = Field(
        "entropy",
        description="entropy: the next byte's entropy is above threshold; rise: it rose by more than rise (approximate monotonic); both; stride: every stride bytes; space: after space-like bytes",
    )
    threshold: float | None = Field(
        None,
        description="nats; entropy, both. null with patch_size: found on the run's own data when it starts",
    )
    rise: float | None = Field(
        None,
        description="nats; rise, both. null with patch_size: found on the run's own data when it starts (rise)",
    )
    patch_size: float | None = Field(
        None,
        gt=1,
        description="wanted mean bytes a patch; a run whose data give more than 20 % more or less is refused",
    )
    stride: int | None = Field(None, ge=1, description="bytes a patch; stride")
    max_length: int | None = Field(None, ge=1, description="longest patch, in bytes")
    forced_starts: int = Field(
        2,
        ge=1,
        description="bytes at the start of a document that each start a patch; 3 reproduces the released code's rise and both",
    )
    newline_reset: Literal["off", "after", "before"] = Field(
        "off",
        description="the entropy model forgets what came before each line; a newline is still predicted by the line it ends (after) or opens the next (before)",
    )
    entropy_model: str | None = Field(
        None, description="run folder or checkpoint of the entropy model; entropy, rise, both"
    )
    entropy: TransformerConfig | None = Field(
        None, description="its architecture; null is read from the run entropy_model names"
    )
    stored: bool = Field(
        False,
        description="patches come with the data (weft data prepare --patches-from) and no entropy model is loaded",
    )
    max_patches: int | None = Field(
        None,
        ge=1,
        description="room for patches in data.sequence_length bytes, over a micro-batch; null is 1.3 times (256 Ki bytes a micro-batch) to 2.2 times (4 Ki bytes) what patch_size asks for, and enough for any patches without it",
    )
    overflow: Literal["error", "merge"] = Field(
        "error",
        description="what does not fit: end the run, or let the last patch that fits take in the rest of its document and leave later documents of the micro-batch without patches; counted either way",
    )

    takes_model_of: ClassVar[dict[str, str]] = {"entropy": "entropy_model"}
    """Keys here that are the `model` section of the run another key names."""

    @property
    def needs_entropy(self) -> bool:
        """Whether the rule compares entropies."""
        return self.scheme in ("entropy", "rise", "both")

    @property
    def open_level(self) -> str | None:
        """The key of the level that patch_size has to find; None where all are given."""
        wanted = {"entropy": "threshold", "rise": "rise", "both": "threshold"}.get(self.scheme)
        return wanted if wanted and getattr(self, wanted) is None else None

    def room(self, positions: int, sequence_length: int) -> int:
        """Patches there is room for in a micro-batch of so many positions."""
        rows = -(-positions // sequence_length)
        if self.max_patches is not None:
            return rows * self.max_patches
        if self.patch_size is None:
            return positions
        headroom = HEADROOM + FEW_BYTES / math.sqrt(positions)
        return min(positions, math.ceil(headroom * positions / self.patch_size))

    def identity(self) -> dict[str, Any]:
        """What decides, with the entropy model's weights, where patches start; JSON-able."""
        names = ("scheme", "threshold", "rise", "stride", "max_length", "forced_starts")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found["newline_reset"] = self.newline_reset if self.needs_entropy else "off"
        return found

    @model_validator(mode="after")
    def _check_levels(self) -> PatchingConfig:
        needed = {
            "threshold": self.scheme in ("entropy", "both"),
            "rise": self.scheme in ("rise", "both"),
            "stride": self.scheme == "stride",
        }
        for name, is_needed in needed.items():
            value = getattr(self, name)
            if value is not None and not is_needed:
                raise ValueError(f"{name} is {value}, but scheme {self.scheme} has no use for it")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, expected a finite number of nats")
            is_found = self.patch_size is not None and name == self.open_level
            if is_needed and value is None and not is_found:
                mend = (
                    " or patch_size, to find it on the run's data"
                    if name == self.open_level
                    else ""
                )
                raise ValueError(f"scheme {self.scheme} needs {name}{mend}")
        if self.threshold is not None and self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}; entropies are 0 nats or more")
        return self

    @model_validator(mode="after")
    def _check_entropy_model(self) -> PatchingConfig:
        if self.needs_entropy and self.entropy_model is None:
            raise ValueError(
                f"scheme {self.scheme} needs entropy_model, the run folder of a trained entropy model; "
                "train one: weft train blt/entropy-debug"
            )
        if self.entropy is not None and self.entropy.vocab_size != BYTE_VOCABULARY_SIZE:
            raise ValueError(
                f"the entropy model has a vocabulary of {self.entropy.vocab_size} ids, expected the {BYTE_VOCABULARY_SIZE} "
                "of bytes; name one trained with data.vocabulary=bytes"
            )
        return self
