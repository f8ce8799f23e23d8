"""What kernel tests share: faces to run on, distances, and memory that betrays a wrong mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from weft.kernels.faces import has_triton, is_interpreted, use_kernels

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
CAN_RUN_TRITON = has_triton() and (HAS_CUDA or is_interpreted())

needs_triton = pytest.mark.skipif(
    not CAN_RUN_TRITON, reason="Triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter"
)
ALL_FACES = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]
FAST_FACES = ALL_FACES[1:]
"""The faces that are compared with the reference."""


@contextmanager
def on_face(face: str) -> Iterator[torch.device]:
    """Run ops by one face; gives the device to put tensors on."""
    with use_kernels(face):
        yield DEVICE if face == "triton" else torch.device("cpu")


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected; 0 where both are empty or zero."""
    difference = (found.double() - expected.double().to(found.device)).square().sum().sqrt()
    size = expected.double().square().sum().sqrt()
    return float(difference if size == 0 else difference / size.to(difference.device))


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Same shape, no NaN where none is expected, and a small relative RMS distance."""
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, {tuple(expected.shape)}"
    assert torch.isfinite(found).all() == torch.isfinite(expected).all(), f"{name} is not finite"
    distance = relative_rms(found, expected)
    assert distance <= tolerance, f"{name}: relative RMS distance {distance:.2e} > {tolerance:.0e}"


def poisoned(tensor: Tensor, margin: int = 64) -> Tensor:
    """The same values as a view into memory that is NaN (the largest value, for integers) on both sides."""
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    size = tensor.numel()
    memory = torch.full((size + 2 * margin,), poison, dtype=tensor.dtype, device=tensor.device)
    view = memory[margin : margin + size].view(tensor.shape)
    view.copy_(tensor)
    return view


def random_documents(total: int, count: int, seed: int = 0) -> Tensor:
    """(D + 1,) int32 borders of `count` documents (fewer where `total` is small), some of length 1."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(max(0, total - 1), generator=generator)[: max(0, count - 1)] + 1
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), inner.sort().values])
    return torch.cat([borders, torch.tensor([total])]).int() if total else torch.zeros(1).int()


def position_ids_of(cu_seqlens: Sequence[int] | Tensor, total: int) -> Tensor:
    """(T,) int64 positions inside documents."""
    borders = torch.as_tensor(cu_seqlens).long().cpu()
    starts = torch.zeros(total, dtype=torch.int64)
    starts[borders[:-1]] = borders[:-1]
    return torch.arange(total) - starts.cummax(0).values
