"""Tensors in, tensors out: the operations the models are made of."""

from .cross_entropy import IGNORED, cross_entropy_sums, linear_cross_entropy
from .ngram_hash import HASH_PRIMES, ngram_hash, packed_windows
from .packed_attention import PackedLayout, packed_attention
from .rms_norm import rms_norm
from .rotary import apply_rotary, rotary_angles, rotary_frequencies

__all__ = [
    "HASH_PRIMES",
    "IGNORED",
    "PackedLayout",
    "apply_rotary",
    "cross_entropy_sums",
    "linear_cross_entropy",
    "ngram_hash",
    "packed_attention",
    "packed_windows",
    "rms_norm",
    "rotary_angles",
    "rotary_frequencies",
]
