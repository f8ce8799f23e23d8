"""How many bytes an image tokenizer's activations take on one rank, by arithmetic alone; imports no torch.

Counts what autograd keeps in eager mode for encoder and decoder, which are most of it: inputs of convolutions, norms and
activations. Nested: images are spread over the ratios evenly. Used by `trainer/plan.py`.
"""

from __future__ import annotations

from typing import Literal

from .accounting import layers
from .config import Config

__all__ = ["activation_bytes", "block_parameters"]

Recompute = Literal["none", "block", "selective"]
DISCRIMINATOR_SHARE = 2
"""Values that the discriminator keeps, in units of one feature map of its first layer."""


def block_parameters(config: Config) -> int:
    """Parameters of the largest unit that is gathered at a time when weights are sharded."""
    sizes: dict[str, int] = {}
    for layer in layers(config):
        if layer.unit:
            name = f"{layer.part} {layer.unit}"
            sizes[name] = sizes.get(name, 0) + layer.parameters
    return max(sizes.values())


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch, by part; see the transformer family's.

    Args:
        tokens: pictures.
    """
    units: dict[str, float] = {}
    ends = inputs = widest = 0.0
    seen: set[str] = set()
    for layer in layers(config):
        values = 0.0
        for ratio in layer.ratios:
            places = (config.padded_size // (layer.stride or ratio)) ** 2
            values += tokens * layer.kept * places / len(config.all_ratios)
        widest = max(widest, values)
        if not layer.unit:
            ends += values
            continue
        name = f"{layer.part} {layer.unit}"
        units[name] = units.get(name, 0.0) + values
        if name not in seen:
            # What enters a unit: half of what its first norm and activation keep.
            seen.add(name)
            inputs += values / 2
    # Only whole units are recomputed: a selective policy keeps products of matrices, and here are none to speak of.
    kept = {"none": sum(units.values()), "block": inputs, "selective": inputs}[recompute]
    again = 0.0 if recompute == "none" else max(units.values())
    pictures = 4 * tokens * config.in_channels * config.size**2
    if config.adversarial is not None:
        pictures += DISCRIMINATOR_SHARE * tokens * config.adversarial.width * config.size**2 // 4
    return {
        "kept": round(kept * compute_bytes),
        "recomputed": round(again * compute_bytes),
        "in_flight": round(2 * widest * compute_bytes),
        "logits": pictures * 4,
        "ends": round(ends * compute_bytes),
    }
