"""Which implementation of an op runs: `reference` (the definition), `cpu`, or `triton`.

By default the device of the tensors decides. `WEFT_KERNELS=reference|triton` or `use_kernels` overrides it, for
tests and for hunting a wrong number. The choice is made when an op runs, not when it is traced, and holds
for the whole process: a backward pass runs on threads of autograd's own, which see no context of the caller.
Triton runs on the CPU only through its interpreter (`TRITON_INTERPRET=1`, set before Triton is imported).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "FACES",
    "Face",
    "autocast_dtype",
    "has_triton",
    "is_interpreted",
    "pick_face",
    "use_kernels",
    "wanted_face",
    "wide_dtype",
]

Face = Literal["reference", "cpu", "triton"]
FACES = ("reference", "cpu", "triton")

_forced: list[str] = []


@contextlib.contextmanager
def use_kernels(face: str) -> Iterator[None]:
    """Run every op inside by one face, in all threads of the process.

    Args:
        face: `reference`, `cpu`, `triton`, or `auto` to let the device decide again.

    Raises:
        ValueError: another name.
    """
    _check(face, "use_kernels")
    _forced.append(face)
    try:
        yield
    finally:
        _forced.pop()


def pick_face(tensor: Tensor) -> Face:
    """The face that runs an op on `tensor`.

    Raises:
        ValueError: `WEFT_KERNELS` is not a face.
        RuntimeError: Triton was asked for and cannot run here.
    """
    wanted = wanted_face()
    on_gpu = tensor.is_cuda
    if wanted == "auto":
        return ("triton" if has_triton() else "reference") if on_gpu else "cpu"
    if wanted == "triton" and not (has_triton() and (on_gpu or is_interpreted())):
        raise RuntimeError(
            "WEFT_KERNELS=triton: Triton runs on CUDA tensors, or on the CPU with TRITON_INTERPRET=1 set before "
            "the first import; unset WEFT_KERNELS to let the device decide"
        )
    # The fast CPU path is plain torch and so runs anywhere; the definition and it are always at hand.
    return wanted  # type: ignore[return-value]


def wanted_face() -> str:
    """What was asked for, by `use_kernels` or `WEFT_KERNELS`; `auto` where nothing was.

    Raises:
        ValueError: `WEFT_KERNELS` is not a face.
    """
    wanted = _forced[-1] if _forced else os.environ.get("WEFT_KERNELS", "auto")
    _check(wanted, "WEFT_KERNELS")
    return wanted


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check(face: str, where: str) -> None:
    if face not in (*FACES, "auto"):
        raise ValueError(f"{where}: unknown kernels {face!r}; known: auto, {', '.join(FACES)}")


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Type of statistics and accumulators: fp32, or fp64 where an input is."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast gives to products on the device of `tensor`; None where it is off.

    A compiler traces this: `torch.amp.is_autocast_available`, which would know of meta tensors, is not for that.
    """
    kind = tensor.device.type
    # Meta tensors know no autocast.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
