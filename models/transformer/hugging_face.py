"""Names, shapes and settings of Hugging Face's Olmo2 and Llama checkpoints, both ways; on import also OLMo-core names, and
the Llama inside a LLaVA.

Imports no torch and no transformers: a checkpoint is safetensors files and a config.json. No weight is
permuted, since both sides use the half-split rotation. The reading and writing is in `trainer/convert.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..hugging_face_plain import arrange, companion_runs, companions, with_companions
from . import vision_language
from .config import Config, RopeScalingConfig

if TYPE_CHECKING:
    pass

__all__ = [
    "MODEL_TYPES",
    "READS_BYTES",
    "arrange",
    "block_names",
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

MODEL_TYPES = ("olmo2", "llama", *vision_language.MODEL_TYPES)
READS_BYTES = False

# Ours -> theirs. The two norms of a block are placed, and so called, differently in the two families.
_OUTSIDE = {
    "embedding.tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_INSIDE = {
    **{f"attention.{part}.weight": f"self_attn.{part}.weight" for part in _ATTENTION},
    **{f"mlp.{part}.weight": f"mlp.{part}.weight" for part in _MLP},
}
_NORMS = {
    "reordered": {
        "attention_norm.weight": "post_attention_layernorm.weight",
        "mlp_norm.weight": "post_feedforward_layernorm.weight",
    },
    "pre": {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
    },
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

_CLASSES = {("reordered", "full"): "Olmo2", ("pre", "none"): "Llama"}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What a config.json leaves out has the value of its class, not of the released models.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "olmo2": {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02},
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02},
}
# Settings that would change the function, with the one value that ours has.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "quantization_config": None,
}
_LLAMA3_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def block_names(norm: str) -> dict[str, str]:
    """Their names of a block's parameters by ours, both inside the block."""
    return {**_INSIDE, **_NORMS[norm]}


def longest_positions(theirs: Mapping[str, Any]) -> int | None:
    """Tokens their model is said to take."""
    return vision_language.language_settings(theirs).get("max_position_embeddings")


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by our name, in the model's order, without building it."""
    d, f, vocab = config.d_model, config.d_ff, config.vocab_size
    q, kv = config.n_heads * config.head_width, config.kv_heads * config.head_width
    block: dict[str, tuple[int, ...]] = {
        "attention.q_proj": (q, d),
        "attention.k_proj": (kv, d),
        "attention.v_proj": (kv, d),
        "attention.o_proj": (d, q),
    }
    if config.qk_norm != "none":
        is_full = config.qk_norm == "full"
        block["attention.q_norm"] = (q if is_full else config.head_width,)
        block["attention.k_norm"] = (kv if is_full else config.head_width,)
    block |= {"attention_norm": (d,), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d)}
    block |= {"mlp.down_proj": (d, f), "mlp_norm": (d,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (vocab, d)}
    if config.ngram is not None:
        tables = config.ngram.hash_functions * len(config.ngram.sizes)
        shapes["embedding.ngrams.weight"] = (tables * config.ngram.rows, d)
    for layer in range(config.n_layers):
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (vocab, d)
    return shapes


def to_hugging_face_name(name: str, config: Config) -> str:
    """Their name of our parameter.

    Raises:
        ConfigError: the layout has no place for it (n-gram tables).
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    inner = block_names(config.norm).get(found.group(2)) if found else None
    if found is None or inner is None:
        raise ConfigError(f"{name} has no place in a Hugging Face checkpoint; {_NO_TABLES}")
    return f"model.layers.{found.group(1)}.{inner}"


def from_hugging_face_name(name: str, config: Config) -> str | None:
    """Our name of their parameter, in Hugging Face's or OLMo-core's naming; None for what is not a parameter.

    Raises:
        ConfigError: an unknown name.
    """
    found_name = vision_language.language_name(name)
    if found_name is None:
        return None
    name = found_name
    is_head = name in ("lm_head.weight", "lm_head.w_out.weight")
    if name.endswith("rotary_emb.inv_freq") or (is_head and config.tie_embeddings):
        return None
    outside = {**{theirs: ours for ours, theirs in _OUTSIDE.items()}, **_OLMO_CORE_OUTSIDE}
    if name in outside:
        return outside[name]
    theirs = {v: k for k, v in block_names(config.norm).items()}
    for pattern, table in (
        (r"model\.layers\.(\d+)\.(.+)", theirs),
        (r"blocks\.(\d+)\.(.+)", _OLMO_CORE_INSIDE),
    ):
        found = re.fullmatch(pattern, name)
        if found and found.group(2) in table:
            return f"blocks.{found.group(1)}.{table[found.group(2)]}"
    raise ConfigError(
        f"tensor {name!r} is not one an Olmo2 or Llama checkpoint has; is config.json of the same model?"
    )


_NO_TABLES = "models with hashed n-gram tables (model.ngram) have no Hugging Face class and cannot be exported"


def check_exportable(config: Config) -> str:
    """The Hugging Face family that has this function, `Olmo2` or `Llama`.

    Raises:
        ConfigError: neither can express the configuration.
    """
    if config.ngram is not None:
        raise ConfigError(f"model.ngram is set; {_NO_TABLES}")
    if config.window is not None:
        raise ConfigError(
            f"model.window is {config.window}; Hugging Face's Olmo2 and Llama attend to all positions, so it cannot be exported"
        )
    kind = _CLASSES.get((config.norm, config.qk_norm))
    if kind is None:
        raise ConfigError(
            f"model.norm={config.norm} with model.qk_norm={config.qk_norm} cannot be exported: "
            "Hugging Face has Olmo2 (reordered, full) and Llama (pre, none)"
        )
    return kind


def to_hugging_face_config(
    config: Config,
    *,
    max_positions: int,
    eos_id: int | None,
    bos_id: int | None,
    pad_id: int | None,
    dtype: str,
) -> dict[str, Any]:
    """A complete config.json; the classes' defaults differ from the released models', so nothing is left out.

    Args:
        max_positions: longest sequence the model is said to take.
        eos_id, bos_id, pad_id: special ids of the tokenizer, None where it has none.
        dtype: name of the weights' type, such as `float32`.

    Raises:
        ConfigError: neither Olmo2 nor Llama can express the configuration.
    """
    kind = check_exportable(config)
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
    scaling = _their_scaling(config.rope_scaling)
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    llama_only = {"mlp_bias": False, "pretraining_tp": 1} if kind == "Llama" else {}
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "dtype": dtype,
        "eos_token_id": eos_id,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": max_positions,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": pad_id,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_scaling": scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **llama_only,
    }


def _their_scaling(ours: RopeScalingConfig | None) -> dict[str, Any] | None:
    if ours is None:
        return None
    return {
        "rope_type": "llama3",
        **{their: getattr(ours, our) for our, their in _LLAMA3_SCALING.items()},
    }


def from_hugging_face_config(theirs: Mapping[str, Any]) -> Config:
    """Our settings for their config.json (transformers 4 and 5).

    Raises:
        ConfigError: another architecture, a setting ours does not have, or one that is missing.
    """
    theirs = vision_language.language_settings(theirs)
    kind = theirs.get("model_type")
    if kind is None and isinstance(theirs.get("model"), dict):
        raise ConfigError(
            "config.json is OLMo-core's own; put the Hugging Face config.json of the same model beside the weights"
        )
    if kind not in _CLASS_DEFAULTS:
        raise ConfigError(
            f"config.json has model_type {kind!r}; only olmo2 and llama can be imported"
        )
    for key, wanted in _FIXED.items():
        found = theirs.get(key)
        if found is not None and found != wanted:
            raise ConfigError(f"config.json has {key}={found!r}; only {wanted!r} can be imported")
    missing = [key for key in _SIZES if theirs.get(key) is None]
    if missing:
        raise ConfigError(
            f"config.json does not say {missing[0]}; is it the model's own config.json?"
        )
    theirs = {**_CLASS_DEFAULTS[kind], **{k: v for k, v in theirs.items() if v is not None}}
    rope = _read_rope(theirs)
    ours = {
        "vocab_size": theirs["vocab_size"],
        "n_layers": theirs["num_hidden_layers"],
        "d_model": theirs["hidden_size"],
        "n_heads": theirs["num_attention_heads"],
        "n_kv_heads": theirs.get("num_key_value_heads", theirs["num_attention_heads"]),
        "head_dim": theirs.get("head_dim"),
        "d_ff": theirs["intermediate_size"],
        "norm": "reordered" if kind == "olmo2" else "pre",
        "qk_norm": "full" if kind == "olmo2" else "none",
        "norm_eps": theirs["rms_norm_eps"],
        **rope,
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "init_std": theirs["initializer_range"],
        # Not in their file: OLMo 2 was trained with it, Llama without.
        "z_loss": 1e-5 if kind == "olmo2" else 0.0,
    }
    return _validated(ours)


def _validated(ours: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(ours)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where}: {first['msg']}, found {first['input']!r}" if where else first["msg"]
        raise ConfigError(f"config.json cannot be imported: {what}") from error


def _read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our `rope_theta` and `rope_scaling` from transformers 5's rope_parameters or transformers 4's two keys."""
    rope = {"rope_theta": theirs["rope_theta"]}
    rope |= theirs.get("rope_scaling") or {}
    rope |= theirs.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(
            f"config.json has rope type {kind!r}; only default and llama3 can be imported"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"config.json has partial_rotary_factor={rope['partial_rotary_factor']!r}; only 1.0 can be imported"
        )
    scaling = None
    if kind == "llama3":
        missing = [their for their in _LLAMA3_SCALING.values() if rope.get(their) is None]
        if missing:
            raise ConfigError(f"config.json has llama3 rope scaling without {missing[0]}")
        scaling = {our: rope[their] for our, their in _LLAMA3_SCALING.items()}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
