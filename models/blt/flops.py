"""FLOPs of a forward pass for one byte, as the BLT paper counts them (arXiv 2412.09871, equations 13 to 17).

l layers, h width, m keys a query could see, V vocabulary, s bytes a patch, k vectors a patch, w window. The paper takes
every MLP as two matrices of 4h (a SwiGLU of 8/3 h costs the same), halves attention for causality, and counts lookups as free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config

__all__ = ["forward_flops", "transformer_flops"]


def attention_flops(h: int, layers: int, m: float) -> float:
    return 4 * layers * h * (m + 1) / 2


def projection_flops(h: int, layers: int, r: float) -> float:
    """Queries and output of every query, keys and values of r inputs a query."""
    return (2 * r + 2) * 2 * layers * h**2


def transformer_flops(h: int, layers: int, m: float, vocabulary: int) -> float:
    """A transformer's forward pass for one position."""
    mlp = 2 * layers * 2 * h * 4 * h
    head = 2 * h * vocabulary
    return attention_flops(h, layers, m) + projection_flops(h, layers, 1) + mlp + head


def cross_flops(h: int, layers: int, m: float, r: float) -> float:
    """Cross-attention's forward pass for one query that sees m keys, with r keys a query to project."""
    return attention_flops(h, layers, m) + projection_flops(h, layers, r)


def forward_flops(config: Config, context_bytes: int, s: float) -> dict[str, float]:
    """FLOPs a byte by part, without the entropy model; they add up to the paper's number.

    Args:
        context_bytes: of a sample.
        s: mean bytes a patch.
    """
    encoder, latent, decoder = config.encoder, config.latent, config.decoder
    w = min(context_bytes, config.window or context_bytes)
    k = config.patch_vectors
    encoder_cross, decoder_cross = config.cross_layers
    head = 2 * decoder.d_model * 256
    return {
        "local": transformer_flops(encoder.d_model, encoder.n_layers, w, 0)
        + transformer_flops(decoder.d_model, decoder.n_layers, w, 0),
        "cross_attention": cross_flops(encoder.d_model, encoder_cross, s, s / k) * k / s
        + cross_flops(decoder.d_model, decoder_cross, k, k / s),
        "latent": transformer_flops(latent.d_model, latent.n_layers, context_bytes / s, 0) / s,
        "head": head,
    }
