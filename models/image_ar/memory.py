"""How many bytes the activations of an autoregressive image model take on one rank; imports no torch. Used by `trainer/plan.py`.

Counts what autograd keeps in eager mode, values a position: the transformer's (`models/transformer/memory.py`), and what
dropout adds, its mask and what it changed.
"""

from __future__ import annotations

from ..transformer.memory import Recompute, logit_bytes
from .config import Config

__all__ = ["activation_bytes", "block_parameters"]

MASK_BYTES = 1


def block_parameters(config: Config) -> int:
    """Parameters of one block, the unit that is gathered at a time when weights are sharded."""
    return config.count_parameters()["blocks"] // config.n_layers


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch, by part; see the transformer family's."""
    d, f, c = config.d_model, config.d_ff, compute_bytes
    masks = 2 * d * MASK_BYTES if config.dropout else 0
    # Of d: both norms' inputs and outputs, rotated q and k, v (whose store holds the unrotated ones too), attended.
    whole = (4 * d + 6 * d + 4 * f) * c + masks
    kept = {"none": whole, "block": d * c, "selective": (7 * d + 2 * f) * c + masks}[recompute]
    return {
        "kept": config.n_layers * tokens * kept,
        "recomputed": 0 if recompute == "none" else tokens * (whole - kept),
        "in_flight": tokens * 2 * f * c,
        "logits": min(tokens, config.loss_chunk_tokens or tokens)
        * config.codebook_size
        * logit_bytes(c),
        "ends": 3 * tokens * d * c,
    }
