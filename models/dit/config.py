"""Settings, parameter counts and FLOPs of diffusion transformers over image latents; imports no torch.

The defaults are DiT-XL/2's (arXiv 2212.09748 and its released code) on latents of one ratio. Several ratios, as the
content-adaptive tokenizer gives them, bring a ratio embedding and statistics for each.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import ConfigError
from ..section import Section

__all__ = ["Config", "RatioConfig"]

DEBUG_LAYERS = 2
DEBUG_WIDTH = 64
DEBUG_HEAD_WIDTH = 16
TIME_WAVES = 256


class RatioConfig(Section):
    """One ratio of pixels to latents, and what the latents at it look like."""

    ratio: int = Field(..., gt=0, description="pixels a side of one latent")
    share: float = Field(
        1.0, gt=0, description="expected share of the images, relative to the others'; for plans"
    )
    mean: tuple[float, ...] | None = Field(
        None,
        description="of the latents: one value or one a channel; measured on encoded images, null refuses to train",
    )
    std: tuple[float, ...] | None = Field(
        None, description="standard deviation of the latents, as mean; they are divided by it"
    )

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value, default=0) <= 0:
            raise ValueError(f"{list(value)} holds no standard deviations; they are positive")
        return value


class Config(Section):
    """A transformer that denoises image latents of a class."""

    family: Literal["dit"] = Field("dit", description="module under weft.models")
    channels: int = Field(4, gt=0, description="values of one latent")
    ratios: tuple[RatioConfig, ...] = Field(
        (RatioConfig(ratio=8),), min_length=1, description="ratios the latents come at"
    )
    image_size: int = Field(
        256, gt=0, description="pixels a side: of what is generated, and for plans"
    )
    patch: int = Field(2, gt=0, description="latents a side of one token")
    classes: int = Field(
        1000, gt=0, description="image classes; the table has one more row for none"
    )
    n_layers: int = Field(28, gt=0, description="blocks")
    d_model: int = Field(1152, gt=0, description="width of the residual stream")
    n_heads: int = Field(16, gt=0, description="attention heads")
    mlp_ratio: int = Field(4, gt=0, description="hidden width of the MLP, in widths")
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of the images whose class is hidden, for guidance"
    )
    positions: Literal["plane", "index"] = Field(
        "plane",
        description="coordinates of tokens: places in the image, in tokens of reference_ratio; or their row and column",
    )
    reference_ratio: int = Field(
        16, gt=0, description="ratio whose tokens lie one apart, and whose noise is not shifted"
    )
    t_shift: bool = Field(
        False,
        description="divide the signal-to-noise ratio by sqrt(tokens / tokens at reference_ratio)",
    )
    timesteps: int = Field(1000, gt=1, description="noise levels")
    schedule: Literal["linear", "cosine"] = Field("linear", description="of the noise")
    learned_variance: bool = Field(
        True, description="predict the variance of a step as well, by the variational bound"
    )
    variational_weight: float = Field(
        1.0, ge=0, description="of the bound's term at one level, in bits a value"
    )
    time_includes_longest: bool = Field(
        False, description="waves of noise levels as diffusers' DiT has them; false is the paper's"
    )
    attention: Literal["auto", "runs", "flex", "varlen", "mask"] = Field(
        "auto", description="attention backend; auto picks by device"
    )

    @model_validator(mode="after")
    def _check_shapes(self) -> Config:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.d_model % 4:
            raise ValueError(f"d_model {self.d_model} is not a multiple of 4, as positions need")
        return self

    @model_validator(mode="after")
    def _check_ratios(self) -> Config:
        numbers = [item.ratio for item in self.ratios]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"ratios {numbers} name one twice")
        for item in self.ratios:
            if self.image_size % (item.ratio * self.patch):
                raise ValueError(
                    f"image_size {self.image_size} is not a multiple of ratio {item.ratio} times patch {self.patch}"
                )
            for name in ("mean", "std"):
                values = getattr(item, name)
                if values is not None and len(values) not in (1, self.channels):
                    raise ValueError(
                        f"ratio {item.ratio} has {len(values)} values of {name}; give 1 or channels={self.channels}"
                    )
        return self

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def d_ff(self) -> int:
        return self.mlp_ratio * self.d_model

    @property
    def out_channels(self) -> int:
        """Values the model gives for one latent."""
        return self.channels * (2 if self.learned_variance else 1)

    def image_tokens(self, ratio: int) -> int:
        """Tokens of a square image of `image_size`."""
        return (self.image_size // ratio // self.patch) ** 2

    @property
    def mean_image_tokens(self) -> float:
        """At the expected shares."""
        return self._mean(self.image_tokens)

    def _mean(self, function: Any) -> float:
        total = sum(item.share for item in self.ratios)
        return sum(item.share * function(item.ratio) for item in self.ratios) / total

    def require_statistics(self) -> None:
        """Check that the latents of every ratio have been measured.

        Raises:
            ConfigError: mean or std of one is null.
        """
        for place, item in enumerate(self.ratios):
            if item.mean is None or item.std is None:
                raise ConfigError(
                    f"model.ratios.{place}: the mean and std of latents at ratio {item.ratio} are not set; "
                    "encode images with weft data encode, which measures them, and copy them here"
                )

    def debug_size(self) -> Config:
        """The smallest model that still runs every part of this one; latents and classes are the data's."""
        small: dict[str, Any] = {"n_layers": min(self.n_layers, DEBUG_LAYERS)}
        if self.d_model > DEBUG_WIDTH:
            small |= {"d_model": DEBUG_WIDTH, "n_heads": DEBUG_WIDTH // DEBUG_HEAD_WIDTH}
        return Config(**{**self.model_dump(), **small})

    def count_parameters(self) -> dict[str, int]:
        """Exact parameter counts by part; the values add up to the model. Positions are none."""
        d, f, values = self.d_model, self.d_ff, self.patch**2
        block = (4 * d * d + 4 * d) + (2 * d * f + f + d) + (6 * d * d + 6 * d)
        return {
            "patches": values * self.channels * d + d,
            "time": TIME_WAVES * d + d + d * d + d,
            "classes": (self.classes + 1) * d,
            "ratios": len(self.ratios) * d if len(self.ratios) > 1 else 0,
            "blocks": self.n_layers * block,
            "head": 2 * d * d + 2 * d + (d + 1) * values * self.out_channels,
        }

    def forward_macs(self, tokens: int) -> int:
        """Multiplications with an addition that one image of this many tokens costs; what the paper calls Gflops."""
        d, values = self.d_model, self.patch**2
        linear = 4 * d * d + 2 * d * self.d_ff
        blocks = self.n_layers * (tokens * linear + 2 * tokens**2 * d + 6 * d * d)
        ends = tokens * d * values * (self.channels + self.out_channels)
        return blocks + ends + 2 * d * d + TIME_WAVES * d + d * d

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one image, which is a position of the data, at the expected shares of the ratios.

        Args:
            sequence_length: images a sample; nothing depends on it, as they do not see each other.
        """
        return 6.0 * self._mean(lambda ratio: self.forward_macs(self.image_tokens(ratio)))
