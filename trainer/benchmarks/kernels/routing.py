"""Cases of modality routing: three modalities, a third of the positions of each, in stretches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from ....kernels import (
    MixedLayout,
    mixed_attention,
    rotary_frequencies,
    rotary_table,
    route_by_modality,
    routed_attention,
    routed_linear,
    routed_rms_norm,
)
from .case import Case, Inputs, Run, randn

__all__ = ["cases"]

MODALITIES = 3
EPS = 1e-6
ROW = 2048
IMAGE = 256
"""Positions of one image; every second stretch of a row is one."""


def cases(device: torch.device) -> list[Case]:
    total, width, hidden, heads = (
        (32768, 2048, 5632, 16) if device.type == "cuda" else (4096, 256, 704, 4)
    )
    return [
        _sort(total),
        _linear(total, width, hidden),
        _norm(total, width),
        _mask(total),
        _attention(total, heads, width // heads),
    ]


def _modality(total: int, device: torch.device) -> Tensor:
    return (torch.arange(total, device=device) // IMAGE % MODALITIES).to(torch.uint8)


def _sizes(total: int) -> list[int]:
    return torch.bincount(
        _modality(total, torch.device("cpu")).long(), minlength=MODALITIES
    ).tolist()


def _routing(total: int, device: torch.device) -> Any:
    return route_by_modality(_modality(total, device), MODALITIES, _sizes(total))


def _sort(total: int) -> Case:
    sizes = _sizes(total)
    return Case(
        "route_by_modality",
        f"{total} positions",
        lambda device, small: {"modality": _modality(total, device)},
        lambda i: route_by_modality(i["modality"], MODALITIES, sizes).order,
        oracle=None,
        peers={
            "nonzero of each modality": lambda i: torch.cat(
                [(i["modality"] == m).nonzero()[:, 0] for m in range(MODALITIES)]
            )
        },
        has_backward=False,
    )


def _linear(total: int, width: int, hidden: int) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        n, d, f = (768, 32, 48) if small else (total, width, hidden)
        return {
            "x": randn(n, d, device=device),
            "weights": randn(MODALITIES, f, d, device=device, scale=d**-0.5),
            "routing": _routing(n, device),
            "modality": _modality(n, device),
        }

    def dense(i: Inputs) -> Tensor:
        x, routing = i["x"], i["routing"]
        parts = x[routing.order].split(list(routing.sizes))
        return torch.cat([linear(part, w) for part, w in zip(parts, i["weights"], strict=True)])

    return Case(
        "routed_linear",
        f"{total} x {width} to {hidden}",
        make,
        lambda i: routed_linear(i["routing"].permute(i["x"]), i["weights"], i["routing"]),
        oracle=dense,
        peers={
            "boolean indexing": _indexed_linear,
            "one dense linear": lambda i: linear(i["x"], i["weights"][0]),
        },
    )


def _indexed_linear(i: Inputs) -> Tensor:
    x, modality = i["x"], i["modality"]
    out = torch.zeros(len(x), i["weights"].shape[1], dtype=x.dtype, device=x.device)
    for m, weight in enumerate(i["weights"]):
        out[modality == m] = linear(x[modality == m], weight)
    return out


def _norm(total: int, width: int) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        n = 768 if small else total
        return {
            "x": randn(n, width, device=device),
            "weights": randn(MODALITIES, width, device=device),
            "routing": _routing(n, device),
            "modality": _modality(n, device),
        }

    def sliced(i: Inputs) -> Tensor:
        parts = i["x"].split(list(i["routing"].sizes))
        normalised = [
            rms_norm(part, part.shape[1:], w, EPS)
            for part, w in zip(parts, i["weights"], strict=True)
        ]
        return torch.cat(normalised)

    def indexed(i: Inputs) -> Tensor:
        out = torch.zeros_like(i["x"])
        for m, weight in enumerate(i["weights"]):
            rows = i["modality"] == m
            out[rows] = rms_norm(i["x"][rows], weight.shape, weight, EPS)
        return out

    return Case(
        "routed_rms_norm",
        f"{total} x {width}",
        make,
        lambda i: routed_rms_norm(i["x"], i["weights"], i["routing"], EPS),
        oracle=sliced,
        peers={"boolean indexing": indexed, "slices and F.rms_norm": sliced},
        forward_bytes=lambda i: 2 * i["x"].numel() * i["x"].element_size(),
        backward_bytes=lambda i: 3 * i["x"].numel() * i["x"].element_size(),
    )


def _layout(total: int, device: torch.device) -> MixedLayout:
    positions = torch.arange(total, device=device) % ROW
    borders = torch.arange(0, total + 1, ROW, device=device, dtype=torch.int32)
    spans = [(start, start + IMAGE) for start in range(IMAGE, total, 2 * IMAGE)]
    return MixedLayout(borders, positions, ROW, ROW, torch.tensor(spans, device=device))


def _mask(total: int) -> Case:
    from torch.nn.attention.flex_attention import create_block_mask

    def build(i: Inputs) -> Tensor:
        layout = MixedLayout(i["borders"], i["positions"], ROW, ROW, i["spans"])
        return layout.block_mask.kv_num_blocks

    def evaluated(i: Inputs) -> Tensor:
        layout = _layout(len(i["positions"]), i["positions"].device)
        first, end = layout.key_starts, layout.key_ends

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[query]) & (key < end[query])

        mask = create_block_mask(visible, None, None, total, total, device=first.device.type)
        assert isinstance(mask.kv_num_blocks, Tensor)
        return mask.kv_num_blocks

    def make(device: torch.device, small: bool) -> Inputs:
        layout = _layout(total, device)
        return {
            "borders": layout.cu_seqlens,
            "positions": layout.position_ids,
            "spans": layout.image_spans,
        }

    peer: Run | str = evaluated
    if total > 8192 and not torch.cuda.is_available():
        peer = "would evaluate every pair of positions"
    return Case(
        "mixed block mask",
        f"{total} positions, {total // (2 * IMAGE)} images",
        make,
        build,
        oracle=None,
        peers={"create_block_mask": peer},
        has_backward=False,
    )


def _attention(total: int, heads: int, width: int) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        n = 2 * ROW if small else total
        h = 2 if small else heads
        frequencies = rotary_frequencies(width, 500000.0, device=device, dtype=torch.float32)
        return {
            **{name: randn(n, h, width, device=device) for name in ("q", "k", "v")},
            "q_weights": randn(MODALITIES, width, device=device),
            "k_weights": randn(MODALITIES, width, device=device),
            "routing": _routing(n, device),
            "modality": _modality(n, device),
            "layout": _layout(n, device),
            "frequencies": frequencies,
        }

    def table(i: Inputs) -> Any:
        frequencies = i["frequencies"].to(torch.promote_types(i["q"].dtype, torch.float32))
        return rotary_table(i["layout"].position_ids, frequencies)

    def ours(i: Inputs) -> Tensor:
        return routed_attention(
            i["q"],
            i["k"],
            i["v"],
            i["routing"],
            i["layout"],
            table=table(i),
            q_weights=i["q_weights"],
            k_weights=i["k_weights"],
            eps=EPS,
        )

    def apart(i: Inputs) -> Tensor:
        """Normalise by boolean index, turn, restore, attend, gather: a pass over memory each."""
        from ....kernels import apply_rotary

        routing = i["routing"]
        turned = []
        for name in ("q", "k"):
            x = i[name]
            rows = i["modality"][routing.order]
            out = torch.zeros_like(x)
            for m, weight in enumerate(i[f"{name}_weights"]):
                out[rows == m] = rms_norm(x[rows == m], weight.shape, weight, EPS)
            turned.append(apply_rotary(out[routing.inverse], table(i)))
        q, k = turned
        attended = mixed_attention(q, k, i["v"][routing.inverse], i["layout"])
        return attended[routing.order]

    return Case(
        "routed_attention",
        f"{total} positions, rows of {ROW}, {heads} heads of {width}",
        make,
        ours,
        oracle=apart,
        peers={"boolean indexing, steps apart": apart},
    )
