"""Patches of a byte sequence: where they start, and what moves between bytes and patches."""

from .patch_attention import patch_decoder_attention, patch_encoder_attention
from .patch_block_mask import (
    decoder_block_mask,
    encoder_block_mask,
    flex_patch_attention,
    patch_block_mask,
)
from .patch_boundaries import PATCH_SCHEMES, Patches, check_patches, patch_boundaries
from .segment_pool import POOL_MODES, segment_pool, segment_pool_reference
from .token_entropy import linear_entropy, token_entropy, token_entropy_reference

__all__ = [
    "PATCH_SCHEMES",
    "POOL_MODES",
    "Patches",
    "check_patches",
    "decoder_block_mask",
    "encoder_block_mask",
    "flex_patch_attention",
    "linear_entropy",
    "patch_block_mask",
    "patch_boundaries",
    "patch_decoder_attention",
    "patch_encoder_attention",
    "segment_pool",
    "segment_pool_reference",
    "token_entropy",
    "token_entropy_reference",
]
