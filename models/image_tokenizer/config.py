"""Settings of image tokenizers; imports no torch.

Sources: VQGAN as LlamaGen has it (arXiv 2406.06525) and CRT (2412.16326); the KL autoencoder of latent diffusion (2112.10752);
CAT (2501.03120), whose nested autoencoder is published as an idea: the sizes of `kind: nested` here are our own design.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..section import Section

__all__ = [
    "AdversarialConfig",
    "CRTConfig",
    "Config",
    "LatentConfig",
    "QuantizerConfig",
    "ReconstructionConfig",
]

FFN_MULTIPLE = 256
DEBUG_CHANNELS = 16
DEBUG_GROUPS = 8


class QuantizerConfig(Section):
    """The codebook of `kind: vq`."""

    codes: int = Field(16384, gt=1, description="rows of the codebook, K")
    width: int = Field(8, gt=0, description="elements of a code, d")
    normalise: bool = Field(
        True, description="look up by the angle: latents and codes are scaled to length 1"
    )
    commitment: float = Field(0.25, ge=0, description="weight of the commitment term")
    codebook_weight: float = Field(1.0, ge=0, description="weight of the codebook term")
    chunk_values: int = Field(
        1 << 26, gt=0, description="distances held at a time: latents are compared in parts"
    )


class LatentConfig(Section):
    """The Gaussian bottleneck of `kind: kl` and `nested`."""

    kl_weight: float = Field(1e-6, ge=0, description="factor on the Kullback-Leibler term")
    kl_norm: Literal["sum", "per_element"] = Field(
        "sum", description="over an image's latent: its sum, or the mean of its elements"
    )
    ratio_weights: dict[int, float] = Field(
        {}, description="of nested: factor on the KL and adversarial terms of a ratio's images; 1"
    )


class ReconstructionConfig(Section):
    """How the picture is compared with what was made of it."""

    error: Literal["mse", "l1"] = Field("mse", description="of pixels from -1 to 1")
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="over an image's elements: its mean, or its sum"
    )
    perceptual: str = Field(
        "off",
        description="off, file:PATH (local VGG16 weights as torchvision saves them), random_features or gradient; nothing is ever downloaded",
    )
    perceptual_heads: str | None = Field(
        None, description="of file: local weights of LPIPS's heads; null weighs all channels alike"
    )
    perceptual_weight: float = Field(1.0, ge=0, description="factor on the perceptual term")

    @field_validator("perceptual")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("off", "random_features", "gradient") or value.startswith("file:"):
            return value
        raise ValueError(
            f"perceptual {value!r} is none of off, file:PATH, random_features, gradient"
        )


class AdversarialConfig(Section):
    """A PatchGAN discriminator (arXiv 1611.07004) with the hinge loss."""

    start_step: int = Field(
        20_001, ge=1, description="first step with it; before that it is not run at all"
    )
    width: int = Field(64, gt=0, description="channels of its first layer")
    layers: int = Field(3, ge=1, description="layers that halve the picture")
    norm: Literal["group", "batch", "sync_batch"] = Field(
        "group",
        description="batch: statistics of one rank's micro-batch, as published; sync_batch: of all ranks' together",
    )
    groups: int = Field(32, gt=0, description="of norm: group")
    weight: float = Field(0.5, ge=0, description="factor on the generator's adversarial term")
    adaptive: bool = Field(
        False,
        description="times the ratio of the gradients' norms at the decoder's last layer (VQGAN, arXiv 2012.09841, equation 7)",
    )
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate")
    betas: tuple[float, float] | None = Field(None, description="null is optimizer.betas")
    clip_grad_norm: float | None = Field(
        None, gt=0, description="of its gradient; null is optimizer.clip_grad_norm"
    )


class CRTConfig(Section):
    """A small causal transformer that predicts latents from those before them, and the gradient it gives the encoder."""

    weight: float = Field(4.0, ge=0, description="of its loss for the encoder, lambda")
    ramp_steps: int = Field(1000, ge=0, description="over which lambda grows from 0, linearly")
    space: Literal["normalized", "raw"] = Field(
        "normalized", description="latents of length 1, or as the encoder gives them"
    )
    reduction: Literal["mean_all", "sum_dim", "norm"] = Field(
        "mean_all",
        description="squared error: mean of all elements, or sum over a latent's; norm: unsquared length of the error",
    )
    target_stopgrad: bool = Field(False, description="no gradient through what is predicted")
    input_stopgrad: bool = Field(False, description="no gradient through what it is predicted from")
    layers: int = Field(2, gt=0, description="blocks of the predictor")
    width: int = Field(1024, gt=0, description="its width; the published one is not known")
    head_width: int = Field(64, gt=0, description="width of its attention heads")
    ffn_width: int | None = Field(
        None, gt=0, description="null: 8/3 of the width, up to a multiple of 256"
    )
    lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate")
    betas: tuple[float, float] | None = Field(None, description="null is optimizer.betas")
    clip_grad_norm: float = Field(1.0, gt=0, description="of the predictor's own gradient")

    @model_validator(mode="after")
    def _heads(self) -> CRTConfig:
        if self.width % self.head_width:
            raise ValueError(
                f"width {self.width} is not a multiple of head_width {self.head_width}"
            )
        return self

    @property
    def ffn(self) -> int:
        if self.ffn_width is not None:
            return self.ffn_width
        return FFN_MULTIPLE * -(-int(8 * self.width / 3) // FFN_MULTIPLE)

    def weight_at(self, step: int) -> float:
        """Lambda in a step, from 1; the first of a ramp has 0."""
        return self.weight * min(1.0, (step - 1) / self.ramp_steps if self.ramp_steps else 1.0)


class Config(Section):
    """An image tokenizer; the defaults are VQ-16."""

    family: Literal["image_tokenizer"] = "image_tokenizer"
    kind: Literal["vq", "kl", "nested"] = Field(
        "vq", description="codes, Gaussian latents, or those at several ratios from one network"
    )
    size: int = Field(256, gt=0, description="height and width of the pictures in pixels")
    in_channels: int = Field(3, gt=0, description="channels of the pictures")
    channels: tuple[int, ...] = Field(
        (128, 128, 256, 256, 512),
        min_length=1,
        description="of each level, the finest first; all but the last halve the picture",
    )
    latent_channels: int = Field(
        256, gt=0, description="that the encoder ends on; of kl and nested: of a latent"
    )
    encoder_blocks: int = Field(2, gt=0, description="residual blocks of each encoder level")
    decoder_blocks: int = Field(3, gt=0, description="residual blocks of each decoder level")
    middle_blocks: int = Field(
        2, gt=0, description="residual blocks of encoder and decoder between"
    )
    middle_attention: bool = Field(True, description="one attention head after the first of these")
    lowest_attention: bool = Field(
        True, description="one attention head after every block of the coarsest level"
    )
    quant_conv: bool = Field(True, description="1x1 convolutions around the bottleneck")
    groups: int = Field(32, gt=0, description="groups of the group norms")
    ratios: tuple[int, ...] | None = Field(
        None, description="of nested: pixels a side of a latent's place, finest first: [8, 16, 32]"
    )
    every_ratio: bool = Field(
        False,
        description="of nested: each image at all ratios in each step, instead of at the one that the data say",
    )
    quantizer: QuantizerConfig = Field(QuantizerConfig(), description="of kind: vq")
    latent: LatentConfig = Field(LatentConfig(), description="of kind: kl and nested")
    reconstruction: ReconstructionConfig = Field(
        ReconstructionConfig(), description="loss of the pictures"
    )
    adversarial: AdversarialConfig | None = Field(None, description="null trains without one")
    crt: CRTConfig | None = Field(
        None, description="of kind: vq: the causal regulariser; null trains without one"
    )

    @model_validator(mode="after")
    def _fits(self) -> Config:
        for width in self.channels:
            if width % self.groups:
                raise ValueError(
                    f"channels {width} is not a multiple of groups {self.groups}; set groups to a divisor"
                )
        if (self.kind == "nested") != (self.ratios is not None):
            raise ValueError(
                "ratios belong to kind nested, which needs them; set ratios=[8,16,32], or leave them null"
            )
        if self.crt is not None and self.kind != "vq":
            raise ValueError(f"crt regularises the latents of kind vq, not of {self.kind}")
        return self

    @model_validator(mode="after")
    def _ratios_fit(self) -> Config:
        if self.ratios is not None:
            possible = [2**level for level in range(len(self.channels))]
            if list(self.ratios) != sorted(set(self.ratios) & set(possible)):
                raise ValueError(
                    f"ratios {list(self.ratios)} are not ascending powers of two up to {possible[-1]}, which "
                    f"{len(self.channels)} levels of channels end on"
                )
            if self.ratios[-1] != possible[-1]:
                raise ValueError(
                    f"the coarsest ratio is {self.ratios[-1]}, and {len(self.channels)} levels of channels end on {possible[-1]}"
                )
        return self

    @property
    def all_ratios(self) -> tuple[int, ...]:
        """Finest first; one where the model is not nested."""
        return self.ratios or (2 ** (len(self.channels) - 1),)

    @property
    def moments(self) -> int:
        """Channels that the encoder's last convolution gives."""
        return self.latent_channels * (1 if self.kind == "vq" else 2)

    @property
    def padded_size(self) -> int:
        """Pixels a side once they are filled up to a multiple of the coarsest ratio."""
        return self.padded(self.size)

    def padded(self, pixels: int) -> int:
        coarsest = self.all_ratios[-1]
        return -(-pixels // coarsest) * coarsest

    def side(self, ratio: int) -> int:
        """Places of a latent in a row or column."""
        return self.padded_size // ratio

    @property
    def tokens(self) -> int:
        """Places of a latent at the coarsest ratio."""
        return self.side(self.all_ratios[-1]) ** 2

    def count_parameters(self) -> dict[str, int]:
        """Exact, by part; `blocks` are encoder and decoder."""
        from .accounting import count_parameters

        return count_parameters(self)

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one picture, which is what a position is here, in a step with every network."""
        from .accounting import training_flops

        return training_flops(self)

    def debug_size(self) -> Config:
        """The same structure with narrow layers; pictures and ratios stay, which are the data's."""
        shrink = max(1, max(self.channels) // (2 * DEBUG_CHANNELS))
        changes: dict[str, Any] = {
            "channels": tuple(max(DEBUG_CHANNELS, width // shrink) for width in self.channels),
            "groups": DEBUG_GROUPS,
            "latent_channels": min(self.latent_channels, 16),
            "middle_blocks": min(self.middle_blocks, 2),
        }
        quantizer = self.quantizer
        codes = {"codes": min(quantizer.codes, 256), "width": min(quantizer.width, 8)}
        changes["quantizer"] = quantizer.model_copy(update=codes)
        if self.adversarial is not None:
            small = {"width": 16, "groups": DEBUG_GROUPS}
            changes["adversarial"] = self.adversarial.model_copy(update=small)
        if self.crt is not None:
            small = {"width": 64, "head_width": 32, "ffn_width": 128}
            changes["crt"] = self.crt.model_copy(update=small)
        return self.model_copy(update=changes)
