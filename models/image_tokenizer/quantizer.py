"""The codebook: the nearest code of each latent, with the gradient passed straight through.

B pictures of N places, d elements, K codes. All of it is fp32 under any precision: in bf16 another code comes out nearest for a
few of a hundred latents. Sources: VQ-VAE, arXiv 1711.00937; normalised lookup, arXiv 2110.04627.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from .config import QuantizerConfig

__all__ = ["Quantized", "Quantizer", "nearest_codes"]

EPS = 1e-6
"""Shortest length a latent is divided by: torch's 1e-12 would give one of zeros a gradient of 1e12."""


class Quantized(NamedTuple):
    """What became of latents.

    Args:
        values: (B, d, h, w) fp32, codes in value, latents in gradient.
        codes: (B, h, w) int64.
        latents: (B, d, h, w) fp32 that the codes were looked up for: of length 1 where lookups are normalised.
        codebook, commitment: (B,) fp32, mean squared distance; the first trains codes alone, the second latents alone.
    """

    values: Tensor
    codes: Tensor
    latents: Tensor
    codebook: Tensor
    commitment: Tensor


class Quantizer(nn.Module):
    """See the module."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Parameter(torch.empty(config.codes, config.width))

    def table(self) -> Tensor:
        """(K, d) fp32 as it is looked up in."""
        table = self.codebook.float()
        return normalize(table, dim=1, eps=EPS) if self.config.normalise else table

    def forward(self, z: Tensor) -> Quantized:
        """Latents (B, d, h, w) of any type."""
        with torch.autocast(z.device.type, enabled=False):
            u = z.float()
            if self.config.normalise:
                u = normalize(u, dim=1, eps=EPS)
            table = self.table()
            rows = u.detach().movedim(1, -1)
            codes = nearest_codes(
                rows.reshape(-1, rows.shape[-1]),
                table.detach(),
                is_normalised=self.config.normalise,
                chunk_values=self.config.chunk_values,
            ).view(rows.shape[:-1])
            q = embedding(codes, table).movedim(-1, 1)
            codebook = (q - u.detach()).square().mean((1, 2, 3))
            commitment = (q.detach() - u).square().mean((1, 2, 3))
            return Quantized(u + (q - u).detach(), codes, u, codebook, commitment)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 to (B, d, h, w) fp32."""
        return embedding(codes, self.table()).movedim(-1, 1)


@torch.no_grad()
def nearest_codes(rows: Tensor, table: Tensor, *, is_normalised: bool, chunk_values: int) -> Tensor:
    """(T,) int64 of the nearest of K codes; of equally near ones the first.

    Args:
        rows: (T, d) fp32.
        table: (K, d) fp32.
        is_normalised: all are of length 1, so that the nearest is the one with the largest product.
        chunk_values: distances held at a time.
    """
    offset = None
    if not is_normalised:
        # Around the codes' mean: products of large common parts would swallow the differences.
        mean = table.mean(0)
        rows, table = rows - mean, table - mean
        offset = table.square().sum(1) / 2
    step = max(1, chunk_values // len(table))
    found = []
    for part in rows.split(step):
        closeness = part @ table.T
        if offset is not None:
            closeness = closeness - offset
        found.append(closeness.argmax(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=rows.device)
