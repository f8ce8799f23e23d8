"""How many bytes BLT's activations take on one rank, by arithmetic alone; imports no torch.

T bytes at once, P = T / s patches, k vectors a patch, c bytes of the compute type. Counts what autograd keeps in eager
mode, as `models/transformer/memory.py` does for its blocks, whose numbers are used here. Used by `trainer/plan.py`.
"""

from __future__ import annotations

from ..transformer import memory as transformer
from ..transformer.memory import Recompute
from .config import Config, LocalConfig, cross_parameters

__all__ = ["activation_bytes", "block_parameters"]


def block_parameters(config: Config) -> int:
    """Parameters of the largest unit that is gathered at a time when weights are sharded."""
    blocks = [
        transformer.block_parameters(config.stack(name))
        for name in ("encoder", "latent", "decoder")
    ]
    return max(*blocks, cross_parameters(config.encoder), cross_parameters(config.decoder))


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch, by part; see the transformer family's."""
    positions = {"encoder": tokens, "latent": round(tokens / config.patch_size), "decoder": tokens}
    kept = recomputed = in_flight = 0
    for name, count in positions.items():
        stack = config.stack(name)
        whole = transformer.block_values(stack)
        held = {
            "none": whole,
            "block": stack.d_model,
            "selective": transformer.matrix_products(stack),
        }
        kept += stack.n_layers * count * held[recompute]
        recomputed = max(recomputed, count * (whole - held[recompute]))
        in_flight = max(in_flight, count * 2 * stack.d_ff)
    for part, layers in zip((config.encoder, config.decoder), config.cross_layers, strict=True):
        vectors = positions["latent"] * config.patch_vectors
        kept += layers * _cross_values(part, tokens, vectors, recompute)
    ends = tokens * (2 * config.encoder.d_model + config.decoder.d_model)
    logits = tokens * config.vocab_size * transformer.logit_bytes(compute_bytes)
    values = {"kept": kept, "recomputed": recomputed, "in_flight": in_flight, "ends": ends}
    found = {name: count * compute_bytes for name, count in values.items()}
    return {**found, "logits": logits}


def _cross_values(part: LocalConfig, tokens: int, vectors: int, recompute: Recompute) -> int:
    """Values that one cross-attention keeps: inputs of both norms, and what is attended with, to and out."""
    inputs = (tokens + vectors) * part.d_model
    if recompute == "block":
        return inputs
    return 2 * inputs + 2 * (tokens + vectors) * part.cross_width
