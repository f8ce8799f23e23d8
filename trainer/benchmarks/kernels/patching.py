"""Cases of entropy patching: BLT's sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ....kernels import (
    decoder_block_mask,
    encoder_block_mask,
    flex_patch_attention,
    linear_entropy,
    patch_boundaries,
    patch_decoder_attention,
    patch_encoder_attention,
    segment_pool,
    token_entropy,
)
from .case import Case, Inputs, Run, randn

__all__ = ["cases"]

VOCABULARY = 260
MEAN_PATCH = 4.5
VECTORS = 2


def cases(device: torch.device) -> list[Case]:
    is_gpu = device.type == "cuda"
    total, width, heads = (65536, 1024, 16) if is_gpu else (8192, 256, 4)
    return [
        _entropy(total),
        _fused_entropy(total, 768 if is_gpu else 128),
        _boundaries(total),
        *(_pool(total, width, mode) for mode in ("max", "mean")),
        *(_attention(total, heads, way) for way in ("encoder", "decoder")),
    ]


def _entropy_of(logits: Tensor) -> Tensor:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _entropy(total: int) -> Case:
    return Case(
        "token_entropy",
        f"{total} x {VOCABULARY} logits",
        lambda device, small: {
            "logits": randn(128 if small else total, VOCABULARY, device=device, scale=2)
        },
        lambda i: token_entropy(i["logits"]),
        peers={"log_softmax, exp, sum": lambda i: _entropy_of(i["logits"])},
        forward_bytes=lambda i: i["logits"].numel() * i["logits"].element_size(),
        backward_bytes=lambda i: 2 * i["logits"].numel() * i["logits"].element_size(),
    )


def _fused_entropy(total: int, width: int) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        return {
            "hidden": randn(128 if small else total, width, device=device),
            "weight": randn(VOCABULARY, width, device=device, scale=2 * width**-0.5),
        }

    return Case(
        "linear_entropy",
        f"{total} x {width} hidden, {VOCABULARY} ids",
        make,
        lambda i: linear_entropy(i["hidden"], i["weight"]),
        peers={"F.linear, log_softmax": lambda i: _entropy_of(linear(i["hidden"], i["weight"]))},
        forward_bytes=lambda i: i["hidden"].numel() * i["hidden"].element_size(),
    )


def _positions(total: int, device: torch.device) -> Tensor:
    """Documents of 2048 bytes."""
    return torch.arange(total, device=device) % 2048


def _split(total: int, entropy: Tensor) -> Any:
    return patch_boundaries(
        _positions(total, entropy.device),
        int(total / MEAN_PATCH * 1.5),
        entropy=entropy,
        threshold=1.0,
    )


def _random_entropy(total: int, device: torch.device) -> Tensor:
    """Uniform, so that a threshold of 1 is passed once in 4.5 bytes."""
    return torch.rand(total, device=device) / (1 - 1 / MEAN_PATCH)


def _boundaries(total: int) -> Case:
    peers: dict[str, Run | str] = {"boolean indexing on the host's time": _indexed_boundaries}
    return Case(
        "patch_boundaries",
        f"{total} bytes, threshold",
        lambda device, small: {"entropy": _random_entropy(256 if small else total, device)},
        lambda i: _split(len(i["entropy"]), i["entropy"]).starts,
        oracle=None,
        peers=peers,
        has_backward=False,
    )


def _indexed_boundaries(i: Inputs) -> Tensor:
    """What is usually written: `nonzero`, which waits for the device."""
    entropy = i["entropy"]
    starts = torch.ones_like(entropy, dtype=torch.bool)
    starts[2:] = (entropy[1:-1] > 1.0) | (_positions(len(entropy), entropy.device)[2:] < 2)
    return starts.nonzero()[:, 0]


def _pool(total: int, width: int, mode: str) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        n = 256 if small else total
        patches = _split(n, _random_entropy(n, device))
        return {
            "x": randn(n, width, device=device),
            "starts": patches.starts,
            "lengths": patches.lengths,
            "ids": patches.patch_ids.long(),
        }

    def scatter(i: Inputs) -> Tensor:
        x, patches = i["x"], len(i["starts"])
        ids = i["ids"].clamp(max=patches - 1)[:, None].expand(-1, x.shape[1])
        out = torch.zeros(patches, x.shape[1], dtype=x.dtype, device=x.device)
        reduce = {"max": "amax", "mean": "mean"}[mode]
        return out.scatter_reduce(0, ids, x, reduce, include_self=False)

    return Case(
        "segment_pool",
        f"{mode}, {total} x {width}",
        make,
        lambda i: segment_pool(i["x"], i["starts"], i["lengths"], mode),
        peers={"scatter_reduce": scatter},
        forward_bytes=lambda i: i["x"].numel() * i["x"].element_size(),
        backward_bytes=lambda i: i["x"].numel() * i["x"].element_size(),
    )


def _attention(total: int, heads: int, way: str) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        n = 256 if small else total
        patches = _split(n, _random_entropy(n, device))
        vectors = len(patches.starts) * VECTORS
        queries, keys = (vectors, n) if way == "encoder" else (n, vectors)
        ids, starts, lengths = patches.decoder_ids, patches.starts, patches.lengths
        if way == "encoder":
            mask = encoder_block_mask(starts, lengths, VECTORS, n)
        else:
            mask = decoder_block_mask(ids, VECTORS, len(starts))
        return {
            "q": randn(queries, heads, 64, device=device),
            "k": randn(keys, heads, 64, device=device),
            "v": randn(keys, heads, 64, device=device),
            "starts": starts,
            "lengths": lengths,
            "ids": ids,
            "mask": mask,
        }

    def ours(i: Inputs) -> Tensor:
        if way == "encoder":
            return patch_encoder_attention(i["q"], i["k"], i["v"], i["starts"], i["lengths"])
        return patch_decoder_attention(i["q"], i["k"], i["v"], i["ids"], VECTORS)

    flex: Run | str = "FlexAttention has no gradient on the CPU"
    if torch.cuda.is_available():
        flex = lambda i: flex_patch_attention(i["q"], i["k"], i["v"], i["mask"])  # noqa: E731
    return Case(
        f"patch_{way}_attention",
        f"{total} bytes, {heads} heads of 64, {VECTORS} vectors a patch",
        make,
        ours,
        peers={"FlexAttention, analytic mask": flex},
        forward_bytes=lambda i: sum(
            i[n].numel() * i[n].element_size() for n in ("q", "q", "k", "v")
        ),
        backward_bytes=lambda i: sum(
            2 * i[n].numel() * i[n].element_size() for n in ("q", "q", "k", "v")
        ),
    )
