"""Cases of the norm and of the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, silu

from ....kernels import linear_cross_entropy, rms_norm
from .case import Case, Inputs, Run, randn

__all__ = ["cases"]

EPS = 1e-6


def cases(device: torch.device) -> list[Case]:
    """OLMo 2 1B's width and vocabulary; on the CPU, the quickstart's."""
    if device.type == "cuda":
        rows, width, vocabulary, tokens = 32768, 2048, 100352, 16384
    else:
        rows, width, vocabulary, tokens = 4096, 512, 260, 4096
    return [
        *(_norm(rows, width, kind) for kind in ("plain", "residual", "gate")),
        _loss(tokens, 2048 if device.type == "cuda" else 128, vocabulary),
    ]


def _norm(rows: int, width: int, kind: str) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        n = 64 if small else rows
        inputs: Inputs = {
            "x": randn(n, width, device=device),
            "weight": randn(width, device=device),
        }
        if kind != "plain":
            inputs["other"] = randn(n, width, device=device)
        return inputs

    def ours(i: Inputs) -> Tensor:
        if kind == "residual":
            return sum(rms_norm(i["x"], i["weight"], EPS, residual=i["other"]))  # type: ignore[return-value]
        out = rms_norm(i["x"], i["weight"], EPS, gate=i.get("other"))
        assert isinstance(out, Tensor)
        return out

    def eager(i: Inputs) -> Tensor:
        other = i.get("other")
        x = i["x"] + other if kind == "residual" else i["x"]
        out = torch.nn.functional.rms_norm(x, (width,), i["weight"], EPS)
        if kind == "residual":
            return out + x
        return out if other is None else out * silu(other)

    touched = {"plain": (2, 3), "residual": (4, 4), "gate": (3, 5)}[kind]
    peers: dict[str, Run | str] = {"F.rms_norm": eager}
    if torch.cuda.is_available():
        peers["torch.compile"] = torch.compile(eager)
    return Case(
        "rms_norm",
        f"{kind}, {rows} rows of {width}",
        make,
        ours,
        oracle=eager,
        peers=peers,
        forward_bytes=lambda i: touched[0] * i["x"].numel() * i["x"].element_size(),
        backward_bytes=lambda i: touched[1] * i["x"].numel() * i["x"].element_size(),
    )


def _loss(tokens: int, width: int, vocabulary: int) -> Case:
    chunk = 4096 if vocabulary > 1000 else None

    def make(device: torch.device, small: bool) -> Inputs:
        n, v = (96, 512) if small else (tokens, vocabulary)
        return {
            "hidden": randn(n, width, device=device),
            "weight": randn(v, width, device=device, scale=width**-0.5),
            "targets": torch.randint(0, v, (n,), device=device),
        }

    def ours(i: Inputs) -> Tensor:
        return linear_cross_entropy(i["hidden"], i["weight"], i["targets"], chunk)[0]

    def eager(i: Inputs) -> Tensor:
        logits = linear(i["hidden"], i["weight"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, i["targets"], reduction="sum")

    return Case(
        "linear_cross_entropy",
        f"{tokens} tokens, width {width}, vocabulary {vocabulary}",
        make,
        ours,
        oracle=eager,
        peers={"F.linear and F.cross_entropy": eager},
    )
