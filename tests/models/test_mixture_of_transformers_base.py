"""Around a frozen base: which loss trains what, and what of the base's text stays to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interleaved import IMAGE, build, interleaved, with_side
from torch import Tensor
from torch.nn.functional import cross_entropy
from weft.models.batch import IGNORED, LATENTS, NOISE, TIMESTEPS, PackedBatch
from weft.models.build import build_model
from weft.models.mixture_of_transformers.config import Config
from weft.models.mixture_of_transformers.task import MixtureOfTransformersTask
from weft.models.transformer.config import Config as TransformerConfig

V = 40
BASES: dict[str, dict[str, Any]] = {
    "llama": {"norm": "pre", "qk_norm": "none", "n_kv_heads": 2},
    "olmo2": {"norm": "reordered", "qk_norm": "full"},
    "tied": {"norm": "pre", "qk_norm": "head", "tie_embeddings": True},
    "stretched": {"norm": "pre", "qk_norm": "none", "rope_scaling": {"factor": 4.0}},
}


def architecture(kind: str = "llama") -> TransformerConfig:
    shape: dict[str, Any] = {
        "vocab_size": V,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_ff": 48,
    }
    return TransformerConfig(**shape, init_std=0.2, **BASES[kind])


def lmfusion(kind: str = "llama", **changes: Any) -> tuple[Any, Any, MixtureOfTransformersTask]:
    """The model around a base of random weights, with image modules that have moved on; the base; the task."""
    base = {"source": "base", "architecture": architecture(kind), **changes.pop("base", {})}
    config = Config(
        modalities=("text", "image"),
        image=IMAGE,
        special_ids=(V, V + 1),
        base=base,
        init_std=0.2,
        **changes,
    )
    task = MixtureOfTransformersTask(config)
    model, dense = build(task), build_model(architecture(kind), seed=5)
    (theirs, *_) = task.base_weights({"model": model})
    named, own = dict(dense.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for ours, source in theirs.parameters.items():
            own[ours.removeprefix("model/")].copy_(named[source.removeprefix("model/")])
    for group in task.parameter_groups({"model": model}):
        for name in group.parameters:
            own[name.removeprefix("model/")].requires_grad_(group.algorithm != "frozen")
    return model, dense, task


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_text_alone_has_the_logits_of_the_base_to_the_bit(kind: str, compute: str) -> None:
    """Level F: same framework, same shapes."""
    model, dense, _ = lmfusion(kind)
    for documents in (["ttttttt", "tttt"], ["t" * 33]):
        batch = interleaved(documents, vocabulary=V)
        plain = replace(batch, modality=None, side={}, host_counts={})
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            wanted = dense(plain, output="logits")
            assert torch.equal(model(batch, "logits"), wanted)
            assert torch.equal(model(plain, "logits"), wanted)


def test_text_before_an_image_does_not_know_it_to_the_bit() -> None:
    """Level C: other pixels, noise and noise levels, in this document and in others."""
    model, _, _ = lmfusion()
    batch = interleaved(["tttt(i)tt(i)t", "(i)ttt", "ttttt"], vocabulary=V)
    side = {name: batch.side[name].clone() for name in (LATENTS, NOISE, TIMESTEPS)}
    changed = with_side(
        batch,
        **{LATENTS: side[LATENTS] + 1, NOISE: side[NOISE] * 2, TIMESTEPS: 999 - side[TIMESTEPS]},
    )
    before, after = model(batch, "logits"), model(changed, "logits")
    total = len(batch.tokens)
    early = torch.tensor([*range(5), *range(total - 5, total)])
    assert torch.equal(before[early], after[early])
    assert not torch.isclose(before[9:12], after[9:12]).all()
    # The second image of a document is not seen by what stands before it, nor by the first.
    second = {name: side[name].clone() for name in side}
    second[LATENTS][1] += 1
    after = model(with_side(batch, **second), "logits")
    is_text = batch.modality == 0
    upto = is_text & (torch.arange(total) < 13)
    assert torch.equal(before[upto], after[upto])
    denoised = model(batch, "denoised"), model(with_side(batch, **second), "denoised")
    assert torch.equal(denoised[0][[0, 2]], denoised[1][[0, 2]])
    assert not torch.equal(denoised[0][1], denoised[1][1])


@pytest.mark.parametrize("kind", BASES)
def test_text_in_mixed_company_is_close_to_text_alone(kind: str) -> None:
    """Level N."""
    model, dense, _ = lmfusion(kind)
    batch = interleaved(["tttttttt", "(i)ttt", "tttttttttt(i)"], vocabulary=V)
    mixed = model(batch, "logits")
    total = len(batch.tokens)
    early = torch.tensor([*range(8), *range(total - 16, total - 6)])
    plain = dense(replace(batch, tokens=batch.tokens % V, side={}), output="logits")
    # A causal model does not know what comes after, so the dense run may see any ids there.
    torch.testing.assert_close(mixed[early], plain[early], rtol=0, atol=1e-4)
    gap = plain[early].topk(2).values.diff(dim=-1).abs().squeeze(-1)
    sure = early[gap > 0.1]
    assert torch.equal(mixed[sure].argmax(-1), plain[sure].argmax(-1))


LAST = "backbone.blocks.1."
LAST_OUT = (f"{LAST}attention.q_proj", f"{LAST}attention.o_proj", f"{LAST}mlp", "backbone.norm")


def reached(model: Any, loss: Tensor) -> set[str]:
    """Names of trained parameters that a loss reaches."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    # Logits alone do not run the way out; nothing else is ever left out of a graph.
    assert all(
        g is not None or n.startswith("stem.output") for n, g in zip(named, found, strict=True)
    )
    return {n for n, g in zip(named, found, strict=True) if g is not None and g.any()}


def text_loss(model: Any, batch: PackedBatch, positions: list[int]) -> Tensor:
    targets = torch.full_like(batch.tokens, IGNORED)
    targets[positions] = 3
    return cross_entropy(model(batch, "logits"), targets, ignore_index=IGNORED, reduction="sum")


def test_which_loss_trains_what() -> None:
    """The table of gradients of a frozen text part; positions: tt ( iiii ) tt."""
    model, _, _ = lmfusion()
    batch = interleaved(["tt(i)tt"], vocabulary=V)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        n
        for n, _ in model.named_parameters()
        if ".image" in n or n.startswith("stem") or "special" in n
    }
    # Before any image: nothing.
    assert reached(model, text_loss(model, batch, [0, 1])) == set()
    # After one, EOI among it: keys and values of every layer and what made them.
    after = reached(model, text_loss(model, batch, [7, 8, 9]))
    unreached = {n for n in trained if n.startswith(LAST_OUT) or n.startswith("stem.output")}
    # The last layer's MLP and the norm before it make nothing that anybody reads.
    unreached |= {f"{LAST}mlp_norm.weight.image"}
    assert after == trained - unreached
    # Denoising: everything, EOI's row of the table aside.
    everything = reached(model, model(batch)["denoising"].sum())
    assert everything == trained
    special = torch.autograd.grad(model(batch)["denoising"].sum(), model.embedding.special)[0]
    assert special[0].any()
    assert not special[1].any()


def test_text_between_two_images_passes_gradients_on() -> None:
    model, _, _ = lmfusion(base={"train_special": False})
    assert not model.embedding.special.requires_grad
    batch = interleaved(["(i)tt(i)"], vocabulary=V)
    model.stem.down = lambda images, t, own=model.stem.down: probe(*own(images, t))
    seen: list[Tensor] = []

    def probe(rows: Tensor, kept: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        seen.append(rows)
        return rows, kept

    (gradient,) = torch.autograd.grad(model(batch)["denoising"][1], seen)
    whole = gradient[:4].clone()
    assert whole.any()
    # Text keys and values are a path from the first image to the second: without it the gradient is another.
    for block in model.backbone.blocks:
        for layer in (block.attention.k_proj, block.attention.v_proj):
            layer.register_forward_hook(
                lambda m, inputs, out: torch.cat((out[:5].detach(), out[5:]))
            )
    seen.clear()
    (cut,) = torch.autograd.grad(model(batch)["denoising"][1], seen)
    assert not torch.allclose(cut[:4], whole)


def test_a_frozen_weight_gets_no_gradient() -> None:
    model, _, _ = lmfusion("tied")
    sums = model(interleaved(["tt(i)tt", "(i)tt"], vocabulary=V))
    (
        sums["cross_entropy/text"] + sums["cross_entropy/caption"] + sums["denoising"].sum()
    ).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, name


def test_what_is_shared_belongs_to_the_base() -> None:
    """The ablation: shallow splits the feed-forward alone, dense nothing."""
    none = {"norm": False, "qkv": False, "o": False, "ffn": False}
    for split, trains in (({**none, "ffn": True}, True), (none, False)):
        model, _, task = lmfusion(split=split)
        named = {n for n, p in model.named_parameters() if p.requires_grad and "backbone" in n}
        assert bool(named) == trains
        assert all(".mlp." in n and n.endswith(".image") for n in named)
        (stays, *copies) = task.base_weights({"model": model})
        assert stays.stays_there
        assert len(stays.parameters) == len(list(build_model(architecture()).parameters()))
        assert len(copies) == int(trains)
