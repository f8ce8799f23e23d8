"""Rows sorted by modality: one stable sort a batch, and row gathers both ways.

T positions, M modalities. Sorted rows of one modality are one slice, so that its weights need one
matrix product and no index. Sizes are host integers: asking a GPU for them would wait for it.
Source: Liang et al., Mixture-of-Transformers, arXiv 2411.04996, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_same_device

__all__ = ["Routing", "modality_of_rows", "route_by_modality", "route_one_modality"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Routing:
    """Where each position of a batch lies when rows are sorted by modality, those of one in their order; does not change.

    Not a dataclass: FSDP2 rebuilds dataclasses among a block's arguments.

    Attributes:
        order: (T,) int64, the position that each sorted row holds.
        inverse: (T,) int64, the sorted row that holds each position.
        offsets: (M,) int32, where the rows of each modality end; the last is T.
        sizes: rows of each modality, host integers.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    sizes: tuple[int, ...]

    def __init__(
        self, order: Tensor, inverse: Tensor, offsets: Tensor, sizes: Sequence[int]
    ) -> None:
        self.__dict__.update(order=order, inverse=inverse, offsets=offsets, sizes=tuple(sizes))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Routing does not change, so {name} cannot be set; build a new one")

    @property
    def total(self) -> int:
        return self.order.shape[0]

    @property
    def n_modalities(self) -> int:
        return len(self.sizes)

    @property
    def is_identity(self) -> bool:
        """Whether rows lie as positions do because all are of one modality, by host integers alone."""
        return sum(size > 0 for size in self.sizes) <= 1

    def permute(self, x: Tensor) -> Tensor:
        """Rows of x (T, ...) from positions to modalities; the gradient is a gather too. x itself where all is one modality.

        Raises:
            ValueError: x has another number of rows.
        """
        self.check_rows("x", x)
        return x if self.is_identity else _gather_rows(x, self.order, self.inverse)

    def restore(self, x: Tensor) -> Tensor:
        """Rows of x (T, ...) from modalities back to positions: undoes `permute`.

        Raises:
            ValueError: x has another number of rows.
        """
        self.check_rows("x", x)
        return x if self.is_identity else _gather_rows(x, self.inverse, self.order)

    def check_rows(self, name: str, x: Tensor) -> None:
        """Raises: ValueError: x does not have T rows, or is on another device."""
        if x.dim() == 0 or x.shape[0] != self.total:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but the routing has {self.total} rows"
            )
        check_same_device(routing=self.order, **{name: x})

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Routing:
        """The same routing with `change` applied to every tensor."""
        return Routing(change(self.order), change(self.inverse), change(self.offsets), self.sizes)

    def to(self, device: torch.device | str) -> Routing:
        """Copy to `device`; asynchronous when the source is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Routing:
        return self.map_tensors(lambda tensor: tensor.pin_memory())


def route_by_modality(
    modality: Tensor, n_modalities: int, sizes: Sequence[int] | None = None
) -> Routing:
    """Sort positions by modality, keeping their order inside each.

    Args:
        modality: (T,) integers from 0 to n_modalities - 1.
        n_modalities: M; modalities that the batch lacks get no rows.
        sizes: positions of each modality. A data loader knows them; left out, they are counted,
            on the CPU only.

    Raises:
        ValueError: another shape or type, ids out of range, sizes that do not fit, or no sizes for
            a tensor on a GPU. There ids and sizes are checked by an assertion of the device, which
            does not wait and ends the process when it fails.
    """
    _check_arguments(modality, n_modalities, sizes)
    total, device = modality.shape[0], modality.device
    # The compiler and fake tensors have no values to look at either.
    ids, order = torch.sort(modality, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(total, device=device))
    # A uint8 cannot hold every number of modalities, and int32 ends are what grouped_mm takes.
    known = torch.arange(n_modalities, device=device, dtype=torch.int32)
    offsets = torch.searchsorted(ids.int(), known, right=True, out_int32=True)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        sizes = _check_values(ids, offsets, sizes)
    else:
        assert sizes is not None
        _assert_values(ids, offsets, sizes)
    return Routing(order, inverse, offsets, sizes)


def route_one_modality(
    total: int, n_modalities: int = 1, modality: int = 0, device: torch.device | str | None = None
) -> Routing:
    """The routing of `total` positions that are all of one modality, without sorting them.

    Raises:
        ValueError: the modality is not below n_modalities.
    """
    if not 0 <= modality < n_modalities:
        raise ValueError(f"modality is {modality}, expected an id from 0 to {n_modalities - 1}")
    order = torch.arange(total, device=device)
    sizes = [total if m == modality else 0 for m in range(n_modalities)]
    known = torch.arange(n_modalities, device=device)
    offsets = torch.where(known < modality, 0, total).int()
    return Routing(order, order, offsets, sizes)


def modality_of_rows(offsets: Tensor, total: int) -> Tensor:
    """(T,) int32, the modality of each sorted row, without waiting for the device."""
    rows = torch.arange(total, device=offsets.device, dtype=torch.int32)
    return torch.searchsorted(offsets, rows, right=True, out_int32=True)


def _check_arguments(modality: Tensor, n_modalities: int, sizes: Sequence[int] | None) -> None:
    if modality.dim() != 1 or modality.dtype not in INTEGERS:
        found = str(modality.dtype).removeprefix("torch.")
        raise ValueError(
            f"modality is {found} of shape {tuple(modality.shape)}, expected integers of shape (T,)"
        )
    if n_modalities < 1:
        raise ValueError(f"n_modalities is {n_modalities}, expected at least 1")
    if sizes is None:
        if modality.device.type != "cpu" or torch.compiler.is_compiling():
            raise ValueError(
                f"sizes are missing and modality is on {modality.device}, where counting would wait for the "
                "device; pass the positions of each modality as host integers, as the data loader knows them"
            )
        return
    if len(sizes) != n_modalities or any(size < 0 for size in sizes):
        raise ValueError(
            f"sizes is {list(sizes)}, expected {n_modalities} integers that are not negative"
        )
    if sum(sizes) != modality.shape[0]:
        raise ValueError(
            f"sizes add up to {sum(sizes)} but modality has {modality.shape[0]} positions"
        )


def _check_values(ids: Tensor, offsets: Tensor, sizes: Sequence[int] | None) -> list[int]:
    """The sizes as counted, after looking at sorted ids on the CPU."""
    n_modalities = offsets.shape[0]
    if ids.shape[0]:
        least, most = int(ids[0]), int(ids[-1])
        if least < 0 or most >= n_modalities:
            wrong = least if least < 0 else most
            raise ValueError(
                f"modality holds {wrong}, expected ids from 0 to {n_modalities - 1}: a modality without weights"
            )
    counted = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    if sizes is not None and list(sizes) != counted:
        raise ValueError(f"sizes is {list(sizes)} but modality holds {counted} of each")
    return counted


def _assert_values(ids: Tensor, offsets: Tensor, sizes: Sequence[int]) -> None:
    """The same check as an assertion in the device's own queue."""
    if not ids.shape[0]:
        return
    end, fits = 0, ids[0] >= 0
    for modality, size in enumerate(sizes):
        end += size
        fits = fits & (offsets[modality] == end)
    message = "route_by_modality: sizes differ from what modality holds, or an id is out of range"
    torch._assert_async(fits, message)


@torch.library.custom_op("weft::gather_rows", mutates_args=())
def _gather_rows_op(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.index_select(0, index)


@_gather_rows_op.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _gather_rows_op(x, index, inverse)


def _keep_indices(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    # A permutation's transpose is its inverse: no scatter-add, which GPUs do in any order.
    return _gather_rows(grad.contiguous(), inverse, index), None, None


_gather_rows_op.register_autograd(_gather_back, setup_context=_keep_indices)
