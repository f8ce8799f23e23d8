"""Patch boundaries in plain Python and plain torch: the definition as a loop, and the same by scans.

Both fill the outputs that `patch_boundaries` made: is_start, patch_ids, decoder_ids, starts, ends, count, overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Numbers", "patch_by_definition", "patch_by_scans"]

Numbers = tuple[float, float, int, int, int, int]
"""threshold, rise, stride, max_length (0: none), forced_starts, byte_offset."""


def is_space_like(byte: int) -> bool:
    """All but digits, Latin letters and UTF-8 continuation bytes; lead bytes of longer characters count as spaces."""
    is_letter_or_digit = chr(byte).isascii() and chr(byte).isalnum()
    return not is_letter_or_digit and not 0x80 <= byte <= 0xBF


def _opens_next(
    t: int,
    p: int,
    H: list[float],
    rises: list[float],
    ids: list[int],
    scheme: str,
    numbers: Numbers,
) -> bool:
    """Whether the byte after t, position p of its document, starts a patch by the rule; knows bytes up to t only."""
    threshold, rise, stride, _, forced_starts, byte_offset = numbers
    if p + 1 < forced_starts:
        return True
    if scheme == "stride":
        return (p + 1 - (forced_starts - 1)) % stride == 0
    if scheme == "space":
        byte = ids[t] - byte_offset
        follows_space = p >= 1 and (
            ids[t - 1] < byte_offset or is_space_like(ids[t - 1] - byte_offset)
        )
        return byte < 0 or (is_space_like(byte) and not follows_space)
    is_high = H[t] > threshold
    has_risen = p >= 1 and rises[t] > rise
    return {"entropy": is_high, "rise": has_risen, "both": is_high and has_risen}[scheme]


def patch_by_definition(
    position_ids: Tensor,
    entropy: Tensor | None,
    tokens: Tensor | None,
    scheme: str,
    numbers: Numbers,
    outputs: tuple[Tensor, ...],
) -> None:
    """One position after the other, carrying the document, the last start made by the rule, and the open patch."""
    is_start, patch_ids, decoder_ids, starts, ends, count, overflow = outputs
    total, max_patches, max_length = len(position_ids), len(starts), numbers[3]
    H, rises, ids = [], [], []
    if entropy is not None:
        wide = entropy.float()
        H, rises = wide.tolist(), (wide - wide.roll(1)).tolist()
    if tokens is not None:
        ids = tokens.tolist()
    is_first = [t == 0 or position == 0 for t, position in enumerate(position_ids.tolist())]

    made = 0  # patches so far, those that do not fit included
    document = rule_start = 0
    first_of_document = 0  # the first patch of this document
    opens = False
    for t in range(total):
        if is_first[t]:
            document, first_of_document, opens = t, made, True
        if opens:
            rule_start = t
        if opens or (max_length and (t - rule_start) % max_length == 0):
            made += 1
            if made <= max_patches:
                is_start[t] = True
                starts[made - 1] = t
        opens = _opens_next(t, t - document, H, rises, ids, scheme, numbers)
        if first_of_document >= max_patches:
            continue  # no room for this document at all
        patch = min(made, max_patches) - 1
        patch_ids[t], ends[patch] = patch, t + 1
        will_start = opens or (max_length and (t + 1 - rule_start) % max_length == 0)
        is_last = t + 1 == total or is_first[t + 1]
        if will_start and (is_last or made < max_patches):
            decoder_ids[t] = patch
        elif patch > first_of_document:
            decoder_ids[t] = patch - 1
    count.fill_(min(made, max_patches))
    overflow.fill_(max(0, made - max_patches))


def _opens_next_everywhere(
    p: Tensor, entropy: Tensor | None, tokens: Tensor | None, scheme: str, numbers: Numbers
) -> Tensor:
    """`_opens_next` of all positions: (T,) bool."""
    threshold, rise, stride, _, forced_starts, byte_offset = numbers
    forced = p + 1 < forced_starts
    if scheme == "stride":
        return forced | ((p + 2 - forced_starts) % stride == 0)
    if scheme == "space":
        assert tokens is not None
        byte = tokens.long() - byte_offset
        is_word = torch.zeros_like(forced)
        for first, last in ("09", "AZ", "az", "\x80\xbf"):
            is_word |= (byte >= ord(first)) & (byte <= ord(last))
        is_space = ~is_word
        follows_space = (p >= 1) & is_space.roll(1)
        return forced | (byte < 0) | (is_space & ~follows_space)
    assert entropy is not None
    wide = entropy.float()
    is_high = wide > threshold
    has_risen = (p >= 1) & (wide - wide.roll(1) > rise)
    return forced | {"entropy": is_high, "rise": has_risen, "both": is_high & has_risen}[scheme]


def patch_by_scans(
    position_ids: Tensor,
    entropy: Tensor | None,
    tokens: Tensor | None,
    scheme: str,
    numbers: Numbers,
    outputs: tuple[Tensor, ...],
) -> None:
    """The definition by running maxima (last start made by the rule) and running sums (patches so far)."""
    is_start, patch_ids, decoder_ids, starts, ends, count, overflow = outputs
    total, max_patches, max_length = len(position_ids), len(starts), numbers[3]
    t = torch.arange(total, device=position_ids.device)
    is_first = (position_ids == 0) | (t == 0)
    p = torch.minimum(position_ids, t)
    opens = _opens_next_everywhere(p, entropy, tokens, scheme, numbers)

    by_rule = is_first | opens.roll(1)
    will_start = opens
    starts_any = by_rule
    if max_length:
        rule_start = torch.where(by_rule, t, 0).cummax(0).values
        starts_any = by_rule | ((t - rule_start) % max_length == 0)
        will_start = opens | ((t + 1 - rule_start) % max_length == 0)
    ordinal = starts_any.cumsum(0) - 1
    first_of_document = torch.where(is_first, ordinal, 0).cummax(0).values

    has_room = first_of_document < max_patches
    patch = ordinal.clamp(max=max_patches - 1)
    is_last = is_first.roll(-1)
    is_last[-1] = True
    is_start.copy_(starts_any & (ordinal < max_patches))
    patch_ids.copy_(torch.where(has_room, patch, max_patches))
    splits = will_start & (ordinal + 1 < max_patches)
    reads_own = splits | (will_start & is_last)
    before = torch.where(patch > first_of_document, patch - 1, -1)
    decoder_ids.copy_(torch.where(has_room, torch.where(reads_own, patch, before), -1))

    # Writes that are not wanted land in an extra slot, which is dropped.
    room = torch.full((max_patches + 1,), total, dtype=torch.int32, device=t.device)
    slot = torch.where(is_start, patch, max_patches)
    starts.copy_(room.scatter(0, slot, t.int())[:-1])
    is_end = has_room & (is_last | splits)
    slot = torch.where(is_end, patch, max_patches)
    ends.copy_(room.scatter(0, slot, t.int() + 1)[:-1])
    made = ordinal[-1] + 1
    count.copy_(made.clamp(max=max_patches))
    overflow.copy_((made - max_patches).clamp(min=0))
