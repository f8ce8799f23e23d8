"""Tensors in, tensors out: the operations the models are made of."""

from .cross_entropy import IGNORED, cross_entropy_sums, linear_cross_entropy
from .lookup_sum import lookup_sum
from .ngram_hash import HASH_PRIMES, following_windows, ngram_hash, packed_windows
from .packed_attention import PackedLayout, attention_problem, packed_attention
from .rms_norm import rms_norm
from .rotary import RotaryTable, apply_rotary, rotary_frequencies, rotary_table

__all__ = [
    "HASH_PRIMES",
    "IGNORED",
    "PackedLayout",
    "RotaryTable",
    "apply_rotary",
    "attention_problem",
    "cross_entropy_sums",
    "following_windows",
    "linear_cross_entropy",
    "lookup_sum",
    "ngram_hash",
    "packed_attention",
    "packed_windows",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
]
