"""The causal regulariser: a small transformer predicts each latent of a picture from those before it, in raster order.

B pictures, N places, d elements of a latent, w width. What the predictor learns from and what the encoder feels are two
things: the predictor sees its loss as it is from the first step, the encoder sees it times lambda. Source: CRT, arXiv
2412.16326, of which the published part names the loss, two layers, lambda and its ramp; the rest is our reading of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from .config import CRTConfig

__all__ = ["Predictor", "causal_loss", "scale_gradient"]

NORM_EPS = 1e-5


class PredictorBlock(nn.Module):
    """Attention and SwiGLU, each after an RMS norm, without biases."""

    def __init__(self, config: CRTConfig) -> None:
        super().__init__()
        w, f = config.width, config.ffn
        self.head_width = config.head_width
        self.norm1 = nn.RMSNorm(w, eps=NORM_EPS)
        self.qkv = nn.Linear(w, 3 * w, bias=False)
        self.o_proj = nn.Linear(w, w, bias=False)
        self.norm2 = nn.RMSNorm(w, eps=NORM_EPS)
        self.gate_up = nn.Linear(w, 2 * f, bias=False)
        self.down = nn.Linear(f, w, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, w)."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Predictor(nn.Module):
    """Latents (B, N, d) to what each was expected to be, (B, N, d) fp32, the first from a learned start."""

    def __init__(self, config: CRTConfig, width: int, tokens: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(width))
        self.input = nn.Linear(width, config.width)
        self.position = nn.Parameter(torch.empty(tokens, config.width))
        self.blocks = nn.ModuleList(PredictorBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.output = nn.Linear(config.width, width)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.start.dtype
        start = self.start.expand(len(x), 1, -1)
        h = self.input(torch.cat((start, x[:, :-1].to(dtype)), 1)) + self.position
        for block in self.blocks:
            h = block(h)
        return self.output(self.norm(h)).float()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values; what comes back through it is multiplied. By 0 nothing comes back at all."""
    return _ScaleGradient.apply(x, factor) if factor else x.detach()


def causal_loss(
    predictor: nn.Module,
    latents: Tensor,
    *,
    encoder_weight: float,
    reduction: Literal["mean_all", "sum_dim", "norm"] = "mean_all",
    target_stopgrad: bool = False,
    input_stopgrad: bool = False,
) -> Tensor:
    """(B,) fp32, unscaled: what the predictor is trained on.

    Args:
        latents: (B, d, h, w) fp32.
        encoder_weight: lambda, on the gradient that reaches the latents.
    """
    x = scale_gradient(latents.flatten(2).transpose(1, 2), encoder_weight)
    expected = predictor(x.detach() if input_stopgrad else x)
    error = (expected - (x.detach() if target_stopgrad else x)).square()
    if reduction == "mean_all":
        return error.mean((1, 2))
    lengths = error.sum(2)
    # The root's slope is endless at 0.
    return (lengths if reduction == "sum_dim" else (lengths + 1e-12).sqrt()).mean(1)
