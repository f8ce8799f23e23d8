"""Mixture-of-Mamba as its equations say, one position after the other in float64, and batches to compare on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from packing import packed
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from weft.models import build_model
from weft.models.batch import PackedBatch, positions_of
from weft.models.mamba.config import Config
from weft.models.mamba.model import Mamba

VOCABULARY = 50
TINY: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "d_state": 4}
THREE = ("text", "image", "speech")
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def build(dtype: torch.dtype = torch.float64, **settings: Any) -> Mamba:
    model = build_model(Config(**{**TINY, **settings})).to(dtype)
    assert isinstance(model, Mamba)
    return model


def mixed(
    lengths: Sequence[int], modality: Sequence[int], row_length: int, names: Sequence[str] = THREE
) -> PackedBatch:
    """Documents of `lengths` in rows, whose positions have these modalities."""
    tokens = torch.randint(0, VOCABULARY, (sum(lengths),))
    batch = packed(tokens, list(lengths), row_length)
    counts = {positions_of(name): list(modality).count(m) for m, name in enumerate(names)}
    return replace(batch, modality=torch.tensor(modality, dtype=torch.uint8), host_counts=counts)


def logits_by_hand(model: Mamba, batch: PackedBatch) -> Tensor:
    """(T, V): every position of every document by itself."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    kinds = torch.zeros_like(batch.tokens) if batch.modality is None else batch.modality
    borders = batch.cu_seqlens.tolist()
    rows = []
    for start, stop in itertools.pairwise(borders):
        h = weights["embedding.tokens.weight"][batch.tokens[start:stop]]
        names = [model.config.modalities[int(k)] for k in kinds[start:stop]]
        for layer in range(model.config.n_blocks):
            h = _block(weights, f"backbone.blocks.{layer}.", h, names, model.config)
        rows.append(_norm(h, weights["backbone.norm.weight"], model.config))
    head = weights.get("head.weight", weights["embedding.tokens.weight"])
    return torch.cat(rows) @ head.T


def _norm(h: Tensor, weight: Tensor, config: Config) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + config.norm_eps) * weight


def _block(
    weights: Mapping[str, Tensor], prefix: str, h: Tensor, names: Sequence[str], config: Config
) -> Tensor:
    def own(parameter: str, name: str) -> Tensor:
        whole = f"{prefix}{parameter}"
        return weights[whole] if whole in weights else weights[f"{whole}.{name}"]

    inner, states, rank = config.d_inner, config.d_state, config.rank
    taps, A = own("conv1d.weight", "")[:, 0], -own("ssm.A_log", "").exp()
    state = h.new_zeros(inner, states)
    inputs: list[Tensor] = [h.new_zeros(inner)] * (config.d_conv - 1)
    out = []
    for row, name in zip(h, names, strict=True):
        u = _norm(row, own("norm.weight", name), config)
        x, z = (own("in_proj.weight", name) @ u).chunk(2)
        inputs.append(x)
        seen = torch.stack(inputs[-config.d_conv :], 1)
        v = silu(own("conv1d.bias", "") + (taps * seen).sum(1))
        r, B, C = (own("x_proj.weight", name) @ v).split([rank, states, states])
        raw = own("dt_proj.weight", name) @ r
        if config.has_dt_bias:
            raw = raw + own("ssm.dt_bias", name)
        dt = softplus(raw)[:, None]
        state = (dt * A).exp() * state + dt * v[:, None] * B
        y = (state @ C + own("ssm.D", "") * v) * silu(z)
        out.append(row + own("out_proj.weight", name) @ y)
    return torch.stack(out)


def copy_dense(dense: nn.Module, mixture: nn.Module) -> None:
    """Give every modality the weights of a dense model."""
    theirs = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            own, _, last = name.rpartition(".")
            parameter.copy_(theirs[own if last in THREE else name])
