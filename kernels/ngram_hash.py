"""Rolling polynomial hashes of byte n-grams, to the bit those of BLT's released models.

    hash(i, n) = floormod(int64_wrap(sum over j < n of id[i-n+1+j] * p^j), rows)

The oldest id of the window has power 0, ids before the start count as 0, and products wrap around
in int64: other integer widths, or a truncating modulus, pick other rows. Source: BLT (arXiv
2412.09871) section 3.2.1, in the form its code has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HASH_PRIMES", "following_windows", "ngram_hash", "packed_windows"]

HASH_PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
)
"""One prime for each hash function, in order."""


def packed_windows(ids: Tensor, reach: Tensor, longest: int, missing: int = 0) -> Tensor:
    """The last `longest` ids at every position of a packed sequence.

    Args:
        ids: (T,) int64.
        reach: (T,) int64, how many earlier ids a position may see (its position in the document,
            say).
        longest: length of the longest n-gram.
        missing: stands for ids beyond the reach; a negative one leaves out the n-grams that have it.

    Returns:
        (longest, T) int64; row `lag` holds the id `lag` positions back, `missing` beyond the reach.
    """
    padded = torch.nn.functional.pad(ids, (longest - 1, 0))
    rows = [padded[longest - 1 - lag : longest - 1 - lag + len(ids)] for lag in range(longest)]
    lags = torch.arange(longest, device=ids.device)[:, None]
    return torch.where(lags <= reach[None, :], torch.stack(rows), missing)


def following_windows(history: Tensor, ids: Tensor) -> Tensor:
    """The same for new ids of sequences whose past is known, as in generation.

    Args:
        history: (B, longest - 1) int64, the ids before the new ones, newest last, 0 for none.
        ids: (B, t) int64, the new ones.

    Returns:
        (longest, B, t) int64; row `lag` holds the id `lag` positions back.
    """
    joined = torch.cat((history, ids), dim=1)
    reach, count = history.shape[1], ids.shape[1]
    return torch.stack([joined[:, reach - lag : reach - lag + count] for lag in range(reach + 1)])


def ngram_hash(
    windows: Tensor,
    sizes: Sequence[int],
    rows: int,
    hash_functions: int = 1,
    *,
    oldest_first: bool = True,
) -> Tensor:
    """Rows of one fused table, for every position, hash function and n-gram length.

    Args:
        windows: (longest, ...) int64, see `packed_windows`.
        sizes: n-gram lengths.
        rows: rows of one table.
        hash_functions: how many of `HASH_PRIMES` are used.
        oldest_first: the oldest id of a window has power 0; the paper's text gives it to the newest.

    Returns:
        (..., hash_functions * len(sizes)) int64, function-major, each offset by its table's first
        row; -1 where a window holds a negative id.
    """
    found: dict[tuple[int, int], Tensor] = {}
    for function in range(hash_functions):
        prime = HASH_PRIMES[function]
        value, power = torch.zeros_like(windows[0]), 1
        for lag in range(max(sizes)):
            if oldest_first:
                # Horner's rule: lengthening the window by one older id multiplies what is there by
                # the prime.
                value = value * prime + windows[lag]
            else:
                value = value + windows[lag] * power
                power = _wrap(power * prime)
            if lag + 1 in sizes:
                found[function, lag + 1] = value.remainder(rows)
    keys = [(function, size) for function in range(hash_functions) for size in sizes]
    hashed = torch.stack([found[key] + table * rows for table, key in enumerate(keys)], dim=-1)
    # Windows are filled from their newest id on: the oldest tells whether all of it is there.
    is_whole = torch.stack([windows[size - 1] >= 0 for _, size in keys], dim=-1)
    return torch.where(is_whole, hashed, -1)


def _wrap(value: int) -> int:
    """To int64, as its arithmetic wraps around."""
    return (value + 2**63) % 2**64 - 2**63
