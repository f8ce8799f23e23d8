"""Settings of data.images; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ....models.section import Section

__all__ = ["ImagesConfig", "RatiosConfig"]


class RatiosConfig(Section):
    """Which compression ratio an image is trained at."""

    values: tuple[int, ...] = Field(
        (8, 16, 32), min_length=1, description="pixels a side of one latent, finest first"
    )
    scores: str | None = Field(
        None, description="folder that weft data score made; encoded data bring their own"
    )
    assignment: Literal["scored", "mixed", "random"] = Field(
        "scored",
        description="scored: by complexity; mixed: that, but with mix_share another ratio; random: drawn with shares. "
        "Draws are functions of (run.seed, sample)",
    )
    mix_share: float = Field(
        0.1, ge=0, le=1, description="of assignment mixed: share of the images at another ratio"
    )
    shares: tuple[float, ...] | None = Field(
        None, description="of assignment random: share of each ratio; null is equal shares"
    )
    fixed: int | None = Field(
        None, description="all images at this ratio, whatever the assignment; null is by assignment"
    )
    missing: Literal["error", "middle"] = Field(
        "error", description="of an image without a score: refuse, or take the middle ratio"
    )

    @model_validator(mode="after")
    def _fits(self) -> RatiosConfig:
        if list(self.values) != sorted(set(self.values)) or self.values[0] < 1:
            raise ValueError(
                f"values {list(self.values)} are not ascending; give ratios finest first, such as [8, 16, 32]"
            )
        if self.shares is not None and (
            len(self.shares) != len(self.values) or min(self.shares) < 0 or sum(self.shares) <= 0
        ):
            raise ValueError(
                f"shares {list(self.shares)} are not a share of each of {list(self.values)}"
            )
        if self.fixed is not None and self.fixed not in self.values:
            raise ValueError(f"fixed {self.fixed} is none of values {list(self.values)}")
        return self

    @property
    def needs_scores(self) -> bool:
        return self.fixed is None and self.assignment != "random"


class ImagesConfig(Section):
    """Images with class labels. Null is text."""

    kind: Literal["pixels", "codes", "latents"] = Field(
        "pixels",
        description="pixels of pictures; or what weft data encode made of them: codes (a row is an image) or latents",
    )
    size: int = Field(
        256, ge=1, description="of kind pixels: height and width of what is trained on"
    )
    channels: Literal[1, 3] = Field(3, description="of kind pixels: 1 is greyscale, 3 is RGB")
    resize: tuple[int, int] | None = Field(
        None,
        description="of kind pixels: the shorter side is resized to a length drawn from this range; null is size",
    )
    crop: Literal["random", "center"] = Field(
        "random",
        description="of kind pixels: which square is trained on; evaluation takes the middle",
    )
    flip: bool = Field(True, description="of kind pixels: mirror half of the images")
    classes: int | None = Field(
        None, ge=1, description="how many classes there are; null is what the data have"
    )
    allow_empty_classes: bool = Field(False, description="go on where a class has no images")
    image_key: str = Field("image", min_length=1, description="column of the image in Parquet")
    label_key: str = Field("label", min_length=1, description="column of the class in Parquet")
    caption_key: str = Field(
        "caption", min_length=1, description="column of the caption in Parquet, where there is one"
    )
    max_bad_share: float = Field(
        0.001,
        ge=0,
        le=1,
        description="refuse to prepare data with more unreadable images than this",
    )
    ratios: RatiosConfig | None = Field(
        None, description="compression ratios (CAT); null where there is one"
    )
    tokenizer: str | None = Field(
        None,
        description="of kinds codes and latents: fingerprint of the tokenizer that made them; null is written in from the data",
    )
    threads: int | None = Field(
        None, ge=1, description="threads that decode; null is one a core, at most 8"
    )

    @model_validator(mode="after")
    def _fits(self) -> ImagesConfig:
        if self.resize is not None and not self.size <= self.resize[0] <= self.resize[1]:
            raise ValueError(
                f"resize {list(self.resize)} is no range from size {self.size} up; set it such as [{self.size}, {self.size * 5 // 4}]"
            )
        if self.kind == "pixels" and self.ratios is not None and self.size < self.ratios.values[-1]:
            raise ValueError(
                f"size {self.size} is smaller than the coarsest ratio {self.ratios.values[-1]}; raise data.images.size, or "
                "leave that ratio out of data.images.ratios.values"
            )
        if self.kind == "codes" and self.ratios is not None:
            raise ValueError("codes have one ratio; set data.images.ratios=null")
        return self

    def order_settings(self) -> dict[str, Any]:
        """JSON-able: what changes samples without changing prepared data."""
        if self.kind != "pixels":
            ratios = self.ratios.model_dump(exclude={"scores"}) if self.ratios else None
            return {"kind": self.kind, "ratios": ratios}
        kept = {"kind", "size", "channels", "resize", "crop", "flip"}
        found = self.model_dump(mode="json", include=kept)
        if self.ratios is not None:
            found["ratios"] = self.ratios.model_dump(mode="json", exclude={"scores"})
        return found
