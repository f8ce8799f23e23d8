"""Argument checks shared by the ops: one line that names the argument, what was found and what was expected.

Values on a GPU are never looked at, because looking waits for the device; shapes, types and devices are checked everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_cu_seqlens", "check_documents", "check_dtype", "check_same_device", "check_shape"]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Raises: ValueError: another shape; None stands for any size."""
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        shown = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({shown})")


def check_dtype(name: str, tensor: Tensor, expected: Sequence[torch.dtype] = FLOATING) -> None:
    """Raises: ValueError: a type that is not among `expected`."""
    if tensor.dtype not in expected:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {known}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises: ValueError: two of the named tensors are on different devices."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given
    for name in others:
        if given[name].device != given[first].device:
            raise ValueError(
                f"{name} is on {given[name].device} and {first} on {given[first].device}; move them to one device"
            )


def check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Document borders: int32, one-dimensional, from 0 to `total`, strictly increasing.

    Raises:
        ValueError: not so. The values themselves are looked at on the CPU only.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens is {str(cu_seqlens.dtype).removeprefix('torch.')} of shape {tuple(cu_seqlens.shape)}, "
            "expected int32 of shape (documents + 1,)"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    borders = cu_seqlens.tolist()
    if not borders or borders[0] != 0:
        raise ValueError(f"cu_seqlens starts at {borders[0] if borders else 'nothing'}, expected 0")
    if borders[-1] != total:
        raise ValueError(f"cu_seqlens ends at {borders[-1]}, expected the total length {total}")
    for before, after in itertools.pairwise(borders):
        if after <= before:
            raise ValueError(f"cu_seqlens goes from {before} to {after}; it must increase strictly")


def check_documents(
    rows: int, length: int, cu_seqlens: Tensor | None, position_ids: Tensor | None
) -> None:
    """Where documents start in rows of tokens: by their borders, by positions inside them, or nowhere.

    Args:
        cu_seqlens: (documents + 1,) int32, borders in the rows * length tokens laid end to end, every row's included.
        position_ids: (rows, length) or (rows * length,), int64 or int32.

    Raises:
        ValueError: both are given, or one that does not fit. Borders themselves are looked at on the CPU only.
    """
    total = rows * length
    if position_ids is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens and position_ids are both given; they say the same, give one"
            )
        check_dtype("position_ids", position_ids, (torch.int64, torch.int32))
        check_shape(
            "position_ids", position_ids, (total,) if position_ids.dim() == 1 else (rows, length)
        )
    if cu_seqlens is None:
        return
    check_cu_seqlens(cu_seqlens, total)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    missing = set(range(0, total, max(length, 1))) - set(cu_seqlens.tolist())
    if missing:
        raise ValueError(
            f"cu_seqlens has no border at {min(missing)}, where a row of {length} tokens starts"
        )
