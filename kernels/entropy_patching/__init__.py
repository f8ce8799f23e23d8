"""Patches of a byte sequence: where they start, and what moves between bytes and patches."""

from .patch_boundaries import PATCH_SCHEMES, Patches, check_patches, patch_boundaries
from .segment_pool import POOL_MODES, segment_pool, segment_pool_reference
from .token_entropy import linear_entropy, token_entropy, token_entropy_reference

__all__ = [
    "PATCH_SCHEMES",
    "POOL_MODES",
    "Patches",
    "check_patches",
    "linear_entropy",
    "patch_boundaries",
    "segment_pool",
    "segment_pool_reference",
    "token_entropy",
    "token_entropy_reference",
]
