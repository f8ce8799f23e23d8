"""What Triton makes of the kernels of routed rows for sm_90: wide loads, no spills, no atomics."""

from __future__ import annotations

import pytest
from sm90 import compile_sm90, needs_sm90_tools

MODULE = "weft.kernels.modality_routing.triton"


@needs_sm90_tools
@pytest.mark.slow
@pytest.mark.parametrize(("channels", "is_aligned"), [(1024, True), (8192, True), (4095, False)])
def test_norm_compiles_for_sm90_without_spills(channels: int, is_aligned: bool) -> None:
    block = 1 << (channels - 1).bit_length()
    rows = max(1, 2048 // block)
    warps = min(16, max(4, rows * block // 512))
    common = {"p_x": "*bf16", "p_weights": "*bf16", "p_offsets": "*i32", "p_scale": "*fp32"}
    integers = {"channels": "i32", "stride_x": "i32"}
    forward = {**common, "p_out": "*bf16", "total": "i32", **integers, "eps": "fp32"}
    backward = {**common, "p_grad": "*bf16", "p_x_grad": "*bf16", "p_partial": "*fp32", **integers}
    backward["n_programs"] = "i32"
    sizes = {"ROWS": rows, "BLOCK_D": block, "WIDE": "tl.float32"}
    for kernel, types, constants in (
        ("rms_norm_kernel", forward, {"N_MODALITIES": 2, **sizes}),
        ("rms_norm_backward_kernel", backward, sizes),
    ):
        aligned = [name for name in types if name != "eps"]
        if not is_aligned:
            aligned = [name for name in aligned if name not in ("channels", "stride_x")]
        found = compile_sm90(
            MODULE, kernel, types, constants, divisible_by_16=aligned, num_warps=warps
        )
        assert found.spill_bytes == 0
        # Rows that are not aligned need an address a value, which 8 warps have room for.
        assert found.registers <= (128 if is_aligned else 255)
        # Aligned rows are read and written 16 bytes a thread.
        assert not is_aligned or sum("LDG" in code and ".128" in code for code in found.code) >= 2
        assert found.count("ATOM") + found.count("RED.") == 0


@needs_sm90_tools
@pytest.mark.slow
@pytest.mark.parametrize(("heads", "norm"), [((32, 8, 128), 1), ((16, 16, 128), 2)])
def test_heads_compile_for_sm90_without_spills(heads: tuple[int, int, int], norm: int) -> None:
    n_q, n_k, width = heads
    sizes = {
        **{"Q_HEADS": n_q, "K_HEADS": n_k, "HALF": width // 2, "Q_NORM": norm, "K_NORM": norm},
        **{"HAS_TABLE": True, "WIDE": "tl.float32"},
        **{"BLOCK_Q": n_q, "BLOCK_K": n_k, "BLOCK_HALF": width // 2},
    }
    warps = min(16, n_q * width // 512)
    narrow = ["p_q", "p_k", "p_q_out", "p_k_out", "p_v_out", "p_q_weights", "p_k_weights"]
    common = dict.fromkeys(narrow, "*bf16")
    common |= dict.fromkeys(["p_q_scale", "p_k_scale", "p_cos", "p_sin"], "*fp32")
    common |= {"p_offsets": "*i32", "stride_q": "i32", "stride_k": "i32"}
    forward = {**common, "p_v": "*bf16", "p_inverse": "*i64", "stride_v": "i32", "eps": "fp32"}
    backward = {**common, "p_order": "*i64", "n_programs": "i32"}
    backward |= dict.fromkeys(["p_q_grad", "p_k_grad", "p_v_grad"], "*bf16")
    backward |= dict.fromkeys(["p_q_partial", "p_k_partial"], "*fp32")
    for kernel, types, constants in (
        ("turn_kernel", forward, {"N_MODALITIES": 2, **sizes}),
        ("turn_backward_kernel", backward, sizes),
    ):
        aligned = [name for name in types if name != "eps"]
        found = compile_sm90(
            MODULE, kernel, types, constants, divisible_by_16=aligned, num_warps=warps
        )
        assert found.spill_bytes == 0
        assert found.registers <= 128
        assert sum("LDG" in line and ".128" in line for line in found.code) >= 6
        assert found.count("ATOM") + found.count("RED.") == 0
