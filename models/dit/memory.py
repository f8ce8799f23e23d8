"""How many bytes the activations of a diffusion transformer take on one rank; imports no torch. Used by `trainer/plan.py`.

A position of the data is an image, here of the mean number of tokens at the expected shares of the ratios. Counts what
autograd keeps in eager mode, run by run.
"""

from __future__ import annotations

from ..transformer.memory import Recompute
from .config import Config

__all__ = ["activation_bytes", "block_parameters"]

FLOAT_BYTES = 4


def block_parameters(config: Config) -> int:
    """Parameters of one block, the unit that is gathered at a time when weights are sharded."""
    return config.count_parameters()["blocks"] // config.n_layers


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch of `tokens` images, by part; see the transformer family's."""
    d, f, c = config.d_model, config.d_ff, compute_bytes
    rows = round(tokens * config.mean_image_tokens)
    # Of d: the stream at both norms, both normalised, both modulated, q, k and v, attended, what both gates multiply.
    whole = (12 * d + 2 * f) * c
    # The input, q, k and v, attended, the output of the projection, and the MLP's two.
    kept = {"none": whole, "block": d * c, "selective": (7 * d + f) * c}[recompute]
    values = config.patch**2 * (2 * config.channels + config.out_channels)
    return {
        "kept": config.n_layers * rows * kept,
        "recomputed": 0 if recompute == "none" else rows * (whole - kept),
        "in_flight": rows * 2 * f * c,
        # Latents, noise and predictions in fp32, with the predictions' gradient.
        "logits": rows * 2 * values * FLOAT_BYTES,
        "ends": rows * 4 * d * c,
    }
