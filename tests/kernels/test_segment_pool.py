"""Pooling of patches: values, gradients, ties, empty segments and NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import ALL_FACES, assert_close, needs_triton, on_face, poisoned
from patching import launches_without_values, random_patches
from sm90 import compile_sm90, needs_sm90_tools
from torch import Tensor
from weft.kernels.entropy_patching import POOL_MODES, segment_pool, segment_pool_reference
from weft.kernels.entropy_patching.segment_pool import _segment_pool, _segment_pool_backward

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def segments(total: int, **options: Any) -> tuple[Tensor, Tensor]:
    patches = random_patches(total, **options)
    return patches.starts, patches.lengths


def scattered(x: Tensor, starts: Tensor, lengths: Tensor, mode: str) -> Tensor:
    """By torch.scatter_reduce, for segments that cover all rows."""
    ids = torch.repeat_interleave(torch.arange(len(starts)), lengths)[:, None].expand_as(x)
    zeros = torch.zeros(len(starts), x.shape[1], dtype=x.dtype)
    return zeros.scatter_reduce(0, ids, x, {"max": "amax"}.get(mode, mode), include_self=False)


def run(
    face: str, x: Tensor, starts: Tensor, lengths: Tensor, mode: str, grad: Tensor
) -> tuple[Tensor, Tensor]:
    with on_face(face) as device:
        leaf = x.detach().to(device).requires_grad_()
        found = segment_pool(leaf, starts.to(device), lengths.to(device), mode)
        found.backward(grad.to(found))
    assert leaf.grad is not None
    assert found.dtype == leaf.grad.dtype == x.dtype
    return found.detach().cpu(), leaf.grad.cpu()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_matches_scatter_reduce(face: str, mode: str, dtype: torch.dtype) -> None:
    for total, channels in ((1, 1), (2, 3), (70, 33)):
        starts, lengths = segments(total)
        x = torch.randn(total, channels, dtype=torch.float64).to(dtype)
        exact = x.double().requires_grad_()
        expected = scattered(exact, starts, lengths, mode)
        grad = torch.randn(len(starts), channels, dtype=torch.float64)
        expected.backward(grad)
        found, x_grad = run(face, x, starts, lengths, mode, grad)
        assert exact.grad is not None
        assert_close(found, expected.detach(), TOLERANCE[dtype], "pooled")
        if mode == "mean" or dtype in (torch.float64, torch.float32):  # 16-bit values have ties
            assert_close(x_grad, exact.grad, TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("mode", POOL_MODES)
def test_thousands_of_rows_and_long_segments(mode: str) -> None:
    for options in ({"threshold": 0.8}, {"threshold": 0.995, "documents": 2}, {"threshold": 9.0}):
        starts, lengths = segments(5000, **options)
        x = torch.randn(5000, 16, dtype=torch.float64).requires_grad_()
        expected = scattered(x, starts, lengths, mode)
        grad = torch.randn_like(expected)
        (expected_grad,) = torch.autograd.grad(expected, x, grad)
        found, x_grad = run("cpu", x, starts, lengths, mode, grad)
        assert_close(found, expected.detach(), 1e-12)
        assert_close(x_grad, expected_grad, 1e-12)


@pytest.mark.parametrize("channels", [1, 33, 1023, 1024, 1025])
@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_channels_around_a_block(face: str, mode: str, channels: int) -> None:
    starts, lengths = segments(6)
    x, grad = torch.randn(6, channels), torch.randn(len(starts), channels)
    exact = x.double().requires_grad_()
    expected = segment_pool_reference(exact, starts, lengths, mode)
    expected.backward(grad.double())
    found, x_grad = run(face, x, starts, lengths, mode, grad)
    assert exact.grad is not None
    assert_close(found, expected.detach(), 1e-6)
    assert_close(x_grad, exact.grad, 1e-6)


@pytest.mark.parametrize("face", ALL_FACES)
def test_the_first_of_equal_rows_takes_the_gradient(face: str) -> None:
    x = torch.tensor(
        [[1.0, 5.0], [3.0, 5.0], [3.0, 5.0], [2.0, -float("inf")], [2.0, -float("inf")]]
    )
    starts, lengths = torch.tensor([0, 3]).int(), torch.tensor([3, 2]).int()
    found, grad = run(face, x, starts, lengths, "max", torch.ones(2, 2))
    assert found.tolist() == [[3.0, 5.0], [2.0, -float("inf")]]
    assert grad.tolist() == [[0, 1], [1, 0], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_empty_segments_and_rows_outside(face: str, mode: str) -> None:
    """Gaps, empty segments in the middle and at the end; NaN in a gap or in an absent gradient reaches nothing."""
    x = torch.randn(8, 3)
    x[[0, 7]] = float("nan")
    starts, lengths = torch.tensor([1, 3, 3, 6, 8, 8]).int(), torch.tensor([2, 0, 3, 1, 0, 0]).int()
    grad = torch.randn(6, 3)
    grad[[1, 4, 5]] = float("nan")
    found, x_grad = run(face, x, starts, lengths, mode, grad)
    assert (found[[1, 4, 5]] == 0).all()
    assert (x_grad[[0, 7]] == 0).all()
    assert torch.isfinite(found).all()
    assert torch.isfinite(x_grad).all()
    torch.testing.assert_close(x_grad[1:3].sum(0), grad[0])
    torch.testing.assert_close(x_grad[3:6].sum(0), grad[2])


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_nan_stays_in_its_segment(face: str, mode: str) -> None:
    x = torch.randn(9, 4)
    x[4, 1] = x[5, 1] = float("nan")
    starts, lengths = torch.tensor([0, 3, 7]).int(), torch.tensor([3, 4, 2]).int()
    grad = torch.randn(3, 4)
    found, x_grad = run(face, x, starts, lengths, mode, grad)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(found.isnan(), expected)
    assert torch.isfinite(x_grad).all()
    if mode == "max":
        assert x_grad[:, 1].nonzero().flatten().tolist()[1:2] == [4]
    grad[1] = float("nan")
    _, x_grad = run(face, x, starts, lengths, mode, grad)
    assert torch.isfinite(x_grad[[0, 1, 2, 7, 8]]).all()


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_nothing_to_pool(face: str, mode: str) -> None:
    none = torch.zeros(0).int()
    found, x_grad = run(
        face, torch.randn(0, 3), torch.zeros(2).int(), torch.zeros(2).int(), mode, torch.ones(2, 3)
    )
    assert found.tolist() == [[0] * 3] * 2
    assert x_grad.shape == (0, 3)
    found, x_grad = run(face, torch.randn(4, 3), none, none, mode, torch.ones(0, 3))
    assert found.shape == (0, 3)
    assert (x_grad == 0).all()
    found, x_grad = run(
        face,
        torch.randn(4, 0),
        torch.tensor([0]).int(),
        torch.tensor([4]).int(),
        mode,
        torch.ones(1, 0),
    )
    assert found.shape == (1, 0)


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_strided_expanded_and_poisoned(face: str, mode: str) -> None:
    starts, lengths = segments(30)
    x = torch.randn(30, 40)
    clean = run(face, x[:, ::2].contiguous(), starts, lengths, mode, torch.ones(len(starts), 20))
    strided = run(face, x[:, ::2], starts, lengths, mode, torch.ones(1, 1).expand(len(starts), 20))
    with on_face(face) as device:
        dirty = segment_pool(
            poisoned(x[:, ::2].to(device)),
            poisoned(starts.to(device)),
            poisoned(lengths.to(device)),
            mode,
        ).cpu()
        every_second = torch.stack([starts, lengths], 1).to(device)
        views = segment_pool(
            x[:, ::2].to(device), every_second[:, 0], every_second[:, 1], mode
        ).cpu()
    torch.testing.assert_close(dirty, clean[0])
    torch.testing.assert_close(views, clean[0])
    for one, other in zip(clean, strided, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_gradcheck_operator_contract_and_repeats(face: str, mode: str) -> None:
    starts, lengths = segments(9)
    with on_face(face) as device:
        starts, lengths = starts.to(device), lengths.to(device)
        x = torch.randn(9, 2, dtype=torch.float64, device=device, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x: segment_pool(x, starts, lengths, mode), x, fast_mode=True
        )
        torch.library.opcheck(torch.ops.weft.segment_pool, (x, starts, lengths, mode))
    runs = [
        run(face, x.detach(), starts, lengths, mode, torch.ones(len(starts), 2)) for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_compiled_and_recomputed_equal_plain(face: str, mode: str) -> None:
    starts, lengths = segments(9)

    def total(x: Tensor) -> Tensor:
        return segment_pool(x.sin(), starts.to(x.device), lengths.to(x.device), mode).square().sum()

    results = []
    with on_face(face) as device:
        for wrapped in (
            total,
            torch.compile(total, fullgraph=True, backend="aot_eager"),
            lambda x: torch.utils.checkpoint.checkpoint(total, x, use_reentrant=False),
        ):
            x = torch.linspace(-1, 1, 27, device=device).reshape(9, 3).requires_grad_()
            wrapped(x).backward()
            results.append(x.grad)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_segments_match_the_definition(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=8))
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    assume(sum(sizes))
    mode = data.draw(st.sampled_from(POOL_MODES))
    starts, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        starts.append(at + gap)
        at += gap + size
    x = torch.randint(-3, 4, (at + 1, 3)).double().requires_grad_()  # many ties
    tables = torch.tensor(starts).int(), torch.tensor(sizes).int()
    expected = segment_pool_reference(x, *tables, mode)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    found, x_grad = run("cpu", x, *tables, mode, grad)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(x_grad, expected_grad)


@needs_triton
@pytest.mark.parametrize("mode", POOL_MODES)
def test_the_host_never_waits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels.entropy_patching import segment_pool_triton

    starts, lengths = segments(50)
    x = torch.randn(50, 8)
    arguments = (x, starts, lengths, mode)
    assert launches_without_values(monkeypatch, segment_pool_triton, _segment_pool, arguments) == 1
    rows = torch.zeros(len(starts), 8).int()
    arguments = (torch.randn(len(starts), 8), rows, starts, lengths, 50, mode)
    assert (
        launches_without_values(monkeypatch, segment_pool_triton, _segment_pool_backward, arguments)
        == 1
    )


def ints(*values: int) -> Tensor:
    return torch.tensor(values).int()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), ints(0), ints(3), "min"), "unknown pool mode 'min'; known: max, mean"),
        ((torch.zeros(3), ints(0), ints(3), "max"), r"x has shape \(3,\), expected \(\*, \*\)"),
        ((torch.zeros(3, 2).int(), ints(0), ints(3), "max"), "x is int32, expected float64"),
        (
            (torch.zeros(3, 2), ints(0)[None], ints(3), "max"),
            r"starts has shape \(1, 1\), expected \(\*\)",
        ),
        (
            (torch.zeros(3, 2), ints(0), ints(3, 0), "max"),
            r"lengths has shape \(2,\), expected \(1\)",
        ),
        ((torch.zeros(3, 2), ints(0).long(), ints(3), "max"), "starts is int64, expected int32"),
        (
            (torch.zeros(3, 2), ints(0), ints(3).float(), "max"),
            "lengths is float32, expected int32",
        ),
        ((torch.zeros(3, 2), ints(0).to("meta"), ints(3), "max"), "starts is on meta and x on cpu"),
    ],
)
def test_argument_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_pool(*arguments)


@needs_sm90_tools
def test_on_sm90_the_kernels_neither_spill_nor_use_atomics() -> None:
    module = "weft.kernels.entropy_patching.segment_pool_triton"
    shared = {"IS_MAX": True, "CHANNELS": 1024, "WIDE": "tl.float32"}
    forward = {
        "p_x": "*bf16",
        "p_start": "*i32",
        "p_length": "*i32",
        "p_out": "*bf16",
        "p_row": "*i32",
        "D": "i32",
    }
    backward = {
        "p_grad": "*bf16", "p_row": "*i32", "p_segment": "*i64", "p_length": "*i32", "p_dx": "*bf16",
        **dict.fromkeys("TPD", "i32"),
    }  # fmt: skip
    aligned = ("p_x", "p_out", "p_row", "p_grad", "p_dx", "D")
    for kernel, types, constants in (
        ("segment_pool_kernel", forward, shared),
        ("segment_pool_backward_kernel", backward, shared | {"ROWS": 2}),
    ):
        built = compile_sm90(
            module, kernel, types, constants, num_warps=4,
            divisible_by_16=[name for name in aligned if name in types],
        )  # fmt: skip
        assert built.spill_bytes == 0
        assert built.registers <= 64
        assert built.count("RED.") == built.count("ATOM") == built.count("SHFL") == 0
