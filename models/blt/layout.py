"""Angles and borders of bytes and patches, derived anew in each forward from what is on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import PackedLayout, Patches, RotaryTable, rotary_frequencies, rotary_table
from ..batch import PackedBatch
from ..transformer.config import Config as TransformerConfig

__all__ = ["drop_absent", "make_rotary", "patch_layout"]


def make_rotary(positions: Tensor, stack: TransformerConfig, dtype: torch.dtype) -> RotaryTable:
    """Angles of `positions` for the heads of a stack; fp32 at least, whatever the states are."""
    stretch = stack.rope_scaling.model_dump() if stack.rope_scaling else {}
    frequencies = rotary_frequencies(
        stack.head_width,
        stack.rope_theta,
        device=positions.device,
        dtype=torch.promote_types(dtype, torch.float32),
        **stretch,
    )
    return rotary_table(positions, frequencies)


def patch_layout(batch: PackedBatch, patches: Patches) -> PackedLayout:
    """Documents of the patch sequence, from borders that stay on the device.

    Absent patches fill documents of their own behind the others, none longer than a row: where a document begins and how many
    patches there are is only known on the device, but not how many borders there are.
    """
    room, device = patches.starts.shape[0], patches.starts.device
    longest = min(room, batch.row_length)
    begins = patches.patch_ids[batch.cu_seqlens[:-1].long()].long()
    fill = torch.arange(0, room, longest, device=device) + patches.count
    end = begins.new_full((1,), room)
    borders = torch.cat((begins, fill, end)).clamp(max=room)
    places = torch.arange(room, device=device)
    document = torch.searchsorted(borders, places, right=True) - 1
    return PackedLayout(borders.int(), places - borders[document], longest, room, longest=longest)


def drop_absent(patches: Patches) -> Patches:
    """The same patches without room for more; waits for the device."""
    count = max(1, int(patches.count))
    return patches._replace(starts=patches.starts[:count], lengths=patches.lengths[:count])
