"""Settings of Hugging Face's Blt, both ways; what their class, or ours, cannot express is refused. Imports no torch.

Theirs are read with the defaults of their classes, because a saved config.json leaves out what has its default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..transformer.config import Config as TransformerConfig
from .config import Config

__all__ = [
    "check_exportable",
    "from_hugging_face_config",
    "longest_positions",
    "to_hugging_face_config",
]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patching_threshold": 1.335442066192627,
        "max_patch_length": None,
        "local_attention_window_len": 512,
        "cross_attn_k": 2,
        "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
        "encoder_hash_byte_group_vocab": 500002,
        "encoder_hash_byte_group_nb_functions": 1,
        "vocab_size": 260,
        "tie_word_embeddings": False,
    },
    "encoder_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "cross_attn_all_layers": False,
        "max_position_embeddings": 24576,
        "rope_theta": 500000.0,
    },
    "global_config": {
        "hidden_size": 2048,
        "num_hidden_layers": 25,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
        "rope_theta": 500000.0,
    },
    "decoder_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 9,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "cross_attn_all_layers": True,
        "rope_theta": 500000.0,
    },
    "patcher_config": {
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "sliding_window": 512,
        "rope_theta": 10000.0,
    },
}
_SHARED_DEFAULTS = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "dropout": 0.0}


def longest_positions(theirs: Mapping[str, Any]) -> int | None:
    """Bytes their model is said to take."""
    return int(_Settings(theirs)["encoder_config"]["max_position_embeddings"])


def check_exportable(config: Config) -> str:
    """The Hugging Face class that has this function, `Blt`.

    Raises:
        ConfigError: it cannot express the configuration.
    """
    for key, found, wanted in _limits(config):
        if found != wanted:
            raise ConfigError(
                f"model.{key} is {found!r}; Hugging Face's Blt has {wanted!r} there, so the model cannot be exported"
            )
    return "Blt"


def _limits(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, the one that their class has)."""
    encoder, latent, decoder, patching = (
        config.encoder,
        config.latent,
        config.decoder,
        config.patching,
    )
    yield "patching.scheme", patching.scheme, "entropy"
    yield "patching.forced_starts", patching.forced_starts, 2
    yield "patching.newline_reset", patching.newline_reset, "off"
    yield "double_residual", config.double_residual, True
    yield "ngram", config.ngram and "tables", "tables"
    if config.ngram:
        yield "ngram.oldest_first", config.ngram.oldest_first, True
        yield "ngram.short_windows", config.ngram.short_windows, "pad"
        yield "ngram.average", config.ngram.average, False
    yield "encoder.queries", encoder.queries, "states"
    yield "encoder.pooling", encoder.pooling, ("max",)
    # With several layers they pool patches anew at each, where the released code pools once.
    is_same = encoder.cross_attention == "all" and encoder.n_layers == 1
    yield "encoder.cross_attention", "last" if is_same else encoder.cross_attention, "last"
    if decoder.cross_attention == "none":
        yield "decoder.cross_attention", "none", "all"
    yield "decoder.d_model", decoder.d_model, encoder.d_model
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        yield f"{name}.cross_heads", part.cross_heads or part.n_heads, part.n_heads
    yield "latent.norm", latent.norm, "pre"
    yield "latent.qk_norm", latent.qk_norm, "none"
    yield "latent.rope_scaling", latent.rope_scaling, None
    yield "latent.head_dim", config.stack("latent").head_width, latent.d_model // latent.n_heads
    if patching.entropy:
        entropy = patching.entropy
        yield "patching.entropy.norm", entropy.norm, "pre"
        yield "patching.entropy.qk_norm", entropy.qk_norm, "none"
        yield "patching.entropy.ngram", entropy.ngram, None
        yield "patching.entropy.tie_embeddings", entropy.tie_embeddings, False
        yield "patching.entropy.rope_scaling", entropy.rope_scaling, None


def to_hugging_face_config(
    config: Config,
    *,
    max_positions: int,
    eos_id: int | None,
    bos_id: int | None,
    pad_id: int | None,
    dtype: str,
) -> dict[str, Any]:
    """A complete config.json.

    Args:
        max_positions: most bytes the model is said to take.

    Raises:
        ConfigError: their class cannot express the configuration.
    """
    check_exportable(config)
    ngram, patching = config.ngram, config.patching
    assert ngram is not None
    assert patching.entropy is not None
    shared = {"cross_attn_k": config.patch_vectors, "hidden_size_global": config.latent.d_model}
    encoder, decoder = (
        {
            **_their_stack(config.stack(name), max_positions),
            **shared,
            "cross_attn_all_layers": getattr(config, name).cross_attention == "all",
        }
        for name in ("encoder", "decoder")
    )
    encoder["sliding_window"] = config.window
    patcher = _their_stack(patching.entropy, max_positions)
    patcher["sliding_window"] = patching.entropy.window
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "bos_token_id": bos_id,
        "cross_attn_k": config.patch_vectors,
        "decoder_config": decoder,
        "dtype": dtype,
        "encoder_config": encoder,
        "encoder_hash_byte_group_nb_functions": ngram.hash_functions,
        "encoder_hash_byte_group_size": list(ngram.sizes),
        "encoder_hash_byte_group_vocab": ngram.rows,
        "eos_token_id": eos_id,
        "global_config": _their_stack(config.stack("latent"), max_positions),
        "initializer_range": 0.02,
        "local_attention_window_len": config.window,
        "max_patch_length": patching.max_length,
        "max_position_embeddings": max_positions,
        "pad_token_id": pad_id,
        "patch_in_forward": True,
        "patch_size": round(config.patch_size),
        "patcher_config": patcher,
        "patching_batch_size": 1,
        "patching_mode": "entropy",
        "patching_threshold": patching.threshold,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        # Their cache hashes and patches the newest byte alone.
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }


def _their_stack(stack: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {
        "hidden_size": stack.d_model,
        "intermediate_size": stack.d_ff,
        "max_position_embeddings": max_positions,
        "num_attention_heads": stack.n_heads,
        "num_hidden_layers": stack.n_layers,
        "num_key_value_heads": stack.kv_heads,
        "rms_norm_eps": stack.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},
    }


def from_hugging_face_config(theirs: Mapping[str, Any]) -> Config:
    """Our settings for their config.json; the entropy model's place is filled in by `with_companions`.

    Raises:
        ConfigError: a setting ours does not have.
    """
    settings = _Settings(theirs)
    top = settings[""]
    for key, wanted in (
        ("patching_mode", "entropy"),
        ("patch_in_forward", True),
        ("tie_word_embeddings", False),
        ("vocab_size", 260),
    ):
        if top[key] != wanted:
            raise ConfigError(
                f"config.json has {key}={top[key]!r}; only {wanted!r} can be imported"
            )
    encoder, latent, decoder = (
        settings[f"{name}_config"] for name in ("encoder", "global", "decoder")
    )
    for key in ("rms_norm_eps", "rope_theta"):
        if encoder[key] != decoder[key]:
            raise ConfigError(
                f"config.json has {key}={encoder[key]!r} in encoder_config and {decoder[key]!r} in decoder_config; "
                "only equal ones can be imported"
            )
    if encoder["cross_attn_all_layers"] and encoder["num_hidden_layers"] > 1:
        raise ConfigError(
            "config.json has cross_attn_all_layers in an encoder of several layers, where Hugging Face pools patches anew at "
            "each and the released code does not; only the last layer's cross-attention can be imported"
        )
    try:
        return Config.model_validate(_our_settings(top, encoder, latent, decoder, settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"config.json cannot be imported: {where}: {first['msg']}") from error


def _our_settings(
    top: dict[str, Any],
    encoder: dict[str, Any],
    latent: dict[str, Any],
    decoder: dict[str, Any],
    settings: _Settings,
) -> dict[str, Any]:
    patcher = settings["patcher_config"]
    return {
        "family": "blt",
        "patch_vectors": top["cross_attn_k"],
        "window": top["local_attention_window_len"],
        "norm_eps": encoder["rms_norm_eps"],
        "rope_theta": encoder["rope_theta"],
        "patching": {
            "scheme": "entropy",
            "threshold": top["patching_threshold"],
            "max_length": top["max_patch_length"],
            "entropy_model": "entropy",
            "entropy": {
                **_our_stack(patcher),
                "vocab_size": 260,
                "norm": "pre",
                "qk_norm": "none",
                "norm_eps": patcher["rms_norm_eps"],
                "rope_theta": patcher["rope_theta"],
                "window": patcher["sliding_window"],
                "z_loss": 0.0,
            },
        },
        "ngram": {
            "sizes": tuple(top["encoder_hash_byte_group_size"]),
            "rows": top["encoder_hash_byte_group_vocab"],
            "hash_functions": top["encoder_hash_byte_group_nb_functions"],
        },
        "encoder": {**_our_stack(encoder), "cross_attention": "last"},
        "latent": {
            **_our_stack(latent),
            "norm_eps": latent["rms_norm_eps"],
            "rope_theta": latent["rope_theta"],
            "n_kv_heads": latent.get("num_key_value_heads"),
        },
        "decoder": {
            **_our_stack(decoder),
            "cross_attention": "all" if decoder["cross_attn_all_layers"] else "first",
        },
    }


def _our_stack(theirs: Mapping[str, Any]) -> dict[str, Any]:
    width = theirs["hidden_size"]
    return {
        "n_layers": theirs["num_hidden_layers"],
        "d_model": width,
        "n_heads": theirs["num_attention_heads"],
        "d_ff": theirs.get("intermediate_size") or int(8 * width / 3),
    }


class _Settings:
    """Their config.json with what it leaves out, by section (`""` is the top)."""

    def __init__(self, theirs: Mapping[str, Any]) -> None:
        self._theirs = theirs

    def __getitem__(self, section: str) -> dict[str, Any]:
        given = self._theirs if not section else self._theirs.get(section) or {}
        filled = {**_DEFAULTS[section], **given}
        if not section:
            return filled
        filled = {**_SHARED_DEFAULTS, **filled}
        rope = filled.get("rope_parameters") or filled.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"config.json has rope type {rope['rope_type']!r} in {section}; only default can be imported"
            )
        filled["rope_theta"] = rope.get("rope_theta", filled["rope_theta"])
        heads, keys = filled["num_attention_heads"], filled.get("num_key_value_heads")
        for key, found, wanted in (
            ("hidden_act", filled["hidden_act"], "silu"),
            ("dropout", filled["dropout"] or 0.0, 0.0),
            ("num_key_value_heads", heads if section == "global_config" else keys or heads, heads),
        ):
            if found != wanted:
                raise ConfigError(
                    f"config.json has {key}={found!r} in {section}; only {wanted!r} can be imported"
                )
        return filled
