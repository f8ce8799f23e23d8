"""Names and settings of Hugging Face's Olmo2 and Llama checkpoints, both ways; OLMo-core names on import.

Imports no torch and no transformers: a checkpoint is safetensors files and a config.json. No weight is
permuted, since both sides use the half-split rotation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .config import Config

__all__ = ["from_hugging_face_config", "from_hugging_face_name", "to_hugging_face_config", "to_hugging_face_name"]

# Ours -> theirs. The two norms of a block are placed, and so called, differently in the two families.
_OUTSIDE = {
    "embedding.tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INSIDE = {
    **{f"attention.{p}.weight": f"self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{f"mlp.{p}.weight": f"mlp.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")},
}
_NORMS = {
    "reordered": {
        "attention_norm.weight": "post_attention_layernorm.weight",
        "mlp_norm.weight": "post_feedforward_layernorm.weight",
    },
    "pre": {"attention_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"},
}
_OLMO_CORE_OUTSIDE = {
    "embeddings.weight": "embedding.tokens.weight",
    "lm_head.norm.weight": "norm.weight",
    "lm_head.w_out.weight": "head.weight",
}
_OLMO_CORE_INSIDE = {
    "attention.w_q.weight": "attention.q_proj.weight",
    "attention.w_k.weight": "attention.k_proj.weight",
    "attention.w_v.weight": "attention.v_proj.weight",
    "attention.w_out.weight": "attention.o_proj.weight",
    "attention.q_norm.weight": "attention.q_norm.weight",
    "attention.k_norm.weight": "attention.k_norm.weight",
    "attention_norm.weight": "attention_norm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward_norm.weight": "mlp_norm.weight",
}


def to_hugging_face_name(name: str, config: Config) -> str:
    """Their name of our parameter.

    Raises:
        ConfigError: the layout has no place for it (n-gram tables).
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    inner = {**_INSIDE, **_NORMS[config.norm]}.get(found.group(2)) if found else None
    if found is None or inner is None:
        raise ConfigError(f"{name} has no place in a Hugging Face checkpoint; models with model.ngram cannot be exported")
    return f"model.layers.{found.group(1)}.{inner}"


def from_hugging_face_name(name: str, config: Config) -> str | None:
    """Our name of their parameter, in Hugging Face's or OLMo-core's naming; None for what is not a parameter.

    Raises:
        ConfigError: an unknown name.
    """
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
        return None
    outside = {**{theirs: ours for ours, theirs in _OUTSIDE.items()}, **_OLMO_CORE_OUTSIDE}
    if name in outside:
        return outside[name]
    theirs = {v: k for k, v in {**_INSIDE, **_NORMS[config.norm]}.items()}
    for pattern, table in ((r"model\.layers\.(\d+)\.(.+)", theirs), (r"blocks\.(\d+)\.(.+)", _OLMO_CORE_INSIDE)):
        found = re.fullmatch(pattern, name)
        if found and found.group(2) in table:
            return f"blocks.{found.group(1)}.{table[found.group(2)]}"
    raise ConfigError(f"tensor {name!r} is not one an Olmo2 or Llama checkpoint has; is config.json of the same model?")


def to_hugging_face_config(config: Config, *, sequence_length: int, eos_id: int | None, bos_id: int | None, pad_id: int | None, dtype: str) -> dict[str, Any]:
    """A complete config.json; the classes' defaults differ from the released models', so nothing is left out.

    Raises:
        ConfigError: neither Olmo2 nor Llama can express the configuration.
    """
    if config.ngram is not None:
        raise ConfigError("models with hashed n-gram tables (model.ngram) have no Hugging Face class and cannot be exported")
    kinds = {("reordered", "full"): "Olmo2", ("pre", "none"): "Llama"}
    kind = kinds.get((config.norm, config.qk_norm))
    if kind is None:
        raise ConfigError(
            f"norm={config.norm} with qk_norm={config.qk_norm} is neither Olmo2 (reordered, full) nor Llama (pre, none)"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
    old_scaling = None if config.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": sequence_length,
        "mlp_bias": False,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_scaling": old_scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def from_hugging_face_config(theirs: Mapping[str, Any]) -> Config:
    """Our settings for their config.json (transformers 4 and 5).

    Raises:
        ConfigError: another architecture, or a setting ours does not have.
    """
    kind = theirs.get("model_type")
    if kind not in ("olmo2", "llama"):
        raise ConfigError(f"model_type {kind!r} cannot be imported; known: olmo2, llama")
    for key, wanted in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
        if theirs.get(key, wanted) != wanted:
            raise ConfigError(f"config.json has {key}={theirs[key]!r}; only {wanted!r} can be imported")
    old = theirs.get("rope_scaling") or {}
    rope = theirs.get("rope_parameters") or {**old, "rope_theta": theirs.get("rope_theta", 10000.0)}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(f"config.json has rope_type={rope_type!r}; only default and llama3 can be imported")
    scaling = None
    if rope_type == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = {k: rope[k] for k in keys} | {"original_max_positions": rope["original_max_position_embeddings"]}
    is_olmo = kind == "olmo2"
    heads = theirs["num_attention_heads"]
    return Config.model_validate(
        {
            "vocab_size": theirs["vocab_size"],
            "n_layers": theirs["num_hidden_layers"],
            "d_model": theirs["hidden_size"],
            "n_heads": heads,
            "n_kv_heads": theirs.get("num_key_value_heads") or heads,
            "head_dim": theirs.get("head_dim"),
            "d_ff": theirs["intermediate_size"],
            "norm": "reordered" if is_olmo else "pre",
            "qk_norm": "full" if is_olmo else "none",
            "norm_eps": theirs.get("rms_norm_eps", 1e-5 if is_olmo else 1e-6),
            "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10000.0)),
            "rope_scaling": scaling,
            "tie_embeddings": theirs.get("tie_word_embeddings", False),
            "init_std": theirs.get("initializer_range", 0.02),
        }
    )
