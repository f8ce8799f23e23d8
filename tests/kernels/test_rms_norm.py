"""RMS norm against its definition, in value and gradient, and in 16 bits."""

from __future__ import annotations

import math

import pytest
import torch
from weft.kernels import rms_norm
from weft.kernels.rms_norm import rms_norm_reference


def test_value_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    out = rms_norm(x, torch.tensor([1.0, 2.0], dtype=torch.float64), eps=0.5)
    root = math.sqrt(12.5 + 0.5)
    assert out.tolist()[0] == pytest.approx([3 / root, 8 / root], rel=1e-14)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 6)])
def test_gradients_in_float64(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_has_fp32_statistics(weight_dtype: torch.dtype) -> None:
    # The squares of 300 overflow fp16 and lose all digits of a bf16 sum over 4096 channels.
    x = (300 + torch.randn(4, 4096)).bfloat16().requires_grad_()
    weight = (torch.rand(4096) + 0.5).to(weight_dtype).requires_grad_()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    exact = rms_norm_reference(x.detach().double(), weight.detach().double(), 1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=0)
    out.float().square().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, weight_dtype)


def test_fp16_does_not_overflow() -> None:
    assert torch.isfinite(rms_norm(torch.full((1, 8), 6e4).half(), torch.ones(8), 1e-6)).all()
