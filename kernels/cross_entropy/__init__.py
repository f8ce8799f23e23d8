"""Cross-entropy over a vocabulary, of logits or of hidden states. `reference.py` defines it; `op.py` is what is called."""

from .op import cross_entropy_sums, linear_cross_entropy
from .reference import IGNORED, cross_entropy_sums_reference, linear_cross_entropy_reference

__all__ = [
    "IGNORED",
    "cross_entropy_sums",
    "cross_entropy_sums_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
]
