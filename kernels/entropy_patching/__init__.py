"""Patches of a byte sequence: where they start, and what moves between bytes and patches."""

from .token_entropy import linear_entropy, token_entropy, token_entropy_reference

__all__ = ["linear_entropy", "token_entropy", "token_entropy_reference"]
