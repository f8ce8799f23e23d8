"""Depthwise causal convolution over packed documents. `reference.py` defines it; `op.py` is what is called."""

from .halo import inputs_before
from .op import causal_conv1d, causal_conv1d_step
from .reference import causal_conv1d_reference

__all__ = ["causal_conv1d", "causal_conv1d_reference", "causal_conv1d_step", "inputs_before"]
