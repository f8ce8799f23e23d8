"""Routed blocks: against a model written position by position, the dense transformer, and what masks and zeros promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from interleaved import IMAGE, build, interleaved
from torch import Tensor
from torch.nn.functional import silu
from weft.models.batch import IMAGE_SPANS, PackedBatch
from weft.models.build import build_model
from weft.models.errors import ConfigError
from weft.models.mixture_of_transformers.config import Config
from weft.models.mixture_of_transformers.task import MixtureOfTransformersTask

V = 40
DOCUMENTS = ("ttt(i)tt", "(i)t(i)", "tt", "tii)t")
SHAPE: dict[str, Any] = {
    "vocab_size": V + 2,
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 24,
    "init_std": 0.3,
}
NONE = {"norm": False, "qkv": False, "o": False, "ffn": False}


def config(**changes: Any) -> Config:
    return Config(**{**SHAPE, "modalities": ("text", "image"), "image": IMAGE, **changes})


def network(**changes: Any) -> Any:
    model = build(MixtureOfTransformersTask(config(**changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm.weight" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def allowed(batch: PackedBatch, sees_images: bool) -> Tensor:
    """(T, T): same document, and before or in one image; by brute force."""
    total = len(batch.tokens)
    ends, spans = batch.cu_seqlens.tolist(), batch.side[IMAGE_SPANS].tolist()
    document = [sum(place >= end for end in ends) for place in range(total)]
    image = [next((n for n, (a, b) in enumerate(spans) if a <= i < b), -1) for i in range(total)]
    return torch.tensor(
        [
            [
                document[i] == document[j]
                and (j <= i or (sees_images and image[i] == image[j] != -1))
                for j in range(total)
            ]
            for i in range(total)
        ]
    )


def weight(layer: Any, modality: int) -> Tensor:
    own = layer.weight
    return own if isinstance(own, torch.Tensor) else own[("text", "image")[modality]]


def by_position(model: Any, x: Tensor, batch: PackedBatch, sees_images: bool = True) -> Tensor:
    """(T, d) after the final norm: the definition, one position at a time, from rows x in the order of positions."""
    c, modality = model.config, batch.modality.tolist()

    def normal(layer: Any, rows: list[Tensor]) -> list[Tensor]:
        return [
            weight(layer, m) * r / (r.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
            for m, r in zip(modality, rows, strict=True)
        ]

    def through(layer: Any, rows: list[Tensor]) -> list[Tensor]:
        return [weight(layer, m) @ r for m, r in zip(modality, rows, strict=True)]

    def turned(heads: list[Tensor]) -> Tensor:
        half = c.head_width // 2
        wavelengths = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        out = []
        for position, head in zip(batch.position_ids.tolist(), heads, strict=True):
            cos, sin = (position * wavelengths).cos(), (position * wavelengths).sin()
            a, b = head[..., :half], head[..., half:]
            out.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
        return torch.stack(out)

    def heads(layer: Any, norm: Any, rows: list[Tensor]) -> list[Tensor]:
        flat = through(layer, rows)
        if norm is not None and c.qk_norm == "full":
            flat = normal(norm, flat)
        cut = [r.view(-1, c.head_width) for r in flat]
        return normal(norm, cut) if norm is not None and c.qk_norm == "head" else cut

    def attend(layer: Any, rows: list[Tensor]) -> list[Tensor]:
        q, k = (
            turned(heads(layer.q_proj, layer.q_norm, rows)),
            turned(heads(layer.k_proj, layer.k_norm, rows)),
        )
        v = torch.stack([r.view(-1, c.head_width) for r in through(layer.v_proj, rows)])
        group = c.n_heads // c.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / c.head_width**0.5
        scores = scores.masked_fill(~allowed(batch, sees_images), -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        return through(layer.o_proj, list(mixed))

    def feed(layer: Any, rows: list[Tensor]) -> list[Tensor]:
        gates = [silu(r) for r in through(layer.gate_proj, rows)]
        ups = through(layer.up_proj, rows)
        return through(layer.down_proj, [g * u for g, u in zip(gates, ups, strict=True)])

    rows = list(x)
    for block in model.backbone.blocks:
        for norm, part in (
            (block.attention_norm, lambda r, b=block: attend(b.attention, r)),
            (block.mlp_norm, lambda r, b=block: feed(b.mlp, r)),
        ):
            branch = normal(norm, part(rows)) if c.norm == "reordered" else part(normal(norm, rows))
            rows = [r + b for r, b in zip(rows, branch, strict=True)]
    return torch.stack(normal(model.backbone.norm, rows))


CASES: list[dict[str, Any]] = [
    {},
    {"norm": "reordered", "qk_norm": "full"},
    {"split": {**NONE, "ffn": True}, "qk_norm": "none"},
    {"split": {**NONE, "qkv": True, "norm": True}},
    {"split": {**NONE, "o": True}, "image_attention": "causal"},
    {"split": NONE, "rope_theta": 500.0, "n_kv_heads": None},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_a_mixed_batch_equals_the_definition(changes: dict[str, Any]) -> None:
    model = network(**changes).double()
    batch = interleaved(DOCUMENTS, vocabulary=V)
    seen: list[Tensor] = []
    model.backbone.register_forward_hook(lambda m, inputs, out: seen.extend((*inputs[:2], out)))
    model(batch, "logits")
    x, routing, out = seen
    wanted = by_position(
        model, routing.restore(x), batch, changes.get("image_attention") != "causal"
    )
    torch.testing.assert_close(routing.restore(out), wanted, rtol=1e-9, atol=1e-9)


def test_codes_are_causal_whatever_is_said_of_images() -> None:
    model = network(image=None, modalities=("text", "image", "speech"))
    batch = interleaved(DOCUMENTS, vocabulary=V)
    assert model.backbone.context(batch, routing_of(model, batch)).layout.total == len(batch.tokens)
    changed = copy.deepcopy(batch)
    start, end = batch.side[IMAGE_SPANS][0].tolist()
    changed.tokens[end - 1] = 3
    before, after = model(batch, "logits"), model(changed, "logits")
    assert torch.equal(before[: end - 1], after[: end - 1])
    assert not torch.equal(before[end - 1 : end + 2], after[end - 1 : end + 2])
    assert end - start > 1


def routing_of(model: Any, batch: PackedBatch) -> Any:
    from weft.models.multimodal.network import route_batch

    return route_batch(batch, model.config.modalities)


def dense_of(model: Any) -> Any:
    """The transformer of the same shape with the weights that text has."""
    dense = build_model(model.config.dense)
    own = dict(model.named_parameters())
    theirs = {}
    for name in dict(dense.named_parameters()):
        inside = name if name.startswith(("embedding", "head")) else f"backbone.{name}"
        theirs[name] = own.get(f"{inside}.text", own.get(inside)).detach()
    dense.load_state_dict(theirs)
    return dense


def test_equal_weights_in_all_modalities_are_the_dense_model() -> None:
    model = network(image=None)
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, parameter in own.items():
            if name.endswith(".image"):
                parameter.copy_(own[name.removesuffix("image") + "text"])
    batch = interleaved(DOCUMENTS, vocabulary=V)
    torch.testing.assert_close(
        model(batch, "logits"), dense_of(model)(batch, "logits"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("which", ["text", "image"])
@pytest.mark.parametrize("split", [{}, {**NONE, "ffn": True}])
def test_a_modality_without_rows_has_gradients_of_zero(which: str, split: dict[str, bool]) -> None:
    model = network(image=None, split=split)
    batch = interleaved(["ttttt", "ttt"], vocabulary=V)
    modality = torch.full_like(batch.tokens, int(which == "image")).to(torch.uint8)
    counts = {**batch.host_counts, f"{which}_positions": len(batch.tokens)}
    counts["image_positions" if which == "text" else "text_positions"] = 0
    batch = PackedBatch(**{**vars(batch), "modality": modality, "host_counts": counts})
    model(batch)["cross_entropy/text"].backward()
    absent = "image" if which == "text" else "text"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != name.endswith(f".{absent}"), name


def test_all_frozen_but_what_has_no_rows_still_has_a_graph() -> None:
    model = network(image=None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".image"))
    loss = model(interleaved(["tttt"], vocabulary=V))["cross_entropy/text"]
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


def test_gradients_of_a_mixed_batch_equal_those_of_the_definition() -> None:
    model = network().double()
    batch = interleaved(DOCUMENTS, vocabulary=V)
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda m, i, out: seen.extend((*i[:2], out)))
    model(batch, "logits")
    handle.remove()
    x, routing, out = seen
    probe = torch.randn(out.shape, dtype=torch.float64)
    own = [p for n, p in model.named_parameters() if n.startswith("backbone")]
    found = torch.autograd.grad((routing.restore(out) * probe).sum(), own, retain_graph=True)
    plain = by_position(model, routing.restore(x), batch)
    wanted = torch.autograd.grad((plain * probe).sum(), own)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_an_attention_that_does_not_run_here_is_refused() -> None:
    model = network(attention="varlen")
    with pytest.raises(ConfigError, match=r"model\.attention=varlen: .*needs CUDA"):
        model(interleaved(["ttt"], vocabulary=V), "logits")
