"""Root-mean-square normalisation. `reference.py` defines it; `op.py` says what runs when."""

from .op import rms_norm
from .reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
