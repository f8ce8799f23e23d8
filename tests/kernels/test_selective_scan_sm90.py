"""What the selective scan becomes on sm_90, read off its machine code; compiled without a GPU."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from sm90 import Sm90, compile_sm90, needs_sm90_tools
from weft.kernels.faces import has_triton
from weft.kernels.selective_scan.reference import SPACING

if not has_triton():
    pytest.skip("Triton is not installed", allow_module_level=True)

from weft.kernels.selective_scan.triton import BACKWARD_CONFIGS, FORWARD_CONFIGS, Config
from weft.kernels.selective_scan.triton_backward import reduction_asm

PACKAGE = "weft.kernels.selective_scan"
STATES = 16
WIDE = "*fp32"
STRIDES = ("s_u_b", "s_u_t", "s_delta_b", "s_delta_t", "s_z_b", "s_z_t", "s_m")
SIZES = ("length", "group_channels", "groups", "segment_chunks", "segments")


def compile_scan(
    kernel: str,
    config: Config,
    inputs: tuple[str, ...],
    states: tuple[str, ...],
    has_starts: bool,
    sizes: tuple[str, ...] = SIZES,
    is_divisible: bool = True,
    **constants: Any,
) -> Sm90:
    """`inputs` are pointers to bf16, `states` to fp32; everything optional is there but documents."""
    types = {**dict.fromkeys(inputs, "*bf16"), **dict.fromkeys(states, WIDE), "p_starts": "*i8"}
    aligned = [*types, *(name for name in (*STRIDES, "group_channels") if is_divisible)]
    shared = {"N": STATES, "T": config.rows, "BD": config.block, "SOFTPLUS": True, "TERMS": 8}
    constants = {**shared, **constants, "USES_PTX": True}
    if not has_starts:
        del types["p_starts"]
        aligned.remove("p_starts")
        constants["p_starts"] = None
    types |= dict.fromkeys((*STRIDES, *sizes), "i32")
    module = "triton_backward" if kernel == "backward_kernel" else "triton_forward"
    return compile_sm90(f"{PACKAGE}.{module}", kernel, types, constants, divisible_by_16=aligned)


def compile_forward(config: Config, has_starts: bool, is_divisible: bool = True) -> Sm90:
    return compile_scan(
        "forward_kernel",
        config,
        ("p_u", "p_delta", "p_z", "p_out"),
        ("p_A", "p_B", "p_C", "p_D", "p_bias", "p_states"),
        has_starts,
        is_divisible=is_divisible,
        KEEP=True,
    )


def compile_backward(config: Config, has_starts: bool) -> Sm90:
    asm, constraints = reduction_asm(config.rows, config.block // 32)
    return compile_scan(
        "backward_kernel",
        config,
        ("p_u", "p_delta", "p_z", "p_dout", "p_du", "p_ddelta", "p_dz"),
        (
            *("p_A", "p_B", "p_C", "p_D", "p_bias", "p_states", "p_scratch", "p_q"),
            *("p_dA", "p_dD", "p_dbias", "p_sums"),
        ),
        has_starts,
        sizes=(*SIZES, "batch"),
        SUB=SPACING // config.rows,
        ASM=asm,
        CONSTRAINTS=constraints,
    )


def compile_local(config: Config, is_adjoint: bool) -> Sm90:
    return compile_scan(
        "local_kernel",
        config,
        ("p_u", "p_delta", "p_z", "p_out_grad"),
        ("p_A", "p_B", "p_bias", "p_local", "p_decay"),
        True,
        ADJOINT=is_adjoint,
    )


def has_spill(code: list[str]) -> bool:
    return any(re.search(r"\b(LDL|STL)\b", line) for line in code)


# Instructions of the loop over states, for each position, channel and state; measured 6.6 and 5.9.
FORWARD_BOUND = {"few": 7.2, "many": 6.4}


@needs_sm90_tools
@pytest.mark.parametrize(
    ("name", "is_divisible"), [("few", False), ("many", True)], ids=["few-ragged", "many"]
)
def test_forward(name: str, is_divisible: bool) -> None:
    config = FORWARD_CONFIGS[name]
    kernel = compile_forward(config, False, is_divisible)
    assert kernel.spill_bytes == 0
    assert kernel.count("SHFL") == kernel.count("BAR") == kernel.count("RED") == 0
    assert kernel.shared_bytes == 0
    loop = kernel.innermost("MUFU.EX2")
    channels = config.block // 32
    # The loop over states holds two of them.
    exponentials = 2 * config.rows * channels
    assert kernel.count("MUFU", loop) == exponentials
    assert len(loop) / exponentials <= FORWARD_BOUND[name] + (0 if is_divisible else 0.5)
    assert kernel.seconds < 30


@needs_sm90_tools
def test_forward_with_documents() -> None:
    """Two loops over states: the one of chunks without a first token is that of scans without documents."""
    config = FORWARD_CONFIGS["many"]
    kernel = compile_forward(config, True)
    assert kernel.spill_bytes == 0
    assert kernel.count("SHFL") == kernel.count("BAR") == 0
    exponentials = 2 * config.rows * config.block // 32
    loops = [x for x in kernel.loops if kernel.count("MUFU", x) == exponentials]
    assert len(loops) == 2
    per_value = [len(x) / exponentials for x in loops]
    assert per_value[0] <= FORWARD_BOUND["many"]
    assert per_value[1] <= 8


# Measured 28.3 and 22.1. The sums over channels take 8 and 4 of these, one by one they would take 20 and 10.
BACKWARD_BOUND = {"few": 30.0, "many": 24.0}


@needs_sm90_tools
@pytest.mark.parametrize("name", [pytest.param("few", marks=pytest.mark.slow), "many"])
def test_backward(name: str) -> None:
    config = BACKWARD_CONFIGS[name]
    kernel = compile_backward(config, False)
    assert kernel.count("BAR") == kernel.count("RED") == kernel.count("ATOM") == 0
    loop = next(x for x in kernel.loops if kernel.count("SHFL", x))
    values = config.rows * config.block // 32
    assert kernel.count("MUFU", loop) == values
    assert len(loop) / values <= BACKWARD_BOUND[name]
    # Two transposing sums, and what brings their results in order for the store.
    assert kernel.count("SHFL", loop) <= 2 * (config.rows - 1 + 2) + 4
    # A few values that all chunks need may lie in local memory, outside of the loop over states.
    assert not has_spill(loop)
    assert kernel.spill_bytes <= 256
    assert kernel.seconds < 30


@needs_sm90_tools
@pytest.mark.parametrize(
    "is_adjoint", [pytest.param(False, marks=pytest.mark.slow), True], ids=["states", "gradients"]
)
def test_segments(is_adjoint: bool) -> None:
    config = (BACKWARD_CONFIGS if is_adjoint else FORWARD_CONFIGS)["few"]
    kernel = compile_local(config, is_adjoint)
    # To stay at 168 registers, and so at three programs a scheduler, the ptxas of Triton 3.6 puts the pointer that only
    # the end of the program needs aside: written once before the loop over chunks, read once after it.
    assert kernel.spill_bytes <= 8
    assert not any(has_spill(loop) for loop in kernel.loops)
    assert kernel.count("SHFL") == kernel.count("BAR") == 0


def run_warp(code: str, inputs: np.ndarray, pack: int) -> np.ndarray:
    """Interpret the few PTX instructions of `reduction_asm` on 32 lanes: inputs (count, pack, 32) to (pack, 32)."""
    lanes = np.arange(32)
    registers: dict[str, np.ndarray] = {"%laneid": lanes}
    for i, value in enumerate(inputs.reshape(-1, 32)):
        registers[f"${pack + i}"] = value

    def read(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(32, int(name))

    for line in re.findall(r"[^;{}]+;", code):
        operation, _, rest = line.strip().rstrip(";").partition(" ")
        if operation == ".reg":
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        values = [read(operand) for operand in operands]
        match operation.split(".")[0]:
            case "mov":
                registers[target] = values[0]
            case "add":
                registers[target] = values[0] + values[1]
            case "and":
                registers[target] = values[0] & values[1]
            case "setp":
                registers[target] = values[0] != values[1]
            case "selp":
                registers[target] = np.where(values[2], values[0], values[1])
            case "shfl":
                assert operation == "shfl.sync.bfly.b32"
                assert (operands[2], operands[3]) == ("31", "-1")
                registers[target] = values[0][lanes ^ values[1]]
            case other:
                raise AssertionError(f"unknown instruction {other}")
    return np.stack([registers[f"${j}"] for j in range(pack)])


@pytest.mark.parametrize("pack", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_sums_across_a_warp(count: int, pack: int) -> None:
    code, constraints = reduction_asm(count, pack)
    inputs = np.random.default_rng(0).integers(-99, 99, (count, pack, 32))
    wanted = inputs.sum((1, 2))[np.arange(32) // (32 // count)]
    assert np.array_equal(run_warp(code, inputs, pack), np.tile(wanted, (pack, 1)))
    assert constraints.count("=f") == pack
    assert constraints.count("f") == pack * (count + 1)
    assert code.count("shfl") == count - 1 + (32 // count).bit_length() - 1
