"""How many bytes a Mamba's activations take on one rank, by arithmetic alone; imports no torch.

T positions at once, d width, E inner width, N states, R rank of the step sizes, V vocabulary, c bytes of the compute type.
Counts what autograd keeps in eager mode. Used by `trainer/plan.py`.
"""

from __future__ import annotations

from ..transformer.memory import Recompute, logit_bytes
from .config import Config

__all__ = ["activation_bytes", "block_parameters"]

STATE_SPACING = 16
"""Positions from one state that the scan keeps to the next, fp32 (`kernels/selective_scan/reference.py`)."""


def block_parameters(config: Config) -> int:
    """Parameters of one block, the unit that is gathered at a time when weights are sharded."""
    return config.count_parameters()["blocks"] // config.n_blocks


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch, by part; see the transformer family's. A stem's are not counted."""
    d, c = config.d_model, compute_bytes
    stream = d * (4 if config.residual_fp32 else c)
    whole = _block_bytes(config, c, stream)
    kept = {"none": whole, "block": stream, "selective": stream + _product_bytes(config, c)}
    held = kept[recompute]
    rows = min(tokens, config.loss_chunk_tokens or tokens)
    return {
        "kept": config.n_blocks * tokens * held,
        "recomputed": tokens * (0 if recompute == "none" else whole - held),
        "in_flight": tokens * 4 * config.d_inner * c,
        "logits": rows * config.vocab_size * logit_bytes(c),
        "ends": tokens * (2 * stream + d * c),
    }


def _block_bytes(config: Config, c: int, stream: int) -> int:
    """Bytes a position that autograd keeps in one block without recomputation."""
    inner, states = config.d_inner, config.d_state
    small = config.rank + 2 * states
    # x and z as one product, the convolution's output, the step sizes, and the scan's output.
    values = 2 * inner + inner + inner + inner + small + config.d_model
    total = stream + values * c + 4 * inner * states // STATE_SPACING
    if len(config.modalities) > 1:
        # The convolution's output sorted as well, B and C at their positions, and step sizes in fp32.
        total += inner * c + 2 * states * c + inner * (4 - c)
    return total


def _product_bytes(config: Config, c: int) -> int:
    """Bytes a position of what a block's matrix products and its scan gave."""
    inner, states = config.d_inner, config.d_state
    values = 2 * inner + config.rank + 2 * states + inner + inner + config.d_model
    return values * c + 4 * inner * states // STATE_SPACING
