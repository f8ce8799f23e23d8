"""How many bytes a transformer's activations take on one rank, by arithmetic alone; imports no torch.

T positions at once, d width, H query and K key/value heads of width hd, f hidden width of the MLP, V vocabulary, c bytes of
the compute type. Counts what autograd keeps in eager mode; a compiled block keeps less. Used by `trainer/plan.py`.
"""

from __future__ import annotations

from typing import Literal

from .config import Config

__all__ = [
    "activation_bytes",
    "block_parameters",
    "block_values",
    "logit_bytes",
    "matrix_products",
]

Recompute = Literal["none", "block", "selective"]


def block_parameters(config: Config) -> int:
    """Parameters of one block, the unit that is gathered at a time when weights are sharded."""
    return config.count_parameters()["blocks"] // config.n_layers


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch, by part.

    Args:
        tokens: positions a rank runs at once.
        compute_bytes: of one activation, 2 for bf16 and 4 for fp32.
        recompute: `parallel.activation_checkpointing`.

    Returns:
        `kept`: what all blocks keep for the backward pass; `recomputed`: one block's, made again while its gradient is
        taken, less what it kept; `in_flight`: gradients of activations inside one block; `logits` and their gradient;
        `ends`: embedding, final norm and the gradient that enters the blocks.
    """
    d, f, c = config.d_model, config.d_ff, compute_bytes
    whole = block_values(config)
    kept = {"none": whole, "block": d, "selective": matrix_products(config)}[recompute]
    return {
        "kept": config.n_layers * tokens * kept * c,
        "recomputed": {"none": 0, "block": whole, "selective": whole - kept}[recompute]
        * tokens
        * c,
        "in_flight": tokens * 2 * f * c,
        "logits": min(tokens, config.loss_chunk_tokens or tokens)
        * config.vocab_size
        * logit_bytes(c),
        "ends": 3 * tokens * d * c,
    }


def block_values(config: Config) -> int:
    """Values a position that autograd keeps in one block without recomputation."""
    d, f, hd = config.d_model, config.d_ff, config.head_width
    q, kv = config.n_heads * hd, config.kv_heads * hd
    attention = 2 * q + 2 * kv  # rotated q and k, v, and the output, which o_proj keeps as well
    before_norm = q + kv if config.qk_norm != "none" else 0
    mlp = 4 * f  # gate, up, silu(gate), and their product
    # Inputs of the attention and of the MLP; the norms keep their own inputs, on outputs or on the stream.
    return attention + before_norm + mlp + 4 * d


def matrix_products(config: Config) -> int:
    """Values a position of the block's input and of what its matrix products and attention gave."""
    q, kv = config.n_heads * config.head_width, config.kv_heads * config.head_width
    return config.d_model + (q + 2 * kv) + q + config.d_model + 2 * config.d_ff + config.d_model


def logit_bytes(compute_bytes: int) -> int:
    """Logits in the compute type, and fp32 work of the loss's gradient."""
    return compute_bytes + (4 if compute_bytes == 4 else 8)
