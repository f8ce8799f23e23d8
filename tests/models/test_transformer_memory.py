"""The activation estimate against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packing import packed
from weft.models import build_model
from weft.models.transformer.config import Config
from weft.models.transformer.memory import activation_bytes, block_parameters

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "n_layers": 1,
    "d_model": 64,
    "n_heads": 4,
    "d_ff": 160,
    "attention": "sdpa",
}
TOKENS = 256


def saved_bytes(config: Config, dtype: torch.dtype) -> int:
    """Distinct storages, parameters left out, that the forward pass saves for the backward pass."""
    model = build_model(config).to(dtype)
    batch = packed(torch.randint(0, 32, (TOKENS,)), [TOKENS // 4] * 4, TOKENS // 4)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("variant", [{}, {"norm": "pre", "qk_norm": "none"}])
def test_a_block_keeps_what_is_estimated(
    variant: dict[str, Any], dtype: torch.dtype, size: int
) -> None:
    one, three = (Config(**{**SHAPE, **variant, "n_layers": n}) for n in (1, 3))
    measured = (saved_bytes(three, dtype) - saved_bytes(one, dtype)) / 2
    estimate = activation_bytes(one, TOKENS, compute_bytes=size, recompute="none")["kept"]
    assert estimate == pytest.approx(measured, rel=0.02)


def test_recomputation_trades_kept_for_recomputed() -> None:
    config = Config(**{**SHAPE, "n_layers": 8})
    none, selective, block = (
        activation_bytes(config, TOKENS, compute_bytes=2, recompute=mode)
        for mode in ("none", "selective", "block")
    )
    assert none["kept"] > selective["kept"] > block["kept"]
    assert block["kept"] == 8 * TOKENS * 64 * 2
    assert none["recomputed"] == 0
    assert block["recomputed"] == none["kept"] // 8
    assert selective["recomputed"] == none["kept"] // 8 - selective["kept"] // 8


def test_logits_of_one_chunk() -> None:
    whole = activation_bytes(Config(**SHAPE), TOKENS, compute_bytes=2, recompute="none")
    chunked = Config(**SHAPE, loss_chunk_tokens=TOKENS // 4)
    part = activation_bytes(chunked, TOKENS, compute_bytes=2, recompute="none")
    assert whole["logits"] == 4 * part["logits"] == TOKENS * 32 * 10


def test_block_parameters() -> None:
    # OLMo 2 7B, as published.
    config = Config(n_layers=32, d_model=4096, n_heads=32, d_ff=11008)
    assert block_parameters(config) == 202_391_552
