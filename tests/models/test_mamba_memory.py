"""The activation estimate of Mamba against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mamba_oracle import THREE, mixed
from weft.models import build_model
from weft.models.mamba.config import Config
from weft.models.mamba.memory import activation_bytes, block_parameters

SHAPE: dict[str, Any] = {"vocab_size": 50, "d_model": 64, "n_layers": 1}
TOKENS = 256


def saved_bytes(config: Config) -> int:
    """Distinct storages, parameters left out, that the forward pass saves for the backward pass."""
    model = build_model(config)
    kinds = [0, 1] * 128 if len(config.modalities) > 1 else [0] * TOKENS
    batch = mixed([64] * 4, kinds, TOKENS)
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


@pytest.mark.parametrize("modalities", [("text",), THREE[:2]])
def test_a_block_keeps_what_is_estimated(modalities: tuple[str, ...]) -> None:
    one, three = (Config(**{**SHAPE, "n_layers": n}, modalities=modalities) for n in (1, 3))
    measured = (saved_bytes(three) - saved_bytes(one)) / 2
    estimate = activation_bytes(one, TOKENS, compute_bytes=4, recompute="none")["kept"]
    assert estimate == pytest.approx(measured, rel=0.05)


def test_recomputation_trades_kept_for_recomputed() -> None:
    config = Config(**{**SHAPE, "n_layers": 8})
    none, selective, block = (
        activation_bytes(config, TOKENS, compute_bytes=2, recompute=mode)
        for mode in ("none", "selective", "block")
    )
    assert none["kept"] > selective["kept"] > block["kept"]
    assert none["recomputed"] == 0 < selective["recomputed"] < block["recomputed"]
    assert block_parameters(config) * 8 == config.count_parameters()["blocks"]
