"""Rotary positions against complex numbers, and Llama 3's stretch against transformers'."""

from __future__ import annotations

import cmath

import pytest
import torch
from weft.kernels import RotaryTable, apply_rotary, rotary_frequencies, rotary_table


def test_rotation_is_a_complex_product_of_channel_halves() -> None:
    positions, hd, theta = torch.tensor([0, 3, 1000]), 6, 50.0
    x = torch.randn(3, 2, hd, dtype=torch.float64)
    frequencies = rotary_frequencies(hd, theta, dtype=torch.float64)
    out = apply_rotary(x, rotary_table(positions, frequencies))
    for t, position in enumerate(positions.tolist()):
        for head in range(2):
            for i in range(hd // 2):
                turn = cmath.exp(1j * position * theta ** (-2 * i / hd))
                value = complex(x[t, head, i], x[t, head, i + hd // 2]) * turn
                assert out[t, head, i].item() == pytest.approx(value.real, abs=1e-10)
                assert out[t, head, i + hd // 2].item() == pytest.approx(value.imag, abs=1e-10)


def test_gradient_in_float64() -> None:
    table = rotary_table(torch.arange(4), rotary_frequencies(6, 100.0, dtype=torch.float64))
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: apply_rotary(a, table), (x,))


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    frequencies = rotary_frequencies(8, 10.0, dtype=torch.float64)

    def score(query: int, key: int) -> float:
        turned = [
            apply_rotary(x, rotary_table(torch.tensor([p]), frequencies))
            for x, p in ((q, query), (k, key))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-12)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_llama3_stretch_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope), "cpu"
    )
    ours = rotary_frequencies(128, 500000.0, factor=32.0)
    assert torch.equal(ours, theirs)
    plain = rotary_frequencies(128, 500000.0)
    ratio = plain / ours
    assert ratio[0] == 1
    assert ratio[-1] == 32
    assert ((ratio > 1.01) & (ratio < 31.9)).any()


def test_16_bit_input_is_turned_in_fp32() -> None:
    table = rotary_table(torch.arange(3990, 4000), rotary_frequencies(8, 1e4))
    x = torch.randn(10, 2, 8).bfloat16()
    out = apply_rotary(x, table)
    assert out.dtype == torch.bfloat16
    exact = apply_rotary(x.double(), RotaryTable(table.cos.double(), table.sin.double()))
    # Rounding of the result alone; bf16 angles near 4000 would be off by whole turns.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
