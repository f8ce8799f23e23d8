"""Entropy of logits and of a linear head: values, gradients, edges of fp32, and what the compiler makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import ALL_FACES, assert_close, needs_triton, on_face, poisoned
from sm90 import compile_sm90, needs_sm90_tools
from torch import Tensor
from weft.kernels.entropy_patching import linear_entropy, token_entropy, token_entropy_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
INFINITY = float("inf")


def categorical(logits: Tensor) -> Tensor:
    if logits.numel() == 0:
        return torch.zeros(logits.shape[:-1], dtype=torch.float64)
    return torch.distributions.Categorical(logits=logits.double()).entropy()


def make_head(T: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(T, D, dtype=torch.float64).to(dtype)
    return hidden, (torch.randn(V, D, dtype=torch.float64) * 1.5 / math.sqrt(D)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0, 260), (1, 1), (2, 3), (33, 260), (3, 2, 64)])
@pytest.mark.parametrize("face", ALL_FACES)
def test_logits_match_the_oracle(face: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    exact = logits.double().requires_grad_()
    expected = token_entropy_reference(exact)
    grad = torch.randn(shape[:-1], dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad)
    with on_face(face) as device:
        found_logits = logits.to(device).requires_grad_()
        found = token_entropy(found_logits)
        found.backward(grad.to(found))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # 16-bit logits are exact numbers: only the arithmetic on them rounds, and that is fp32.
    assert_close(found, expected.detach(), min(1e-5, TOLERANCE[dtype]), "entropy")
    assert_close(found, categorical(logits), min(1e-5, 100 * TOLERANCE[dtype]), "Categorical")
    assert found_logits.grad is not None
    assert found_logits.grad.dtype == dtype
    assert_close(found_logits.grad, expected_grad, TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("vocabulary", [1023, 1024, 1025, 2500])
@pytest.mark.parametrize("face", ALL_FACES)
def test_vocabularies_around_a_tile(face: str, vocabulary: int) -> None:
    logits = 4 * torch.randn(5, vocabulary)
    with on_face(face) as device:
        assert_close(token_entropy(logits.to(device)), categorical(logits), 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("T", "D", "V"),
    [(0, 8, 260), (1, 1, 1), (2, 3, 5), (63, 33, 64), (65, 7, 260), (3, 64, 321), (33, 40, 513)],
)
@pytest.mark.parametrize("face", ALL_FACES)
def test_linear_head_matches_the_oracle(
    face: str, T: int, D: int, V: int, dtype: torch.dtype
) -> None:
    hidden, weight = make_head(T, D, V, dtype)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = token_entropy_reference(exact[0] @ exact[1].T)
    grad = torch.randn(T, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, exact, grad)
    with on_face(face) as device:
        leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
        found = linear_entropy(*leaves)
        found.backward(grad.to(found))
    # Also for 16-bit input: a bf16 logit would be off by 1e-2, and boundaries with it.
    assert_close(found, expected.detach(), 1e-12 if dtype == torch.float64 else 1e-5, "entropy")
    for name, leaf, wanted in zip(("hidden", "weight"), leaves, expected_grads, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert_close(leaf.grad, wanted, TOLERANCE[dtype], name)


def test_chunks_of_thousands_of_positions() -> None:
    hidden, weight = make_head(5000, 16, 260)
    assert_close(
        linear_entropy(hidden, weight), categorical(hidden.double() @ weight.double().T), 1e-5
    )
    logits = torch.randn(5000, 260)
    assert_close(token_entropy(logits), categorical(logits), 1e-6)


def test_16_bit_logits_of_a_head_would_move_boundaries() -> None:
    """Why the head keeps fp32: through bf16 logits a good share of entropies moves by more than 0.001."""
    hidden, weight = make_head(2000, 64, 260, torch.bfloat16)
    rounded = token_entropy(hidden @ weight.T)
    exact = linear_entropy(hidden, weight)
    assert (rounded - exact).abs().gt(1e-3).float().mean() > 0.1


@pytest.mark.parametrize("face", ALL_FACES)
def test_impossible_and_certain_tokens(face: str) -> None:
    certain = torch.full((1, 9), -INFINITY)
    certain[0, 4] = 2.5
    huge = torch.zeros(1, 9)
    huge[0, 3] = 1e4
    uniform = torch.full((1, 9), -INFINITY)
    uniform[0, 2:6] = -1e30
    late = torch.full((1, 9), -INFINITY)
    late[0, -2:] = 7.0
    logits = torch.cat([certain, huge, uniform, late]).requires_grad_()
    with on_face(face) as device:
        found = token_entropy(logits.to(device)).cpu()
        found.sum().backward()
    assert found[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[2:], torch.tensor([math.log(4), math.log(2)]))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.all(logits.grad[logits == -INFINITY] == 0)


@pytest.mark.parametrize("face", ALL_FACES)
def test_blocks_of_impossible_tokens_before_the_first(face: str) -> None:
    logits = torch.full((2, 2100), -INFINITY)
    logits[0, 2050:] = 1.0
    logits[1, :4] = 1.0
    with on_face(face) as device:
        found = token_entropy(logits.to(device)).cpu()
    torch.testing.assert_close(found, torch.tensor([math.log(50), math.log(4)]))


@pytest.mark.parametrize("face", ALL_FACES)
def test_what_is_no_distribution_is_nan_in_its_own_row_only(face: str) -> None:
    logits = torch.randn(5, 20)
    logits[0] = -INFINITY
    logits[1, 3] = float("nan")
    logits[3, 19] = INFINITY
    leaf = logits.clone().requires_grad_()
    with on_face(face) as device:
        found = token_entropy(leaf.to(device)).cpu()
        found[[2, 4]].sum().backward()
    assert found.isnan().tolist() == [True, True, False, True, False]
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad[[2, 4]]).all()


@pytest.mark.parametrize("face", ALL_FACES)
def test_nan_in_one_position_of_a_head_stays_there(face: str) -> None:
    hidden, weight = make_head(9, 12, 30)
    hidden[4, 2] = float("nan")
    leaf = hidden.requires_grad_()
    with on_face(face) as device:
        found = linear_entropy(leaf.to(device), weight.to(device))
        found.sum().backward()
    others = torch.arange(9) != 4
    assert found[4].isnan()
    assert torch.isfinite(found[others]).all()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad[others]).all()


@pytest.mark.parametrize("face", ALL_FACES)
def test_shifting_all_logits_changes_nothing(face: str) -> None:
    logits = torch.randn(4, 50).mul_(64).round_().div_(64)
    with on_face(face) as device:
        at_zero, far = (token_entropy((logits + by).to(device)) for by in (0.0, 4096.0))
    torch.testing.assert_close(at_zero, far, rtol=0, atol=1e-6)


@pytest.mark.parametrize("face", ALL_FACES)
def test_strided_expanded_and_poisoned_inputs(face: str) -> None:
    wide = torch.randn(12, 80)
    logits = wide[::2, ::2]
    hidden, weight = make_head(6, 10, 21)
    with on_face(face) as device:
        assert_close(token_entropy(logits.to(device)), categorical(logits), 1e-6)
        assert_close(
            token_entropy(logits[:1].to(device).expand(4, 40)),
            categorical(logits[:1].expand(4, 40)),
            1e-6,
        )
        clean = linear_entropy(hidden.to(device), weight.to(device))
        dirty = linear_entropy(poisoned(hidden.to(device)), poisoned(weight.to(device)))
        strided = linear_entropy(
            hidden.T.contiguous().T.to(device), weight.repeat(2, 2)[:21, :10].to(device)
        )
        assert_close(token_entropy(poisoned(logits.to(device))), categorical(logits), 1e-6)
    assert torch.equal(clean, dirty)
    assert_close(strided, clean.cpu(), 1e-6)


@pytest.mark.parametrize("face", ALL_FACES)
def test_gradcheck(face: str) -> None:
    logits = (2 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    hidden, weight = (x.requires_grad_() for x in make_head(2, 3, 4, torch.float64))
    with on_face(face):
        assert torch.autograd.gradcheck(token_entropy, (logits,), fast_mode=face == "triton")
        assert torch.autograd.gradcheck(
            linear_entropy, (hidden, weight), fast_mode=face == "triton"
        )


@pytest.mark.parametrize("face", ALL_FACES)
def test_repeated_runs_give_the_same_bits(face: str) -> None:
    hidden, weight = make_head(40, 20, 260)
    with on_face(face) as device:
        runs = []
        for _ in range(2):
            leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
            found = linear_entropy(*leaves)
            found.sum().backward()
            runs.append([found, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("face", ALL_FACES)
def test_operator_contract(face: str) -> None:
    with on_face(face) as device:
        logits = torch.randn(4, 7, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.weft.token_entropy, (logits,))
        hidden, weight = (x.to(device).requires_grad_() for x in make_head(4, 3, 7))
        torch.library.opcheck(torch.ops.weft.linear_entropy, (hidden, weight))


@pytest.mark.parametrize("face", ALL_FACES)
def test_compiled_and_recomputed_equal_plain(face: str) -> None:
    hidden, weight = make_head(6, 5, 11)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_entropy(hidden, weight).sum() + token_entropy(hidden).square().sum()

    def recomputed(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(total, hidden, weight, use_reentrant=False)

    results = []
    with on_face(face) as device:
        for run in (total, torch.compile(total, fullgraph=True, backend="aot_eager"), recomputed):
            leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
            value = run(*leaves)
            value.backward()
            results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: token_entropy(torch.zeros(3, 4, dtype=torch.int64)),
            "logits is int64, expected float64",
        ),
        (lambda: token_entropy(torch.zeros(())), r"logits has shape \(\), expected \(..., V\)"),
        (lambda: token_entropy(torch.zeros(3, 0)), r"logits has shape \(3, 0\)"),
        (
            lambda: linear_entropy(torch.zeros(3), torch.zeros(4, 3)),
            r"hidden has shape \(3,\), expected \(\*, \*\)",
        ),
        (
            lambda: linear_entropy(torch.zeros(3, 2), torch.zeros(4, 3)),
            r"weight has shape \(4, 3\), expected \(\*, 2\)",
        ),
        (
            lambda: linear_entropy(torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.bfloat16)),
            "weight is bfloat16, expected float32",
        ),
        (
            lambda: linear_entropy(torch.zeros(3, 2).int(), torch.zeros(4, 2).int()),
            "hidden is int32",
        ),
        (
            lambda: linear_entropy(torch.zeros(3, 2), torch.zeros(0, 2)),
            r"weight has shape \(0, 2\).*V >= 1",
        ),
        (
            lambda: linear_entropy(torch.zeros(3, 2), torch.zeros(4, 2, device="meta")),
            "weight is on meta and hidden on cpu",
        ),
    ],
)
def test_argument_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@needs_triton
@pytest.mark.parametrize(
    ("vocabulary", "whole", "columns", "tail"),
    [
        (1, 1, 16, 0),
        (16, 1, 16, 0),
        (256, 1, 256, 0),
        (260, 1, 256, 16),
        (320, 1, 256, 64),
        (321, 2, 256, 0),
        (600, 3, 256, 0),
    ],
)
def test_tiles_cover_the_vocabulary(vocabulary: int, whole: int, columns: int, tail: int) -> None:
    from weft.kernels.entropy_patching.token_entropy_triton import head_tiles

    found, constants = head_tiles(vocabulary, is_narrow=True)
    assert (found, constants["COLUMNS"], constants["TAIL"]) == (whole, columns, tail)
    assert found * columns + tail >= vocabulary


KERNELS = "weft.kernels.entropy_patching.token_entropy_triton"


@needs_sm90_tools
def test_on_sm90_the_head_uses_tensor_cores_and_does_not_spill() -> None:
    from weft.kernels.entropy_patching.token_entropy_triton import head_tiles

    _, constants = head_tiles(260, is_narrow=True)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    outputs = dict.fromkeys(("p_entropy", "p_peak", "p_log_total"), "*fp32")
    built = compile_sm90(
        KERNELS,
        "linear_entropy_kernel",
        {
            "p_h": "*bf16",
            "p_w": "*bf16",
            **outputs,
            **dict.fromkeys(("T", "V", "D", "WHOLE"), "i32"),
        },
        {**constants, "WIDE": "tl.float32", "UPCAST": False},
        divisible_by_16=("p_h", "p_w", *outputs, "D"),
        num_warps=warps,
        num_stages=stages,
    )
    assert built.spill_bytes == 0
    assert built.count("HGMMA") > 0
    assert built.registers <= 255
    assert built.shared_bytes <= 227 * 1024


@needs_sm90_tools
@pytest.mark.parametrize("kernel", ["token_entropy_kernel", "token_entropy_backward_kernel"])
def test_on_sm90_logit_kernels_neither_spill_nor_use_atomics(kernel: str) -> None:
    names = ["p_grad", "p_x", "p_entropy", "p_peak", "p_log_total", "p_dx"]
    if kernel == "token_entropy_kernel":
        names = names[1:5]
    types = {name: "*bf16" if name in ("p_x", "p_dx") else "*fp32" for name in names}
    built = compile_sm90(
        KERNELS,
        kernel,
        {**types, "T": "i32", "V": "i32"},
        {"ROWS": 4, "COLUMNS": 512, "WIDE": "tl.float32"},
        divisible_by_16=names,
        num_warps=4,
    )
    assert built.spill_bytes == 0
    assert built.registers <= 128
    assert built.count("RED") == built.count("ATOM") == 0
