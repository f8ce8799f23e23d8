"""Cases of the selective scan and of the convolution before it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ....kernels import causal_conv1d, selective_scan
from .case import Case, Inputs, Run, missing, randn

__all__ = ["cases"]

STATE = 16


def cases(device: torch.device) -> list[Case]:
    """The shapes of models people train; on the CPU, of models people debug."""
    if device.type == "cuda":
        return [
            *(_scan(*shape) for shape in ((8, 4096, 4096, 1), (8, 4096, 4096, 128))),
            *(_scan(*shape) for shape in ((32, 2048, 1536, 1), (1, 65536, 4096, 1))),
            _scan(4, 2048, 768, 1),
            _convolution(8, 4096, 4096, 1),
            _convolution(8, 4096, 4096, 128),
        ]
    return [_scan(1, 2048, 512, 1), _scan(1, 2048, 512, 16), _convolution(4, 2048, 512, 16)]


def _positions(batch: int, length: int, documents: int, device: torch.device) -> Tensor | None:
    """(B, L) positions in rows of equal documents; None for one document a row."""
    if documents == 1:
        return None
    return (torch.arange(length, device=device) % max(1, length // documents)).expand(batch, -1)


def _scan(batch: int, length: int, channels: int, documents: int) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        b, n, d = (1, min(length, 512), 64) if small else (batch, length, channels)
        rates = torch.arange(1, STATE + 1, device=device).float().repeat(d, 1)
        return {
            "u": randn(b, n, d, device=device),
            "delta": randn(b, n, d, device=device, scale=0.5),
            "A": (-rates).requires_grad_(),
            "B": randn(b, n, STATE, device=device),
            "C": randn(b, n, STATE, device=device),
            "D": randn(d, device=device, dtype=torch.float32),
            "z": randn(b, n, d, device=device),
            "delta_bias": randn(d, device=device, dtype=torch.float32),
            "position_ids": _positions(b, n, documents, device),
        }

    def ours(i: Inputs) -> Tensor:
        out = selective_scan(
            *(i[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")),
            delta_softplus=True,
            position_ids=i["position_ids"],
        )
        assert isinstance(out, Tensor)
        return out

    one = "" if documents == 1 else f", {documents} documents a row"
    peers: dict[str, Run | str] = {"mamba-ssm": missing("mamba_ssm") or _mamba_scan}
    if documents > 1:
        peers = {"the same, one document a row": lambda i: ours({**i, "position_ids": None})}
    elif channels <= 512:
        peers["a step at a time"] = functools.partial(_on_reference, ours)
    return Case(
        "selective_scan",
        f"B {batch}, L {length}, D {channels}, N {STATE}{one}",
        make,
        ours,
        peers=peers,
        forward_bytes=lambda i: 4 * _size(i["u"]),
        backward_bytes=lambda i: 7 * _size(i["u"]),
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_reference(run: Run, inputs: Inputs) -> Tensor:
    from ....kernels.faces import use_kernels

    with use_kernels("reference"):
        return run(inputs)


def _mamba_scan(i: Inputs) -> Tensor:
    """Its layout is (B, D, L): the transposes are views, its own copies are part of using it here."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    out = selective_scan_fn(
        *(i[name].transpose(1, 2).contiguous() for name in ("u", "delta")),
        i["A"],
        *(i[name].transpose(1, 2).contiguous() for name in ("B", "C")),
        i["D"],
        i["z"].transpose(1, 2).contiguous(),
        i["delta_bias"],
        delta_softplus=True,
    )
    return out.transpose(1, 2)


def _convolution(batch: int, length: int, channels: int, documents: int) -> Case:
    def make(device: torch.device, small: bool) -> Inputs:
        b, n, d = (1, min(length, 512), 64) if small else (batch, length, channels)
        return {
            "x": randn(b, n, d, device=device),
            "weight": randn(d, 4, device=device),
            "bias": randn(d, device=device),
            "position_ids": _positions(b, n, documents, device),
        }

    def ours(i: Inputs) -> Tensor:
        out = causal_conv1d(i["x"], i["weight"], i["bias"], "silu", position_ids=i["position_ids"])
        assert isinstance(out, Tensor)
        return out

    one = "" if documents == 1 else f", {documents} documents a row"
    peers: dict[str, Run | str] = {"causal-conv1d": missing("causal_conv1d") or _peer_convolution}
    if documents == 1:
        peers["F.conv1d and silu"] = _torch_convolution
    return Case(
        "causal_conv1d",
        f"B {batch}, L {length}, D {channels}, width 4{one}",
        make,
        ours,
        peers=peers,
        forward_bytes=lambda i: 2 * _size(i["x"]),
        backward_bytes=lambda i: 3 * _size(i["x"]),
    )


def _peer_convolution(i: Inputs) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    x = i["x"].transpose(1, 2)
    documents: Any = None
    if i["position_ids"] is not None:
        documents = (i["position_ids"] == 0).cumsum(1).int() - 1
    return causal_conv1d_fn(
        x, i["weight"], i["bias"], seq_idx=documents, activation="silu"
    ).transpose(1, 2)


def _torch_convolution(i: Inputs) -> Tensor:
    x = torch.nn.functional.pad(i["x"].transpose(1, 2), (3, 0))
    out = torch.nn.functional.conv1d(x, i["weight"][:, None], i["bias"], groups=x.shape[1])
    return torch.nn.functional.silu(out).transpose(1, 2)
