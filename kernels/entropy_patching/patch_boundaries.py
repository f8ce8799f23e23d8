"""Where patches of bytes start, computed on the device without waiting for it.

T positions of a packed sequence, P patches at most. Whether position t starts a patch depends on what comes before t
in its own document and on nothing else, so that the boundaries of a prefix never change when more bytes come: that is
what makes generation agree with training. Source: Byte Latent Transformer, arXiv 2412.09871, section 2.

Read `patch_by_definition` in patch_boundaries_plain.py first: it is the definition, as a loop.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face

__all__ = ["PATCH_SCHEMES", "Patches", "check_patches", "patch_boundaries"]

PATCH_SCHEMES = ("entropy", "rise", "both", "stride", "space")
WHOLE = (torch.int64, torch.int32)
LARGEST = 2**31 - 1
POSITION_LIMIT = 2**31 - 2**16
"""Positions are int32 on the device, with room for the last block."""


class Patches(NamedTuple):
    """Patches of a packed sequence; every tensor is on the device and has a shape known to the host.

    Attributes:
        is_start: (T,) bool.
        patch_ids: (T,) int32, counting up over the whole sequence; P where the position has no patch (overflow).
        decoder_ids: (T,) int32, the last patch that is complete before the *next* byte, which is the patch a byte
            reads to predict its successor: its own where the next byte starts a patch, else the one before; -1 where
            the document has none yet. For the last position of a document the rule is asked about the byte to come.
        starts: (P,) int32, T for the patches that are not there.
        lengths: (P,) int32, 0 for the patches that are not there.
        count: () int32, how many there are.
        overflow: () int32, how many more there should have been; see `check_patches`.
    """

    is_start: Tensor
    patch_ids: Tensor
    decoder_ids: Tensor
    starts: Tensor
    lengths: Tensor
    count: Tensor  # type: ignore[assignment]
    overflow: Tensor


def patch_boundaries(
    position_ids: Tensor,
    max_patches: int,
    scheme: str = "entropy",
    *,
    entropy: Tensor | None = None,
    tokens: Tensor | None = None,
    threshold: float | None = None,
    rise: float | None = None,
    stride: int | None = None,
    max_length: int | None = None,
    forced_starts: int = 2,
    byte_offset: int = 4,
) -> Patches:
    """Split a packed sequence into patches.

    With p the position in the document and H[t] the entropy of the prediction made *at* t, which is about byte t+1,
    position t starts a patch where `p < forced_starts`, or where

    | scheme    | condition                                                                            |
    |-----------|--------------------------------------------------------------------------------------|
    | `entropy` | `H[t-1] > threshold`                                                                 |
    | `rise`    | `H[t-1] - H[t-2] > rise` (the approximate monotonic rule); false where p = 1         |
    | `both`    | both of them                                                                         |
    | `stride`  | `(p - forced_starts + 1) % stride == 0`                                              |
    | `space`   | byte t-1 is space-like and byte t-2 (of the document) is not, or t-1 is a special id |

    Space-like is all but `0-9A-Za-z` and UTF-8 continuation bytes; ids below `byte_offset` are special. A patch longer
    than `max_length` is cut: t also starts one where `(t - s) % max_length == 0`, s being the last start made by the
    rules above. Entropies are compared in fp32, strictly; NaN starts nothing.

    A new document always starts a patch, and no comparison looks over its border. The default of two forced starts is
    the published convention: the first byte (normally the begin-of-sequence id) is a patch by itself, so that
    every byte has a complete patch of its document to read. The released code forces a third start under `rise`
    and `both` (it drops H of the first position before taking differences): 3 reproduces it.

    Overflow: patch `max_patches - 1` takes in the rest of its document, and later documents have no patches (`patch_ids`
    is `max_patches`, `decoder_ids` is -1), so that nothing ever leaks; `overflow` counts what was lost.

    Args:
        position_ids: (T,) int64 or int32, positions inside documents, 0 at every start. The first position counts
            as the start of a document whatever it holds.
        max_patches: P, the size of the padded outputs.
        entropy: (T,), floating, for `entropy`, `rise` and `both`.
        tokens: (T,) int64 or int32, ids of bytes (byte + byte_offset), for `space`.
        threshold: theta_g in nats, for `entropy` and `both`.
        rise: theta_r in nats, for `rise` and `both`.
        stride: bytes a patch, for `stride`.
        max_length: longest patch, or None.
        forced_starts: how many positions at the start of a document each start a patch, at least 1.
        byte_offset: id of byte 0.

    Raises:
        ValueError: an unknown scheme, what it needs is missing or what it ignores is given, sizes out of range, or
            tensors that do not fit.
    """
    _check_numbers(scheme, max_patches, threshold, rise, stride, max_length, forced_starts)
    _check_tensors(scheme, position_ids, entropy, tokens)
    outputs = torch.ops.weft.patch_boundaries(
        position_ids,
        None if entropy is None else entropy.detach(),
        tokens,
        scheme,
        max_patches,
        threshold or 0.0,
        rise or 0.0,
        stride or 0,
        max_length or 0,
        forced_starts,
        byte_offset,
    )
    return Patches(*outputs)


def check_patches(patches: Patches) -> None:
    """Look whether all patches fitted; waits for the device, so call it where a step ends anyway.

    Raises:
        ValueError: they did not.
    """
    missing = int(patches.overflow)
    if missing:
        room = patches.starts.shape[0]
        raise ValueError(
            f"max_patches is {room} but the batch has {room + missing} patches; raise max_patches, or the threshold "
            "so that patches get longer"
        )


def _check_numbers(
    scheme: str,
    max_patches: int,
    threshold: float | None,
    rise: float | None,
    stride: int | None,
    max_length: int | None,
    forced_starts: int,
) -> None:
    if scheme not in PATCH_SCHEMES:
        raise ValueError(f"unknown patch scheme {scheme!r}; known: {', '.join(PATCH_SCHEMES)}")
    wanted = {
        "threshold": (threshold, scheme in ("entropy", "both")),
        "rise": (rise, scheme in ("rise", "both")),
        "stride": (stride, scheme == "stride"),
    }
    for name, (value, is_needed) in wanted.items():
        if is_needed and value is None:
            raise ValueError(f"{name} is None; patch scheme {scheme!r} needs it")
        if value is not None and not is_needed:
            raise ValueError(f"{name} is {value}, but patch scheme {scheme!r} has no use for it")
        if value is not None and value != value:
            raise ValueError(f"{name} is NaN, expected a number")
    sizes = {
        "max_patches": max_patches,
        "stride": stride,
        "max_length": max_length,
        "forced_starts": forced_starts,
    }
    for name, size in sizes.items():
        if size is not None and not 1 <= size <= LARGEST:
            raise ValueError(f"{name} is {size}, expected 1 to {LARGEST}")


def _check_tensors(
    scheme: str, position_ids: Tensor, entropy: Tensor | None, tokens: Tensor | None
) -> None:
    check_shape("position_ids", position_ids, (None,))
    check_dtype("position_ids", position_ids, WHOLE)
    total = position_ids.shape[0]
    if total > POSITION_LIMIT:
        raise ValueError(f"position_ids has {total} positions, expected at most {POSITION_LIMIT}")
    if entropy is None and scheme in ("entropy", "rise", "both"):
        raise ValueError(f"entropy is None; patch scheme {scheme!r} needs it")
    if tokens is None and scheme == "space":
        raise ValueError("tokens is None; patch scheme 'space' needs it")
    if entropy is not None:
        check_shape("entropy", entropy, (total,))
        check_dtype("entropy", entropy)
    if tokens is not None:
        check_shape("tokens", tokens, (total,))
        check_dtype("tokens", tokens, WHOLE)
    check_same_device(position_ids=position_ids, entropy=entropy, tokens=tokens)


def _new_outputs(position_ids: Tensor, max_patches: int) -> tuple[Tensor, ...]:
    """is_start, patch_ids, decoder_ids, starts, ends, count, overflow: those of a sequence without patches."""
    total, device = position_ids.shape[0], position_ids.device

    def filled(shape: tuple[int, ...], value: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=device)

    return (
        torch.zeros(total, dtype=torch.bool, device=device),
        filled((total,), max_patches),
        filled((total,), -1),
        filled((max_patches,), total),
        filled((max_patches,), total),
        filled((), 0),
        filled((), 0),
    )


@torch.library.custom_op("weft::patch_boundaries", mutates_args=())
def _patch_boundaries(
    position_ids: Tensor,
    entropy: Tensor | None,
    tokens: Tensor | None,
    scheme: str,
    max_patches: int,
    threshold: float,
    rise: float,
    stride: int,
    max_length: int,
    forced_starts: int,
    byte_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _new_outputs(position_ids, max_patches)
    if position_ids.shape[0] > 0:
        # Thresholds are fp32 like what they are compared with, on every face.
        to_fp32 = ctypes.c_float
        levels = (to_fp32(threshold).value, to_fp32(rise).value)
        numbers = (*levels, stride, max_length, forced_starts, byte_offset)
        face = pick_face(position_ids)
        if face == "triton":
            from .patch_boundaries_triton import launch_patch_boundaries

            launch_patch_boundaries(position_ids, entropy, tokens, scheme, numbers, outputs)
        elif face == "cpu":
            from .patch_boundaries_plain import patch_by_scans

            patch_by_scans(position_ids, entropy, tokens, scheme, numbers, outputs)
        else:
            from .patch_boundaries_plain import patch_by_definition

            patch_by_definition(position_ids, entropy, tokens, scheme, numbers, outputs)
    is_start, patch_ids, decoder_ids, starts, ends, count, overflow = outputs
    return is_start, patch_ids, decoder_ids, starts, ends - starts, count, overflow


@_patch_boundaries.register_fake
def _(
    position_ids: Tensor,
    entropy: Tensor | None,
    tokens: Tensor | None,
    scheme: str,
    max_patches: int,
    threshold: float,
    rise: float,
    stride: int,
    max_length: int,
    forced_starts: int,
    byte_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(position_ids, max_patches)  # type: ignore[return-value]
