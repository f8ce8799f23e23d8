"""Reading ids and images into a cache gives what one forward pass over the whole document gives, in both families."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weft.models import build_model
from weft.models.batch import (
    IGNORED,
    IMAGE_SPANS,
    LATENTS,
    NOISE,
    TIMESTEPS,
    PackedBatch,
)
from weft.models.mamba.config import Config as MambaConfig
from weft.models.mixture_of_transformers.config import Config as MixtureConfig

V, N = 40, 4
BOI, EOI = 38, 39
IMAGE = {"channels": 2, "size": 4, "patch": 2, "time_width": 8}
FAMILIES = {
    "mamba": lambda **more: MambaConfig(
        vocab_size=V, d_model=16, n_layers=2, d_state=4, dt_rank=2, **more
    ),
    "mixture_of_transformers": lambda **more: MixtureConfig(
        vocab_size=V, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, **more
    ),
}


def build(family: str, modalities: tuple[str, ...], image: dict[str, Any] | None) -> nn.Module:
    config = FAMILIES[family](modalities=modalities, image=image)
    model = build_model(config, seed=4).double()
    if image:
        nn.init.normal_(model.stem.output.weight, std=0.2)
    return model


def new_cache(model: nn.Module, rows: int, capacity: int = 64) -> Any:
    module = importlib.import_module(f"weft.models.{model.config.family}.cache")
    return module.KVCache(model.config, rows, capacity, dtype=torch.float64)


def document(
    tokens: list[int], image_at: int | None, latents: Tensor | None, t: int = 0
) -> PackedBatch:
    """One document with `N` patches at a position, or without an image."""
    total = len(tokens)
    modality = torch.zeros(total, dtype=torch.uint8)
    side = {}
    if image_at is not None:
        assert latents is not None
        modality[image_at : image_at + N] = 1
        side = {
            LATENTS: latents,
            NOISE: torch.zeros_like(latents),
            TIMESTEPS: torch.tensor([t]),
            IMAGE_SPANS: torch.tensor([[image_at, image_at + N]], dtype=torch.int32),
        }
    return PackedBatch(
        tokens=torch.tensor(tokens),
        targets=torch.full((total,), IGNORED),
        position_ids=torch.arange(total),
        cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
        max_seqlen=total,
        row_length=total,
        sample_ids=(0,),
        source_ids=(0,),
        target_count=0,
        modality=modality,
        host_counts={
            "text_positions": int((modality == 0).sum()),
            "image_positions": int((modality == 1).sum()),
        },
        side=side,
    )


def scaled(model: nn.Module, latents: Tensor, t: int) -> Tensor:
    """What a batch without noise shows of its latents at a noise level."""
    signal, _ = model.diffusion.scales(torch.tensor([t]), latents)
    return signal * latents


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_an_image_read_piece_by_piece(family: str) -> None:
    model = build(family, ("text", "image"), IMAGE)
    latents = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    before, after = [1, 7, 9, 12, BOI], [EOI, 3, 5]
    shorter = [1, 30, BOI]
    wanted = []
    for i, start in enumerate((before, shorter)):
        tokens = [*start, *[BOI] * N, *after]
        batch = document(tokens, len(start), latents[i : i + 1])
        wanted.append(model(batch, "logits"))
    cache = new_cache(model, 2)
    padded = torch.tensor([before, [*shorter, 0, 0]])
    first = model.forward_cached(padded, torch.tensor([5, 3]), cache)
    torch.testing.assert_close(first[0], wanted[0][:5])
    torch.testing.assert_close(first[1, :3], wanted[1][:3])
    model.read_image(scaled(model, latents, 0), cache)
    assert cache.lengths.tolist() == [9, 7]
    rest = model.forward_cached(torch.tensor([after, after]), None, cache)
    for i, start in enumerate((before, shorter)):
        torch.testing.assert_close(rest[i], wanted[i][len(start) + N :])


@pytest.mark.parametrize("family", FAMILIES)
def test_denoising_sees_the_prompt_and_leaves_the_cache_as_it_was(family: str) -> None:
    model = build(family, ("text", "image"), IMAGE)
    latents = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    prompt = [1, 7, 9, BOI]
    cache = new_cache(model, 1)
    model.forward_cached(torch.tensor([prompt]), None, cache)
    for t in (700, 40):
        batch = document([*prompt, *[BOI] * N, EOI], len(prompt), latents, t)
        wanted = model(batch, "denoised")
        found = model.denoise(scaled(model, latents, t), torch.tensor([t]), cache)
        torch.testing.assert_close(found, wanted)
        assert cache.lengths.tolist() == [4]
    other = new_cache(model, 1)
    model.forward_cached(torch.tensor([[1, 22, 9, BOI]]), None, other)
    assert not torch.allclose(model.denoise(latents, torch.tensor([40]), other), found)
    after = model.forward_cached(torch.tensor([[5]]), None, cache)[0, 0]
    plain = model(document([*prompt, 5], None, None), "logits")[-1]
    torch.testing.assert_close(after, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_of_several_modalities_one_at_a_time(family: str) -> None:
    model = build(family, ("text", "image", "speech"), None)
    tokens = torch.randint(V, (12,))
    modality = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 0, 1, 2, 0], dtype=torch.uint8)
    batch = document(tokens.tolist(), None, None)
    counts = {
        f"{name}_positions": int((modality == i).sum())
        for i, name in enumerate(model.config.modalities)
    }
    wanted = model(replace(batch, modality=modality, host_counts=counts), "logits")
    cache = new_cache(model, 1)
    head = model.forward_cached(tokens[None, :7], None, cache, modality[None, :7])
    torch.testing.assert_close(head[0], wanted[:7])
    for i in range(7, 12):
        step = model.forward_cached(tokens[None, i : i + 1], None, cache, modality[None, i : i + 1])
        torch.testing.assert_close(step[0, 0], wanted[i])


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_leave_and_go_back(family: str) -> None:
    model = build(family, ("text", "image"), IMAGE)
    cache = new_cache(model, 3)
    rows = torch.tensor([[1, 5, 6], [1, 8, 9], [1, 11, 12]])
    model.forward_cached(rows, None, cache)
    cache.select(torch.tensor([2, 0]))
    cache.rewind(1, [1, 5])
    found = model.forward_cached(torch.tensor([[4], [4]]), None, cache)
    for i, tokens in enumerate(([1, 11, 12, 4], [1, 5, 4])):
        wanted = model(document(tokens, None, None), "logits")[-1]
        torch.testing.assert_close(found[i, 0], wanted)
