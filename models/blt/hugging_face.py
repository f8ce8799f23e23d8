"""Names, shapes and settings of Hugging Face's Blt checkpoints, both ways; the entropy model, their patcher, included.

Imports no torch and no transformers. Settings are in hugging_face_config.py. They turn neighbouring channels of a head by the rotary angles, we turn its
halves: the rows of query and key projections are reordered on the way, which changes no logit. Names of the entropy
model's parameters begin with `entropy/`: its weights are a run of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..transformer.config import Config as TransformerConfig
from ..transformer.hugging_face import block_names
from ..transformer.hugging_face import parameter_shapes as transformer_shapes
from .config import Config
from .hugging_face_config import (
    check_exportable,
    from_hugging_face_config,
    longest_positions,
    to_hugging_face_config,
)
from .shapes import parameter_shapes as own_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MODEL_TYPES",
    "READS_BYTES",
    "arrange",
    "check_exportable",
    "companion_runs",
    "companions",
    "from_hugging_face_config",
    "from_hugging_face_name",
    "longest_positions",
    "parameter_shapes",
    "to_hugging_face_config",
    "to_hugging_face_name",
    "with_companions",
]

MODEL_TYPES = ("blt",)
READS_BYTES = True
ENTROPY = "entropy/"

# Ours -> theirs.
_OUTSIDE = {
    "embedding.tokens.weight": "model.local_encoder.embed_tokens.weight",
    "embedding.ngrams.weight": "model.encoder_hash_tok_embedding.weight",
    "encoder.query_proj.weight": "model.local_encoder.patch_embedding_projection.weight",
    "latent.input_proj.weight": "model.global_transformer.token_embedding_projection.weight",
    "decoder.latent_proj.weight": "model.local_decoder.patch_embedding_projection.weight",
    "decoder.norm.weight": "model.local_decoder.norm.weight",
    "head.weight": "lm_head.weight",
    "entropy/embedding.tokens.weight": "model.patcher.embed_tokens.weight",
    "entropy/norm.weight": "model.patcher.norm.weight",
    "entropy/head.weight": "model.patcher.lm_head.weight",
}
_STACKS = {
    "encoder.": "model.local_encoder.",
    "latent.": "model.global_transformer.",
    "decoder.": "model.local_decoder.",
    ENTROPY: "model.patcher.",
}
_CROSS = {
    **{f"{part}.weight": f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "q_norm.weight": "q_norm.weight",
    "kv_norm.weight": "k_norm.weight",
}
_BLOCK = block_names("pre")


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter by our name, the entropy model's after the network's own."""
    shapes = own_shapes(config)
    for name, model in companions(config).items():
        shapes |= {f"{name}/{own}": shape for own, shape in transformer_shapes(model).items()}
    return shapes


def companions(config: Config) -> dict[str, TransformerConfig]:
    """Networks whose weights are runs of their own, by the first word of their parameters' names."""
    patching = config.patching
    return {"entropy": patching.entropy} if patching.needs_entropy and patching.entropy else {}


def companion_runs(config: Config) -> dict[str, str]:
    """Where the companions' weights are."""
    return {name: str(config.patching.entropy_model) for name in companions(config)}


def with_companions(config: Config, runs: Mapping[str, str]) -> Config:
    """The configuration with the companions' weights at these places."""
    if "entropy" not in runs:
        return config
    patching = config.patching.model_copy(update={"entropy_model": runs["entropy"]})
    return config.model_copy(update={"patching": patching})


def to_hugging_face_name(name: str, config: Config) -> str:
    """Their name of our parameter.

    Raises:
        ConfigError: their layout has no place for it.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = re.fullmatch(
        r"(encoder\.|latent\.|decoder\.|entropy/)(blocks|cross)\.(\d+)\.(.+)", name
    )
    if found:
        stack, kind, layer, inner = found.groups()
        table, folder = (_BLOCK, "layers") if kind == "blocks" else (_CROSS, "cross_attn_layers")
        if inner in table:
            return f"{_STACKS[stack]}{folder}.{layer}.{table[inner]}"
    raise ConfigError(f"{name} has no place in a Hugging Face Blt checkpoint")


def from_hugging_face_name(name: str, config: Config) -> str | None:
    """Our name of their parameter; None for what is not a parameter.

    Raises:
        ConfigError: an unknown name.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return None
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    if name in outside:
        return outside[name]
    for stack, prefix in _STACKS.items():
        found = re.fullmatch(rf"{re.escape(prefix)}(layers|cross_attn_layers)\.(\d+)\.(.+)", name)
        if found:
            kind, layer, inner = found.groups()
            table, folder = (_BLOCK, "blocks") if kind == "layers" else (_CROSS, "cross")
            ours = {theirs: own for own, theirs in table.items()}
            if inner in ours:
                return f"{stack}{folder}.{layer}.{ours[inner]}"
    raise ConfigError(
        f"tensor {name!r} is not one a Blt checkpoint has; is config.json of the same model?"
    )


def arrange(name: str, tensor: Tensor, config: Config, *, to_theirs: bool) -> Tensor:
    """Rows of a self-attention's query or key projection in the other order of a head's channels."""
    found = re.fullmatch(r"(.+?)[./]blocks\.\d+\.attention\.[qk]_proj\.weight", name)
    if found is None:
        return tensor
    stack = found.group(1)
    model = companions(config)[stack] if stack == "entropy" else config.stack(stack)
    half = model.head_width // 2
    sizes = (-1, 2, half) if to_theirs else (-1, half, 2)
    return tensor.unflatten(0, sizes).transpose(1, 2).flatten(0, 2).contiguous()
