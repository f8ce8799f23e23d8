"""Settings, parameter counts and FLOPs of Mixture-of-Transformers, its dense baseline, and LMFusion; imports no torch.

All are one model: a transformer in which any part may have weights of its own for each modality (`split`). With every part
split it is Mixture-of-Transformers (arXiv 2411.04996), with none its dense baseline, and around a frozen language model
(`base`) LMFusion (arXiv 2412.15188), whose ablation names deep (all), shallow (feed-forward only) and dense (none).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from ..multimodal.settings import MultimodalConfig
from ..section import Section
from ..transformer.config import Config as TransformerConfig
from ..transformer.config import RopeScalingConfig

__all__ = ["BaseConfig", "Config", "SplitConfig"]

SHAPE = (
    "vocab_size",
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "norm",
    "qk_norm",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
)
"""Keys that mean the same here and in the transformer family, and that a base decides."""
FREE = ("init_std", "init_cut", "attention")
"""Keys that mean the same and that a base leaves open."""


class SplitConfig(Section):
    """Parts that have weights of their own for each modality; the rest is shared."""

    norm: bool = Field(True, description="norms of blocks and the final one")
    qkv: bool = Field(True, description="queries, keys and values, with their norms")
    o: bool = Field(True, description="output of the attention")
    ffn: bool = Field(True, description="feed-forward")


class BaseConfig(Section):
    """A trained transformer that is the text part: LMFusion."""

    source: str = Field(
        ...,
        description="run folder or checkpoint of a model of family transformer (weft convert import brings others)",
    )
    architecture: TransformerConfig | None = Field(
        None, description="its architecture; null is read from the run source names"
    )
    freeze: bool = Field(
        True,
        description="what is the base's is not trained, and checkpoints name it by its hash instead of holding a copy",
    )
    lr_scale: float = Field(
        1.0,
        gt=0,
        description="freeze: false: factor on the learning rate of what is the base's",
    )
    start_others: bool = Field(
        True, description="modules of other modalities start as copies of the base's"
    )
    train_special: bool = Field(True, description="the table of special_ids is trained")

    takes_model_of: ClassVar[dict[str, str]] = {"architecture": "source"}
    """Keys here that are the `model` section of the run another key names."""
    is_inside: ClassVar[bool] = True
    """That model is a part of this one and is counted with it."""


class Config(MultimodalConfig):
    """A transformer over positions of several modalities, which share one attention."""

    family: Literal["mixture_of_transformers"] = Field(
        "mixture_of_transformers", description="module under weft.models"
    )
    n_layers: int = Field(16, gt=0, description="blocks")
    n_heads: int = Field(16, gt=0, description="query heads")
    n_kv_heads: int | None = Field(None, gt=0, description="key and value heads; null is n_heads")
    head_dim: int | None = Field(
        None, gt=0, description="width of a head; null is d_model / n_heads"
    )
    d_ff: int = Field(5632, gt=0, description="hidden width of the SwiGLU")
    norm: Literal["pre", "reordered"] = Field(
        "pre",
        description="where the norms stand: on sub-layer inputs (Llama), or on their outputs before they are added (OLMo 2, Chameleon 34B, Mixture-of-Transformers)",
    )
    qk_norm: Literal["none", "head", "full"] = Field(
        "head",
        description="RMS norm of queries and keys: none, over a head, or over the whole projection",
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary wavelengths")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="Llama 3 stretching of the wavelengths"
    )
    split: SplitConfig = Field(
        SplitConfig(), description="parts with weights of their own for each modality"
    )
    base: BaseConfig | None = Field(
        None, description="a trained language model that is the text part (LMFusion)"
    )
    image_attention: Literal["bidirectional", "causal"] = Field(
        "bidirectional",
        description="whether patches of a continuous image see all of it; images as codes are causal like text",
    )
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of linears and embeddings at the start"
    )
    init_cut: float = Field(
        3.0, gt=0, description="the start is cut at this many standard deviations"
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = Field(
        "auto",
        description="attention backend; auto picks by device, and flex for images that see themselves on a GPU",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_from_base(cls, data: Any) -> Any:
        """Fill what is left out and the base decides."""
        base = data.get("base") if isinstance(data, dict) else None
        architecture = (
            base.get("architecture") if isinstance(base, dict) else base and base.architecture
        )
        if architecture is None:
            return data
        try:
            theirs = TransformerConfig.model_validate(architecture)
        except ValidationError:
            return data  # The field's own check says what is wrong with it.
        return {**{name: getattr(theirs, name) for name in SHAPE}, **data}

    @model_validator(mode="after")
    def _check_base(self) -> Config:
        if self.base is None:
            return self
        theirs = self.base.architecture
        if theirs is not None:
            for name in ("ngram", "window"):
                if getattr(theirs, name) is not None:
                    raise ValueError(
                        f"the base has {name} set, which routed models do not have; name another one as base.source"
                    )
            for name in SHAPE:
                found, wanted = getattr(self, name), getattr(theirs, name)
                if found != wanted:
                    raise ValueError(
                        f"{name} is {found} but that of the base is {wanted}; leave it out"
                    )
        others = self.id_modalities[1:]
        if others:
            raise ValueError(
                f"a base's vocabulary has no ids of {others[0]}; leave it out of modalities, or give continuous images with model.image"
            )
        return self

    @model_validator(mode="after")
    def _check_shapes(self) -> Config:
        _ = self.dense  # Its own checks are ours.
        return self

    # What follows

    @property
    def dense(self) -> TransformerConfig:
        """The transformer of the same shape without modalities: the text part alone."""
        return TransformerConfig(
            **{name: getattr(self, name) for name in (*SHAPE, *FREE)},
            z_loss=self.z_loss,
            loss_chunk_tokens=self.loss_chunk_tokens,
        )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    def copies(self, part: str) -> int:
        """How many weights a part of `split` has: one for each modality, or one."""
        return len(self.modalities) if getattr(self.split, part) else 1

    def block_parts(self) -> dict[str, int]:
        """Parameters of one block that a position meets, by part of `split`."""
        d, hd, heads, kv = self.d_model, self.head_width, self.n_heads, self.kv_heads
        qk = {"full": (heads + kv) * hd, "head": 2 * hd, "none": 0}[self.qk_norm]
        return {
            "norm": 2 * d,
            "qkv": d * (heads + 2 * kv) * hd + qk,
            "o": heads * hd * d,
            "ffn": 3 * d * self.d_ff,
        }

    def count_parameters(self) -> dict[str, int]:
        """Exact parameter counts by part; the values add up to the model, all modalities and a base's included."""
        block = sum(self.copies(part) * count for part, count in self.block_parts().items())
        shared = self.count_shared_parameters()
        head = shared.pop("head", 0)
        return {
            **shared,
            "blocks": self.n_layers * block,
            "final_norm": self.copies("norm") * self.d_model,
            "head": head,
        }

    def count_frozen(self) -> dict[str, int]:
        """Parameters that are not trained, of blocks and of the rest: the base's, and with `train_special` off that table."""
        if self.base is None:
            return {}
        special = 0 if self.base.train_special else len(self.special_ids) * self.d_model
        if not self.base.freeze:
            return {"blocks": 0, "ends": special}
        counts = self.dense.count_parameters()
        ends = counts["embedding"] + counts["final_norm"] + counts["head"]
        return {"blocks": counts["blocks"], "ends": ends + special}

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one position: those of the dense model, as both papers count them.

        6 a parameter that the position meets and `12*L*H*hd*S`, no causal discount; what a base saves by being frozen is not
        taken off. Patches have no head and ids no stem, in the shares of `image.position_share`.
        """
        met = self.n_layers * sum(self.block_parts().values()) + self.d_model
        attention = 12 * self.n_layers * self.n_heads * self.head_width * sequence_length
        return 6.0 * met + 3 * self.shared_forward_flops() + attention

    def debug_size(self) -> Config:
        """The smallest model that still runs every part of this one, for `weft debug RECIPE`; no base has to be there."""
        small = self.dense.debug_size()
        kept = {name: getattr(small, name) for name in SHAPE}
        return Config(**{**self.model_dump(), **self.shared_debug_size(), **kept, "base": None})
