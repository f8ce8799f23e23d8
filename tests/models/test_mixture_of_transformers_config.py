"""Published sizes, parts and FLOPs, groups, and settings that do not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interleaved import IMAGE, build, interleaved
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from weft.models.mixture_of_transformers.config import Config
from weft.models.mixture_of_transformers.task import MixtureOfTransformersTask
from weft.models.multimodal.settings import ImageConfig
from weft.models.transformer.config import Config as TransformerConfig

NONE = {"norm": False, "qkv": False, "o": False, "ffn": False}
SEVEN: dict[str, Any] = {
    "vocab_size": 65536,
    "n_layers": 32,
    "d_model": 4096,
    "n_heads": 32,
    "d_ff": 11008,
}
LLAMA3 = TransformerConfig(
    vocab_size=128256,
    n_layers=32,
    d_model=4096,
    n_heads=32,
    n_kv_heads=8,
    d_ff=14336,
    norm="pre",
    qk_norm="none",
    norm_eps=1e-5,
)
SMALL: dict[str, Any] = {"vocab_size": 42, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}


def test_published_sizes() -> None:
    """Mixture-of-Transformers: 7.013 B dense, 13.49 B with two modalities, 19.97 B with three."""
    for modalities, billions, digits in (
        (("text",), 7.013, 3),
        (("text", "image"), 13.49, 2),
        (("text", "image", "speech"), 19.97, 2),
    ):
        counts = Config(**SEVEN, modalities=modalities).count_parameters()
        assert round(sum(counts.values()) / 1e9, digits) == billions
    shared = Config(**SEVEN, modalities=("text", "image"), split=NONE)
    assert round(sum(shared.count_parameters().values()) / 1e9, 3) == 7.013


def lmfusion(**changes: Any) -> Config:
    base = {"source": "llama", "architecture": LLAMA3, **changes.pop("base", {})}
    image = ImageConfig(stem="unet")
    return Config(
        modalities=("text", "image"),
        image=image,
        special_ids=(128256, 128257),
        base=base,
        **changes,
    )


def test_an_image_tower_of_llama_3_8b() -> None:
    config = lmfusion()
    counts, dense = config.count_parameters(), LLAMA3.count_parameters()
    assert round(sum(dense.values()) / 1e9, 2) == 8.03
    assert round((counts["blocks"] - dense["blocks"]) / 1e9, 2) == 6.98
    assert counts["image_stem"] / 1e9 == pytest.approx(0.27, abs=0.02)
    assert counts["special"] == 2 * 4096
    assert sum(config.count_frozen().values()) == sum(dense.values())
    assert config.norm_eps == 1e-5
    assert config.n_kv_heads == 8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"split": {**NONE, "ffn": True}, "qk_norm": "full", "n_kv_heads": 2},
        {"split": {**NONE, "norm": True}, "qk_norm": "none", "tie_embeddings": True},
        {"modalities": ("text", "image", "speech"), "special_ids": (40, 41)},
        {"image": IMAGE, "norm": "reordered"},
    ],
    ids=str,
)
def test_counts_are_those_of_the_network(changes: dict[str, Any]) -> None:
    config = Config(**{**SMALL, "modalities": ("text", "image"), **changes})
    task = MixtureOfTransformersTask(config)
    model = build(task)
    assert sum(config.count_parameters().values()) == sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.backbone.blocks.parameters())
    assert config.count_parameters()["blocks"] == blocks
    groups = task.parameter_groups({"model": model})
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(f"model/{name}" for name, _ in model.named_parameters())
    needed = {group.needs for group in groups} - {None}
    assert needed <= task.counts(interleaved(["t(i)"], vocabulary=40)).keys()
    for group in groups:
        assert group.name != "stem" or group.needs == "images"


def test_flops_are_those_of_the_dense_model() -> None:
    split = Config(**SMALL, modalities=("text", "image"))
    dense = split.dense
    assert split.flops_per_token(64) == dense.flops_per_token(64)
    imaged = Config(**SMALL, modalities=("text", "image"), image=IMAGE)
    head = 6 * 42 * 32
    stem = 3 * IMAGE.flops_per_position(32)
    assert imaged.flops_per_token(64) == pytest.approx(
        dense.flops_per_token(64) - head / 2 + stem / 2
    )


def test_counted_flops_of_a_mixed_batch() -> None:
    """Of projections alone: what counts operations on a CPU knows no attention, and norms as nothing."""
    config = Config(**SMALL, modalities=("text", "image"))
    batch = interleaved(["tttt(i)ttt"], vocabulary=40)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(MixtureOfTransformersTask(config))(batch, "logits")
    total = len(batch.tokens)
    wanted = config.flops_per_token(0) / 3 * total
    norms = 2 * (config.n_layers * (2 * 32 + 2 * 8) + 32) * total
    assert counter.get_total_flops() == wanted - norms


def test_debug_size_keeps_every_part() -> None:
    small = lmfusion().debug_size()
    assert small.base is None
    assert (small.n_layers, small.d_model) == (2, 64)
    assert small.n_heads // small.kv_heads == 4
    assert small.special_ids == (128256, 128257)
    assert small.image is not None
    assert small.image.unet.outer_width == 32
    MixtureOfTransformersTask(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 99}, "d_ff is 99 but that of the base is 14336; leave it out"),
        (
            {"base": {"architecture": {**LLAMA3.model_dump(), "window": 5}}},
            "the base has window set",
        ),
        ({"image": None}, "a base's vocabulary has no ids of image"),
        ({"modalities": ("text", "image", "speech")}, "a base's vocabulary has no ids of speech"),
        ({"base": {"architecture": {"n_heads": 3}}}, "n_heads 3"),
        ({"base": {"lr_scale": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_go_with_a_base(changes: dict[str, Any], message: str) -> None:
    base = {"source": "llama", "architecture": LLAMA3, **changes.pop("base", {})}
    given: dict[str, Any] = {"modalities": ("text", "image"), "image": ImageConfig(), **changes}
    with pytest.raises(ValidationError, match=message):
        Config(**given, base=base)


def test_a_model_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="d_model 32 is not a multiple of n_heads 5"):
        Config(**{**SMALL, "n_heads": 5})
