"""How many bytes the activations take on one rank, by arithmetic alone; imports no torch.

As the transformer family's, whose numbers are used here, with what sorting by modality and an image stem add. Used by
`trainer/plan.py`.
"""

from __future__ import annotations

from ..multimodal.settings import ImageConfig
from ..transformer import memory as transformer
from ..transformer.memory import Recompute
from .config import Config

__all__ = ["activation_bytes", "block_parameters"]


def block_parameters(config: Config) -> int:
    """Parameters of one block, the unit that is gathered at a time when weights are sharded."""
    return config.count_parameters()["blocks"] // config.n_layers


def activation_bytes(
    config: Config, tokens: int, *, compute_bytes: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes held at the peak of one micro-batch, by part; see the transformer family's.

    `ends` has the stem, with patches in the share of `image.position_share`. A frozen base saves nothing here: gradients pass
    through it.
    """
    found = transformer.activation_bytes(
        config.dense, tokens, compute_bytes=compute_bytes, recompute=recompute
    )
    # The attention's output is kept in the order of positions, and sorted for the projection after it.
    attended = config.n_heads * config.head_width if len(config.modalities) > 1 else 0
    again = tokens * attended * compute_bytes
    if recompute == "none":
        found["kept"] += config.n_layers * again
    else:
        found["recomputed"] += again
    if config.image is not None:
        patches = round(tokens * config.image.position_share)
        found["ends"] += patches * stem_values(config.image, config.d_model) * compute_bytes
        found["logits"] = round(found["logits"] * (1 - config.image.position_share))
    return found


def stem_values(image: ImageConfig, d_model: int) -> int:
    """Values a patch position that autograd keeps in the stem, way in and way out."""
    ends = 2 * image.patch_values + d_model * (2 if image.skip else 1)
    if image.stem == "linear":
        return ends
    u, area = image.unet, image.patch**2
    # Of a residual block: both norms' inputs, both activations' and both convolutions'; on the way up the first three are of
    # twice the width, and the shortcut's input is one more.
    down, up = 6, 6 + 4
    attention = 6  # norm, queries, keys and values, mixed, and the input
    outer = u.outer_width * area * (u.blocks * (down + up) + 3)
    inner = u.inner_width * (u.blocks * (down + up + 2 * attention) + 3)
    return ends + outer + inner
