"""Names and settings of Hugging Face checkpoints against what transformers itself writes and what OLMo 2 published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from weft.models import build_task
from weft.models.errors import ConfigError
from weft.models.transformer.config import Config, NgramConfig, RopeScalingConfig
from weft.models.transformer.hugging_face import (
    check_exportable,
    from_hugging_face_config,
    from_hugging_face_name,
    parameter_shapes,
    to_hugging_face_config,
    to_hugging_face_name,
)

TINY: dict[str, Any] = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
LLAMA: dict[str, Any] = {**TINY, "norm": "pre", "qk_norm": "none", "norm_eps": 1e-5, "z_loss": 0.0}
CONFIGS = {
    "olmo2": Config(**TINY, n_kv_heads=4, head_dim=8),
    "olmo2 grouped": Config(**TINY, n_kv_heads=2, head_dim=8, rope_theta=10000.0),
    "llama": Config(**LLAMA, n_kv_heads=4, head_dim=8),
    "llama wide heads": Config(**LLAMA, n_kv_heads=1, head_dim=16),
    "llama stretched tied": Config(
        **LLAMA,
        n_kv_heads=2,
        head_dim=8,
        tie_embeddings=True,
        rope_scaling=RopeScalingConfig(factor=32.0, original_max_positions=128),
    ),
}


def to_theirs(config: Config) -> dict[str, Any]:
    return to_hugging_face_config(
        config, max_positions=4096, eos_id=2, bos_id=1, pad_id=3, dtype="float32"
    )


def their_model(config: Config) -> torch.nn.Module:
    import transformers

    settings = transformers.AutoConfig.for_model(**to_theirs(config))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_transformers_own(name: str) -> None:
    config = CONFIGS[name]
    theirs = {k: tuple(v.shape) for k, v in their_model(config).named_parameters()}
    mapped = {to_hugging_face_name(k, config): v for k, v in parameter_shapes(config).items()}
    assert mapped == theirs


@pytest.mark.parametrize("config", [*CONFIGS.values(), Config(**TINY, ngram=NgramConfig(rows=97))])
def test_shapes_are_those_of_the_model(config: Config) -> None:
    with torch.device("meta"):
        network = build_task(config).build_networks()["model"]
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert parameter_shapes(config) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_transformers(name: str) -> None:
    """Ours to theirs, through transformers' own classes and file, and back."""
    config = CONFIGS[name]
    through = their_model(config).config.to_dict()
    assert from_hugging_face_config(through) == config
    assert through["rope_parameters"]["rope_theta"] == config.rope_theta


def test_config_names_every_field_of_the_class() -> None:
    import transformers

    inherited = set(transformers.PretrainedConfig().to_dict())
    for config, kind in ((CONFIGS["olmo2"], "Olmo2"), (CONFIGS["llama"], "Llama")):
        own = set(getattr(transformers, f"{kind}Config")().to_dict()) - inherited
        assert own <= set(to_theirs(config))


def test_reads_both_generations_of_rope() -> None:
    common = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    stretch = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = from_hugging_face_config({**common, "rope_theta": 5e5, "rope_scaling": stretch})
    new = from_hugging_face_config({**common, "rope_parameters": {**stretch, "rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScalingConfig()
    # What a file leaves out has the class's value, as in transformers.
    bare = from_hugging_face_config(common)
    assert (bare.rope_theta, bare.norm_eps, bare.kv_heads) == (10000.0, 1e-6, 4)
    assert from_hugging_face_config({**common, "model_type": "olmo2"}).norm_eps == 1e-5


OLMO_CORE = {
    "embeddings.weight": "embedding.tokens.weight",
    "blocks.1.attention.w_q.weight": "blocks.1.attention.q_proj.weight",
    "blocks.1.attention.w_k.weight": "blocks.1.attention.k_proj.weight",
    "blocks.1.attention.w_v.weight": "blocks.1.attention.v_proj.weight",
    "blocks.1.attention.w_out.weight": "blocks.1.attention.o_proj.weight",
    "blocks.1.attention.q_norm.weight": "blocks.1.attention.q_norm.weight",
    "blocks.1.attention.k_norm.weight": "blocks.1.attention.k_norm.weight",
    "blocks.1.attention_norm.weight": "blocks.1.attention_norm.weight",
    "blocks.1.feed_forward.w1.weight": "blocks.1.mlp.gate_proj.weight",
    "blocks.1.feed_forward.w3.weight": "blocks.1.mlp.up_proj.weight",
    "blocks.1.feed_forward.w2.weight": "blocks.1.mlp.down_proj.weight",
    "blocks.1.feed_forward_norm.weight": "blocks.1.mlp_norm.weight",
    "lm_head.norm.weight": "norm.weight",
    "lm_head.w_out.weight": "head.weight",
}


def test_olmo_core_names() -> None:
    config = CONFIGS["olmo2"]
    assert {k: from_hugging_face_name(k, config) for k in OLMO_CORE} == OLMO_CORE
    layer = [name for name in parameter_shapes(config) if not name.startswith("blocks.0")]
    assert sorted(OLMO_CORE.values()) == sorted(layer)


def test_names_that_are_no_parameters() -> None:
    assert (
        from_hugging_face_name("model.layers.0.self_attn.rotary_emb.inv_freq", CONFIGS["llama"])
        is None
    )
    assert from_hugging_face_name("lm_head.weight", CONFIGS["llama stretched tied"]) is None
    with pytest.raises(ConfigError, match="att_proj"):
        from_hugging_face_name("transformer.blocks.0.att_proj.weight", CONFIGS["olmo2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None, "model": {"d_model": 8}}, "config.json is OLMo-core's own"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"hidden_size": "wide"}, "d_model.*'wide'"),
        ({"num_attention_heads": 5, "head_dim": None}, "multiple of n_heads"),
    ],
)
def test_what_cannot_be_imported_is_named(change: dict[str, Any], message: str) -> None:
    theirs = {**to_theirs(CONFIGS["olmo2"]), **change}
    with pytest.raises(ConfigError, match=message) as raised:
        from_hugging_face_config(theirs)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_exported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.ngram"):
        check_exportable(Config(**TINY, ngram=NgramConfig(rows=97)))
    with pytest.raises(ConfigError, match="qk_norm=head"):
        check_exportable(Config(**TINY, qk_norm="head"))
    with pytest.raises(ConfigError, match=r"embedding\.ngrams"):
        to_hugging_face_name("embedding.ngrams.weight", CONFIGS["olmo2"])
