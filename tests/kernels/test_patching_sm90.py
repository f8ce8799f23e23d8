"""What the kernels of patches become on sm_90, read off their machine code; compiled without a GPU."""

from __future__ import annotations

import pytest
import torch
from sm90 import compile_sm90, needs_sm90_tools


@needs_sm90_tools
def test_attention_neither_spills_nor_uses_atomics() -> None:
    from weft.kernels.entropy_patching.patch_attention_triton import patch_tiles

    _, constants = patch_tiles(2, 16, 64)
    gradients = ("p_dq", "p_dk", "p_dv")
    kernels = {
        "encoder_backward_kernel": (
            ("p_g", "p_q", "p_k", "p_v", "p_out", *gradients),
            ("p_start", "p_length"),
        ),
        "decoder_backward_kernel": (
            ("p_g", "p_q", "p_k", "p_v", *gradients),
            ("p_patch", "p_first", "p_end"),
        ),
    }
    for kernel, (names, tables) in kernels.items():
        types = {
            **dict.fromkeys(names, "*bf16"),
            **dict.fromkeys(tables, "*i32"),
            "p_lse": "*fp32",
            "H": "i32",
        }
        built = compile_sm90(
            "weft.kernels.entropy_patching.patch_attention_triton", kernel, types,
            {**constants, "WIDE": "tl.float32"}, divisible_by_16=(*names, "H"), num_warps=4,
        )  # fmt: skip
        assert built.spill_bytes == 0
        assert built.registers <= 168
        assert built.count("RED.") == built.count("ATOM") == 0


@needs_sm90_tools
def test_wide_heads_of_the_decoder_do_not_spill() -> None:
    from weft.kernels.entropy_patching.patch_attention_triton import bytes_tile

    names = ("p_q", "p_k", "p_v", "p_out")
    types = {
        **dict.fromkeys(names, "*bf16"),
        "p_patch": "*i32",
        "p_lse": "*fp32",
        **dict.fromkeys("TPH", "i32"),
    }
    tile = bytes_tile(torch.empty(1, 1, 128, dtype=torch.bfloat16))
    built = compile_sm90(
        "weft.kernels.entropy_patching.patch_attention_triton", "decoder_kernel", types,
        {**tile, "VECTORS": 2, "WIDE": "tl.float32"}, divisible_by_16=(*names, "H"), num_warps=4,
    )  # fmt: skip
    assert built.spill_bytes == 0
    assert built.registers <= 168


@needs_sm90_tools
@pytest.mark.parametrize("limit", [None, 1])
def test_boundaries_neither_spill_nor_use_atomics(limit: int | None) -> None:
    """Triton makes a constant of an argument that is 1."""
    shared = {
        **dict.fromkeys(("T", "BLOCKS", "stride", "max_length", "forced_starts", "byte_offset"), "i32"),
        "p_position": "*i64", "p_entropy": "*fp32", "p_tokens": "*i64", "p_summary": "*i32",
        "threshold": "fp32", "rise": "fp32",
    }  # fmt: skip
    outputs = ("p_patch", "p_decoder", "p_starts", "p_ends", "p_count", "p_overflow")
    constants = {"SCHEME": "both", "HAS_LIMIT": True, "BLOCK": 1024}
    if limit is not None:
        constants["max_length"] = limit
    jobs = [
        ("summarise_kernel", shared, constants),
        (
            "boundaries_kernel",
            shared | dict.fromkeys(outputs, "*i32") | {"P": "i32", "p_is_start": "*i1"},
            constants | {"SUMMARIES": 128},
        ),
    ]
    for kernel, types, wanted in jobs:
        built = compile_sm90(
            "weft.kernels.entropy_patching.patch_boundaries_triton",
            kernel,
            types,
            wanted,
            num_warps=4,
        )
        assert built.spill_bytes == 0
        assert built.count("RED.") == built.count("ATOM") == 0
