"""BLT's Hugging Face side: transformers' own logits for the same weights and its own patches, names, settings, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packing import packed
from weft.models.blt import hugging_face as layout
from weft.models.blt.config import Config
from weft.models.blt.patching import make_patches
from weft.models.build import build_task
from weft.models.errors import ConfigError
from weft.models.hugging_face import layout_for, layout_of
from weft.models.transformer.config import Config as TransformerConfig

SIZES: dict[str, Any] = {
    "window": 7,
    "patching": {
        "threshold": 5.2,
        "entropy_model": "entropy",
        "entropy": {
            "vocab_size": 260,
            "n_layers": 2,
            "d_model": 32,
            "n_heads": 2,
            "d_ff": 48,
            "norm": "pre",
            "qk_norm": "none",
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "window": 5,
            "z_loss": 0.0,
        },
    },
    "ngram": {"rows": 97},
    "encoder": {"d_model": 24, "n_heads": 3, "d_ff": 40},
    "latent": {"n_layers": 2, "d_model": 48, "n_heads": 4, "n_kv_heads": 4, "d_ff": 56},
    "decoder": {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_ff": 40},
}
CHOICES: dict[str, dict[str, Any]] = {
    "k fits": {},
    "k is projected, grouped heads": {"patch_vectors": 3, "latent": {"n_kv_heads": 2}},
    "decoder first, whole context": {"decoder": {"cross_attention": "first"}, "window": None},
    "cut patches, two hashes": {
        "patching": {"max_length": 3},
        "ngram": {"sizes": (2, 4), "hash_functions": 2},
    },
}
# The published config values of blt-1b and blt-7b, and how many parameters transformers' classes have with them.
RELEASED: dict[str, dict[str, Any]] = {
    "blt-1b": {"encoder_config": {"intermediate_size": 2816}},
    "blt-7b": {
        "cross_attn_k": 4,
        "encoder_config": {
            "hidden_size": 1280,
            "num_attention_heads": 20,
            "intermediate_size": 3584,
            "cross_attn_k": 4,
            "hidden_size_global": 4096,
        },
        "global_config": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
        },
        "decoder_config": {
            "hidden_size": 1280,
            "num_hidden_layers": 6,
            "num_attention_heads": 20,
            "intermediate_size": 3584,
            "cross_attn_k": 4,
            "hidden_size_global": 4096,
        },
    },
}


def make_config(**changes: Any) -> Config:
    merged = dict(SIZES)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if is_section else value
    return Config(**merged)


def to_theirs(config: Config) -> dict[str, Any]:
    return layout.to_hugging_face_config(
        config, max_positions=1024, eos_id=2, bos_id=1, pad_id=None, dtype="float32"
    )


def their_model(config: Config, device: str = "cpu") -> Any:
    import transformers

    settings = transformers.AutoConfig.for_model(**to_theirs(config))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(settings).eval()


def our_networks(config: Config, theirs: Any) -> dict[str, torch.nn.Module]:
    networks = build_task(config).build_networks()
    for name, value in theirs.state_dict().items():
        ours = layout.from_hugging_face_name(name, config)
        network, _, own = (ours if "/" in ours else f"model/{ours}").partition("/")
        values = layout.arrange(ours, value, config, to_theirs=False)
        networks[network].get_parameter(own).data.copy_(values)
    return networks


@pytest.mark.parametrize("choice", CHOICES)
def test_logits_are_transformers_own(choice: str) -> None:
    config = make_config(**CHOICES[choice])
    theirs = their_model(config)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    networks = our_networks(config, theirs)
    ids = torch.randint(4, 260, (60,))
    ids[0] = 1
    # One byte more for theirs: whether a cut falls behind the last byte is not asked there.
    more = torch.cat((ids, torch.tensor([7])))
    with torch.no_grad():
        entropies, _, _ = theirs.model.patcher(more[None])
        threshold = entropies.quantile(0.61).item()
        theirs.model.config.patching_threshold = threshold
        _, lengths, _ = theirs.model.patcher(
            more[None],
            patch_size=4,
            threshold=threshold,
            max_patch_length=config.patching.max_length,
        )
        patching = config.patching.model_copy(update={"threshold": threshold})
        expected = theirs(more[None], use_cache=False).logits[0, :60]
        batch = packed(ids, [60], 60)
        patches = make_patches(batch, patching, networks["entropy"], 60)
        found = networks["model"](batch, patches, output="logits")
    # One that is not there yet has length 0.
    starts = torch.zeros(62, dtype=torch.bool)
    starts[torch.cat((torch.tensor([0]), lengths[0].cumsum(0)[:-1]))] = True
    assert torch.equal(patches.is_start, starts[:60])
    assert 10 < int(patches.count) < 50
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("choice", CHOICES)
def test_names_and_shapes_are_transformers_own(choice: str) -> None:
    config = make_config(**CHOICES[choice])
    theirs = {k: tuple(v.shape) for k, v in their_model(config, "meta").named_parameters()}
    shapes = layout.parameter_shapes(config)
    assert {layout.to_hugging_face_name(k, config): v for k, v in shapes.items()} == theirs
    back = {layout.from_hugging_face_name(k, config): v for k, v in theirs.items()}
    assert back == shapes


@pytest.mark.parametrize("choice", CHOICES)
def test_config_survives_transformers(choice: str) -> None:
    """Ours to theirs, through transformers' own classes, and back."""
    config = make_config(**CHOICES[choice])
    through = their_model(config, "meta").config.to_dict()
    assert layout.from_hugging_face_config(through) == config


def test_order_of_channels_is_undone() -> None:
    config = make_config()
    for name, shape in layout.parameter_shapes(config).items():
        value = torch.randn(shape)
        there = layout.arrange(name, value, config, to_theirs=True)
        assert torch.equal(layout.arrange(name, there, config, to_theirs=False), value)
        is_turned = ".attention.q_proj" in name or ".attention.k_proj" in name
        assert torch.equal(there, value) != is_turned


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_names_and_shapes(name: str) -> None:
    import transformers

    said = {"model_type": "blt", **RELEASED[name]}
    with torch.device("meta"):
        theirs = transformers.BltForCausalLM(transformers.AutoConfig.for_model(**said))
    config = layout_for(said).from_hugging_face_config(said)
    found = {k: tuple(v.shape) for k, v in theirs.named_parameters()}
    ours = {
        layout.to_hugging_face_name(k, config): v
        for k, v in layout.parameter_shapes(config).items()
    }
    assert ours == found
    with torch.device("meta"):
        networks = build_task(config).build_networks()
    assert sum(p.numel() for n in networks.values() for p in n.parameters()) == sum(
        p.numel() for p in theirs.parameters()
    )
    assert sum(p.numel() for p in networks["entropy"].parameters()) == 99_512_064
    if name == "blt-1b":
        assert sum(config.count_parameters().values()) == 4_533_879_808


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formulation": "paper"}, "model.double_residual is False; Hugging Face's Blt has True"),
        ({"ngram": None}, "model.ngram is None"),
        (
            {"encoder": {"n_layers": 2, "cross_attention": "all"}},
            "model.encoder.cross_attention is 'all'",
        ),
        ({"decoder": {"cross_attention": "none"}}, "model.decoder.cross_attention is 'none'"),
        ({"patching": {"scheme": "space", "threshold": None}}, "model.patching.scheme is 'space'"),
        ({"patching": {"newline_reset": "after"}}, "model.patching.newline_reset is 'after'"),
        ({"decoder": {"cross_heads": 2}}, "model.decoder.cross_heads is 2"),
        ({"latent": {"norm": "reordered"}}, "model.latent.norm is 'reordered'"),
    ],
)
def test_what_transformers_has_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        layout_of(make_config()).check_exportable(make_config(**changes))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patching_mode": "space"}, "config.json has patching_mode='space'; only 'entropy'"),
        (
            {"encoder_config": {"rms_norm_eps": 1e-6}},
            "config.json has rms_norm_eps=1e-06 in encoder_config",
        ),
        (
            {"global_config": {"hidden_act": "gelu"}},
            "config.json has hidden_act='gelu' in global_config",
        ),
        ({"encoder_config": {"num_key_value_heads": 4}}, "config.json has num_key_value_heads=4"),
        (
            {"global_config": {"rope_parameters": {"rope_type": "yarn"}}},
            "config.json has rope type 'yarn' in global_config",
        ),
        (
            {"encoder_config": {"num_hidden_layers": 2, "cross_attn_all_layers": True}},
            "config.json has cross_attn_all_layers in an encoder of several layers",
        ),
        ({"global_config": {"num_attention_heads": 7}}, "config.json cannot be imported: "),
    ],
)
def test_what_ours_has_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        layout.from_hugging_face_config({"model_type": "blt", **changes})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_family_without_a_class_says_so() -> None:
    class Other(TransformerConfig):
        family: str = "other"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="models of family 'other' have no Hugging Face class"):
        layout_of(Other())
