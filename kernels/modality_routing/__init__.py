"""Rows sorted by modality, weights of their own for each, and one attention that all share."""

from .attention import mixed_attention, routed_attention
from .layout import MixedLayout
from .linear import routed_linear, routed_linear_unsorted
from .norm import routed_rms_norm
from .qk import qk_norm_rope_unpermute
from .restore_bias import restore_with_bias
from .routing import Routing, route_by_modality, route_one_modality

__all__ = [
    "MixedLayout",
    "Routing",
    "mixed_attention",
    "qk_norm_rope_unpermute",
    "restore_with_bias",
    "route_by_modality",
    "route_one_modality",
    "routed_attention",
    "routed_linear",
    "routed_linear_unsorted",
    "routed_rms_norm",
]
