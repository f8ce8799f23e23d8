"""Settings, parameter counts and FLOPs of the Byte Latent Transformer; imports no torch.

Every choice that the paper's ablations vary is a value here. Where the paper (arXiv 2412.09871) and the code that made
the released models differ, `formulation` says whose word holds: `parity` follows the code, `paper` the paper; single
values may still be set otherwise. Dimensions: h_E, h_G, h_D widths of encoder, latent transformer and decoder; k vectors a
patch; s mean bytes a patch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..section import Section
from ..transformer.config import Config as TransformerConfig
from ..transformer.config import NgramConfig, RopeScalingConfig
from .flops import forward_flops, transformer_flops
from .patching_config import PatchingConfig

__all__ = ["Config", "DecoderConfig", "EncoderConfig", "LatentConfig"]

BYTE_VOCABULARY_SIZE = 260
FORMULATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "parity": {
        "": {"double_residual": True},
        "ngram": {"oldest_first": True, "short_windows": "pad", "average": False},
        "encoder": {"queries": "states"},
    },
    "paper": {
        "": {"double_residual": False},
        "ngram": {"oldest_first": False, "short_windows": "skip", "average": True},
        "encoder": {"queries": "embeddings"},
    },
}
SPACE_PATCH_SIZE = 6.1
"""Mean bytes a patch of the space scheme on the paper's mix; it cannot be tuned."""
USUAL_PATCH_SIZE = 4.5
DEBUG_LAYERS = 2
DEBUG_WIDTH = 64
DEBUG_TABLE_ROWS = 4096


def swiglu_width(d_model: int) -> int:
    """Hidden width of the released models: 8/3 of the width, up to the next multiple of 256."""
    return -(-8 * d_model // (3 * 256)) * 256


class LocalConfig(Section):
    """A stack of blocks over bytes."""

    n_layers: int = Field(1, gt=0, description="blocks")
    d_model: int = Field(1024, gt=0, description="width")
    n_heads: int = Field(16, gt=0, description="heads of self-attention")
    d_ff: int | None = Field(
        None, gt=0, description="hidden width of the SwiGLU; null is 8/3 d_model, rounded up to 256"
    )
    cross_heads: int | None = Field(
        None,
        gt=0,
        description="heads of cross-attention, d_model // cross_heads wide; null is n_heads",
    )

    @property
    def hidden(self) -> int:
        return self.d_ff or swiglu_width(self.d_model)

    @property
    def cross_width(self) -> int:
        """Width of all heads of cross-attention together."""
        heads = self.cross_heads or self.n_heads
        return self.d_model // heads * heads


class EncoderConfig(LocalConfig):
    """The local encoder: bytes to patch vectors."""

    cross_attention: Literal["none", "last", "all"] = Field(
        "last",
        description="after which blocks the patches attend to their bytes; none: they are pooled from the last",
    )
    queries: Literal["states", "embeddings", "learned"] = Field(
        "states",
        description="what patches ask with at first: pooled byte states, pooled byte embeddings, or the same learned vectors for all",
    )
    pooling: tuple[Literal["max", "mean", "min"], ...] = Field(
        ("max",), min_length=1, description="how bytes are pooled; several are laid side by side"
    )


class DecoderConfig(LocalConfig):
    """The local decoder: patch vectors to bytes."""

    n_layers: int = Field(9, gt=0, description="blocks")
    cross_attention: Literal["none", "first", "all"] = Field(
        "all",
        description="before which blocks bytes attend to their patch; none: its vector is added at the start",
    )


class LatentConfig(Section):
    """The global transformer over patches."""

    n_layers: int = Field(25, gt=0, description="blocks")
    d_model: int = Field(2048, gt=0, description="width")
    n_heads: int = Field(16, gt=0, description="query heads")
    n_kv_heads: int | None = Field(None, gt=0, description="key and value heads; null is n_heads")
    head_dim: int | None = Field(
        None, gt=0, description="width of a head; null is d_model / n_heads"
    )
    d_ff: int | None = Field(
        None, gt=0, description="hidden width of the SwiGLU; null is 8/3 d_model, rounded up to 256"
    )
    norm: Literal["pre", "reordered"] = Field(
        "pre", description="where the norms stand: pre (BLT, Llama) or reordered (OLMo 2)"
    )
    qk_norm: Literal["none", "full", "head"] = Field(
        "none", description="RMS norm of queries and keys; full for OLMo 2"
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square")
    rope_theta: float = Field(500_000.0, gt=0, description="base of the rotary wavelengths")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="Llama 3 stretching of the wavelengths"
    )
    start_from: str | None = Field(
        None,
        description="run or checkpoint of a transformer whose blocks this one starts with (byte-ifying)",
    )
    lr_scale: float = Field(
        1.0, gt=0, description="factor on the learning rate of the latent blocks; 0.1 byte-ifying"
    )

    @property
    def hidden(self) -> int:
        return self.d_ff or swiglu_width(self.d_model)


class Config(Section):
    """A Byte Latent Transformer over packed documents."""

    family: Literal["blt"] = Field("blt", description="module under weft.models")
    vocab_size: Literal[260] = Field(260, description="256 bytes and 4 special ids")
    formulation: Literal["parity", "paper"] = Field(
        "parity",
        description="where paper and released code differ: values that are left out follow the code (parity) or the paper",
    )
    double_residual: bool = Field(
        True,
        description="cross-attention adds its input twice, as in the released models",
    )
    patch_vectors: int = Field(
        2, gt=0, description="vectors a patch has in cross-attention, the paper's k"
    )
    window: int | None = Field(
        512,
        gt=0,
        description="bytes that each byte attends to, itself among them; null is its whole document so far",
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square; encoder and decoder")
    rope_theta: float = Field(
        500_000.0, gt=0, description="base of the rotary wavelengths; encoder and decoder"
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = Field(
        "auto", description="backend of self-attention; auto picks by device"
    )
    pad_patches: bool = Field(
        False,
        description="fill up to the room for patches on the CPU too, for shapes that never change; a GPU always does",
    )
    patching: PatchingConfig = Field(..., description="where patches start")
    ngram: NgramConfig | None = Field(
        NgramConfig(), description="hashed byte n-gram embeddings; null is none"
    )
    encoder: EncoderConfig = Field(EncoderConfig(), description="bytes to patches")
    latent: LatentConfig = Field(LatentConfig(), description="the transformer over patches")
    decoder: DecoderConfig = Field(DecoderConfig(), description="patches to bytes")

    @model_validator(mode="before")
    @classmethod
    def _follow_formulation(cls, data: Any) -> Any:
        """Fill in what the formulation decides, so that a saved configuration says it all."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for section, values in FORMULATIONS.get(data.get("formulation", "parity"), {}).items():
            given = data if not section else data.get(section, {})
            if isinstance(given, dict):
                filled = {**values, **given}
                data = filled if not section else {**data, section: filled}
        return data

    @model_validator(mode="after")
    def _check_shapes(self) -> Config:
        for name in ("encoder", "latent", "decoder"):
            try:
                self.stack(name)
            except ValueError as error:
                message = str(error).partition("Value error, ")[2].partition(" [type=")[0]
                raise ValueError(f"{name}: {message}") from None
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            heads = part.cross_heads or part.n_heads
            if heads > part.d_model:
                raise ValueError(
                    f"{name}: {heads} cross_heads are more than d_model {part.d_model}"
                )
        if self.encoder.queries == "learned" and self.encoder.cross_attention == "none":
            raise ValueError("encoder: queries=learned needs cross_attention=last or all")
        return self

    # Parts as transformer settings: the blocks are that family's.

    def stack(self, name: str) -> TransformerConfig:
        """Settings of the blocks of `encoder`, `latent` or `decoder`."""
        part: Any = getattr(self, name)
        shared: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "n_layers": part.n_layers,
            "d_model": part.d_model,
            "n_heads": part.n_heads,
            "d_ff": part.hidden,
            "attention": self.attention,
        }
        if name == "latent":
            keys = ("n_kv_heads", "head_dim", "norm", "qk_norm", "norm_eps", "rope_theta")
            shared |= {key: getattr(part, key) for key in (*keys, "rope_scaling")}
        else:
            shared |= {"norm": "pre", "qk_norm": "none", "window": self.window}
            shared |= {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
        if name == "encoder":
            shared["ngram"] = self.ngram
        return TransformerConfig(**shared)

    @property
    def cross_layers(self) -> tuple[int, int]:
        """Cross-attention layers of encoder and decoder."""
        counts = {"none": 0, "last": 1, "first": 1}
        return (
            counts.get(self.encoder.cross_attention, self.encoder.n_layers),
            counts.get(self.decoder.cross_attention, self.decoder.n_layers),
        )

    @property
    def patch_sources(self) -> int:
        """States of the encoder that patches are made from: what each cross-attention reads, or what is pooled, and
        embeddings where those are pooled."""
        is_apart = self.encoder.queries == "embeddings" and self.encoder.cross_attention != "none"
        return max(1, self.cross_layers[0]) + is_apart

    def for_generation(self) -> Self:
        """Where training read patches that lie with its data, generation makes them."""
        patching = self.patching.model_copy(update={"stored": False})
        return self.model_copy(update={"patching": patching})

    @property
    def pooled_width(self) -> int:
        """Width of a pooled patch."""
        return len(self.encoder.pooling) * self.encoder.d_model

    @property
    def patch_width(self) -> int:
        """Width of what the encoder gives the latent transformer for a patch."""
        if self.encoder.cross_attention == "none":
            return self.pooled_width
        return self.patch_vectors * self.encoder.d_model

    @property
    def read_vectors(self) -> int:
        """Vectors of a patch that bytes of the decoder read."""
        return 1 if self.decoder.cross_attention == "none" else self.patch_vectors

    @property
    def table_width(self) -> int:
        """Values in a row of the n-gram tables."""
        return self.encoder.d_model

    @property
    def patch_size(self) -> float:
        """Mean bytes a patch that sizes and FLOPs are reckoned with where nothing was measured."""
        patching = self.patching
        if patching.patch_size is not None:
            return patching.patch_size
        if patching.scheme == "stride":
            return float(patching.stride or 1)
        return SPACE_PATCH_SIZE if patching.scheme == "space" else USUAL_PATCH_SIZE

    # Counts

    def count_parameters(self) -> dict[str, int]:
        """Exact parameter counts by part, without the entropy model; the values add up to the network.

        `blocks` are the layers of all three stacks with their cross-attentions; `count_stages` splits them.
        """
        stages = self.count_stages()
        blocks = sum(stages[f"{name}_blocks"] for name in ("encoder", "latent", "decoder"))
        return {
            "embedding": self.vocab_size * self.encoder.d_model,
            "ngram_tables": self._table_parameters(),
            "blocks": blocks,
            "projections": stages["projections"],
            "final_norm": self.decoder.d_model,
            "head": self.vocab_size * self.decoder.d_model,
        }

    def count_stages(self) -> dict[str, int]:
        """Parameters of the layers of each stack, cross-attention included, and of what lies between the stacks."""
        encoder, latent, decoder = self.encoder, self.latent, self.decoder
        own = {
            name: self.stack(name).count_parameters()["blocks"]
            for name in ("encoder", "latent", "decoder")
        }
        for (name, part), layers in zip(
            (("encoder", encoder), ("decoder", decoder)), self.cross_layers, strict=True
        ):
            own[name] += layers * cross_parameters(part)
        queries = 0
        if encoder.cross_attention != "none":
            size = self.patch_vectors * encoder.d_model
            queries = size if encoder.queries == "learned" else self.pooled_width * size
        to_latent = 0 if self.patch_width == latent.d_model else self.patch_width * latent.d_model
        to_bytes = latent.d_model * self.read_vectors * decoder.d_model
        widen = 0 if encoder.d_model == decoder.d_model else encoder.d_model * decoder.d_model
        return {
            **{f"{name}_blocks": count for name, count in own.items()},
            "projections": queries + to_latent + to_bytes + widen,
        }

    def _table_parameters(self) -> int:
        if self.ngram is None:
            return 0
        tables = len(self.ngram.sizes) * self.ngram.hash_functions
        return tables * self.ngram.rows * self.table_width

    # FLOPs

    def forward_flops_per_byte(self, context_bytes: int, patch_size: float) -> dict[str, float]:
        """FLOPs of a forward pass for one byte, by part, as the paper counts them (equations 13 to 17).

        `local` (encoder and decoder), `cross_attention`, `latent`, `head`, and `entropy_model`, which the paper leaves out;
        lookups are free.

        Args:
            context_bytes: length of a sample.
            patch_size: mean bytes a patch.
        """
        flops = forward_flops(self, context_bytes, patch_size)
        entropy = self.patching.entropy
        flops["entropy_model"] = 0.0
        if self.patching.needs_entropy and entropy is not None:
            seen = min(context_bytes, entropy.window or context_bytes)
            flops["entropy_model"] = transformer_flops(
                entropy.d_model, entropy.n_layers, seen, entropy.vocab_size
            )
        return flops

    def flops_per_byte(
        self, context_bytes: int, patch_size: float, *, entropy_model: bool = True
    ) -> float:
        """Training FLOPs of one byte: three forward passes' worth, and the entropy model's forward pass."""
        flops = self.forward_flops_per_byte(context_bytes, patch_size)
        entropy = flops.pop("entropy_model")
        return 3 * sum(flops.values()) + (entropy if entropy_model else 0.0)

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one byte at the expected patch size, as this run spends them: with the entropy model where
        patches are made on the fly."""
        return self.flops_per_byte(
            sequence_length, self.patch_size, entropy_model=not self.patching.stored
        )

    def debug_size(self) -> Config:
        """The smallest model that still runs every part of this one, for `weft debug RECIPE`.

        At most 2 blocks a stack, at most 64 wide with heads of 16, tables of 4096 rows. Cross-attention, k, norms and the
        formulation are kept, and so are patching and its entropy model where that exists; without it a stride of about
        the same patch size stands in. No transformer has to be there to start from.
        """
        small = self.model_dump()
        small["latent"]["start_from"] = None
        patching = self.patching
        if patching.needs_entropy and not Path(patching.entropy_model or "").exists():
            small["patching"] = {"scheme": "stride", "stride": max(1, round(self.patch_size))}
        for name in ("encoder", "latent", "decoder"):
            stack = self.stack(name).model_copy(update={"ngram": None}).debug_size()
            keys = ["n_layers", "d_model", "n_heads", "d_ff"]
            keys += ["n_kv_heads", "head_dim"] if name == "latent" else []
            small[name] |= {key: getattr(stack, key) for key in keys}
            if name != "latent":
                small[name]["cross_heads"] = None
        if self.patch_width == self.latent.d_model:
            small["latent"]["d_model"] = self.patch_vectors * small["encoder"]["d_model"]
        if self.ngram:
            small["ngram"]["rows"] = min(self.ngram.rows, DEBUG_TABLE_ROWS)
        return Config(**small)

    def ngram_init_std(self) -> float:
        assert self.ngram is not None
        return self.ngram.init_std or self.table_width**-0.5


def cross_parameters(part: LocalConfig) -> int:
    """Parameters of one cross-attention layer: four projections and two norms."""
    return 4 * part.d_model * part.cross_width + 2 * part.d_model
