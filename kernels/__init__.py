"""Tensors in, tensors out: the operations the models are made of.

Each op has a definition in plain PyTorch, a fast path on the CPU and Triton kernels; `use_kernels` chooses.
"""

import importlib.util
import sys
from pathlib import Path

from .causal_conv1d import causal_conv1d, causal_conv1d_step, inputs_before
from .cross_entropy import IGNORED, cross_entropy_sums, linear_cross_entropy
from .entropy_patching import (
    Patches,
    check_patches,
    decoder_block_mask,
    encoder_block_mask,
    flex_patch_attention,
    linear_entropy,
    patch_block_mask,
    patch_boundaries,
    patch_decoder_attention,
    patch_encoder_attention,
    segment_pool,
    token_entropy,
)
from .faces import use_kernels
from .lookup_sum import lookup_sum
from .modality_routing import (
    MixedLayout,
    Routing,
    mixed_attention,
    qk_norm_rope_unpermute,
    restore_with_bias,
    route_by_modality,
    route_one_modality,
    routed_attention,
    routed_linear,
    routed_linear_unsorted,
    routed_rms_norm,
)
from .ngram_hash import HASH_PRIMES, following_windows, ngram_hash, packed_windows
from .packed_attention import PackedLayout, attention_problem, packed_attention
from .rms_norm import rms_norm
from .rotary import RotaryTable, apply_rotary, rotary_frequencies, rotary_table
from .segment_attention import Segments, segment_attention, segment_attention_problem
from .selective_scan import (
    chunk_decay,
    combine_states,
    selective_scan,
    selective_scan_segment,
    selective_scan_step,
)

__all__ = [
    "HASH_PRIMES",
    "IGNORED",
    "MixedLayout",
    "PackedLayout",
    "Patches",
    "RotaryTable",
    "Routing",
    "Segments",
    "apply_rotary",
    "attention_problem",
    "causal_conv1d",
    "causal_conv1d_step",
    "check_patches",
    "chunk_decay",
    "combine_states",
    "cross_entropy_sums",
    "decoder_block_mask",
    "encoder_block_mask",
    "flex_patch_attention",
    "following_windows",
    "inputs_before",
    "linear_cross_entropy",
    "linear_entropy",
    "lookup_sum",
    "mixed_attention",
    "ngram_hash",
    "packed_attention",
    "packed_windows",
    "patch_block_mask",
    "patch_boundaries",
    "patch_decoder_attention",
    "patch_encoder_attention",
    "qk_norm_rope_unpermute",
    "restore_with_bias",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
    "route_by_modality",
    "route_one_modality",
    "routed_attention",
    "routed_linear",
    "routed_linear_unsorted",
    "routed_rms_norm",
    "segment_attention",
    "segment_attention_problem",
    "segment_pool",
    "selective_scan",
    "selective_scan_segment",
    "selective_scan_step",
    "token_entropy",
    "use_kernels",
]


def _hide_from_others() -> None:
    """Keep others from importing this folder as `kernels`, the name of a package that transformers looks for.

    With a checkout's root on the path it would run every module a second time, and register every op anew.
    """
    if __name__ != "kernels" and "kernels" not in sys.modules:
        found = importlib.util.find_spec("kernels")
        if found is not None and found.origin and Path(found.origin).samefile(__file__):
            sys.modules["kernels"] = None  # type: ignore[assignment]


_hide_from_others()
