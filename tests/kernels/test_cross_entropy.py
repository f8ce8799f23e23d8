"""Loss sums against torch in float64, with ignored targets, in 16 bits, by chunks, and on every face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import ALL_FACES, FAST_FACES, assert_close, on_face, poisoned
from sm90 import compile_sm90, needs_sm90_tools
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from weft.kernels import IGNORED, cross_entropy_sums, linear_cross_entropy
from weft.kernels.cross_entropy import linear_cross_entropy_reference


def _expected(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = targets != IGNORED
    entropy = cross_entropy(logits[kept], targets[kept], reduction="sum")
    return entropy, logits[kept].logsumexp(-1).square().sum()


TARGETS = torch.tensor([2, IGNORED, 0, 4, IGNORED, 4])


def test_values_and_gradients_in_float64() -> None:
    logits = (5 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
    for ours, theirs in zip(
        cross_entropy_sums(logits, TARGETS), _expected(logits, TARGETS), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        ours_grad, theirs_grad = (
            torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs)
        )
        torch.testing.assert_close(ours_grad, theirs_grad)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sums(x, TARGETS), (logits,))


def test_ignored_positions_cannot_spoil_the_sum() -> None:
    logits = torch.randn(6, 5)
    clean = cross_entropy_sums(logits, TARGETS)
    logits[1], logits[4] = float("nan"), float("inf")
    logits.requires_grad_()
    dirty = cross_entropy_sums(logits, TARGETS)
    assert [x.item() for x in dirty] == [x.item() for x in clean]
    (dirty[0] + dirty[1]).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[TARGETS == IGNORED] == 0).all()


def test_nothing_counted_is_zero() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    entropy, square = cross_entropy_sums(logits, torch.full((3,), IGNORED))
    (entropy + square).backward()
    assert (entropy.item(), square.item(), logits.grad.abs().sum().item()) == (0, 0, 0)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits = (4 * torch.randn(4000, 11)).bfloat16().requires_grad_()
    targets = torch.randint(0, 11, (4000,))
    entropy, square = cross_entropy_sums(logits, targets)
    exact = _expected(logits.detach().double(), targets)
    assert entropy.dtype == square.dtype == torch.float32
    assert entropy.item() == pytest.approx(exact[0].item(), rel=1e-5)
    assert square.item() == pytest.approx(exact[1].item(), rel=1e-5)
    entropy.backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 6, 100])
def test_chunks_change_neither_sums_nor_gradients(chunk_tokens: int | None) -> None:
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    expected = _expected(hidden @ weight.T, TARGETS)
    sums = linear_cross_entropy(hidden, weight, TARGETS, chunk_tokens)
    torch.testing.assert_close(sums, expected)
    ours = torch.autograd.grad(sums[0] + 0.1 * sums[1], (hidden, weight))
    theirs = torch.autograd.grad(expected[0] + 0.1 * expected[1], (hidden, weight))
    torch.testing.assert_close(ours, theirs)


def test_chunks_keep_no_logits() -> None:
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    targets = torch.randint(0, 50, (64,))

    def largest_kept(chunk_tokens: int | None) -> int:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x
        ):
            linear_cross_entropy(hidden, weight, targets, chunk_tokens)
        return max(kept, default=0)

    assert largest_kept(None) == 64 * 50
    assert largest_kept(8) < 64 * 50 / 4


def _problem(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::4] = IGNORED
    return (
        torch.randn(tokens, width, dtype=dtype),
        torch.randn(vocabulary, width, dtype=dtype),
        targets,
    )


def _run(
    call: Callable[..., tuple[Tensor, Tensor]],
    *inputs: Tensor,
    device: torch.device,
    factors: tuple[float, float] = (0.7, -0.3),
) -> list[Tensor]:
    """Sums and the gradients of all inputs under the two given incoming gradients."""
    leaves = [x.detach().to(device).requires_grad_() for x in inputs]
    sums = call(*leaves)
    (factors[0] * sums[0] + factors[1] * sums[1]).backward()
    return [*(x.detach() for x in sums), *(leaf.grad for leaf in leaves)]


def _assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(ours, theirs, tolerance, f"result {place}")


CPU = torch.device("cpu")


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [(1, 1), (2, 2), (7, 33), (8, 512), (9, 513), (3, 4096), (2, 4097), (2, 9001)],
)
def test_faces_equal_torch_in_float64(face: str, tokens: int, vocabulary: int) -> None:
    # Three rows in four count, the first among them; the vocabularies straddle the kernels' tiles.
    logits = 6 * torch.randn(tokens, vocabulary, dtype=torch.float64)
    _, _, targets = _problem(tokens, 1, vocabulary)
    expected = _run(lambda x: _expected(x, targets), logits, device=CPU)
    with on_face(face) as device:
        exact = _run(lambda x: cross_entropy_sums(x, targets.to(device)), logits, device=device)
        single = _run(
            lambda x: cross_entropy_sums(x, targets.to(device)), logits.float(), device=device
        )
    _assert_all_close(exact, expected, 1e-12)
    # A vocabulary of one has zero loss and a gradient of rounding errors.
    if vocabulary > 1:
        _assert_all_close(single, expected, 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, 4, 12])
@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
def test_projections_equal_torch_in_float64(
    face: str, chunk_tokens: int | None, factors: tuple[float, float]
) -> None:
    hidden, weight, targets = _problem(9, 5, 7, torch.float64)
    expected = _run(
        lambda h, w: _expected(h @ w.T, targets), hidden, weight, device=CPU, factors=factors
    )
    with on_face(face) as device:
        found = _run(
            lambda h, w: linear_cross_entropy(h, w, targets.to(device), chunk_tokens),
            *(hidden, weight),
            device=device,
            factors=factors,
        )
    _assert_all_close(found, expected, 1e-12)


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("face", ["reference", "cpu"])
def test_projections_pass_gradcheck(face: str, chunk_tokens: int | None) -> None:
    hidden, weight, targets = _problem(5, 3, 4, torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    with on_face(face):
        assert torch.autograd.gradcheck(
            lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens), leaves
        )


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e38])
def test_ignored_positions_are_excluded_exactly(
    face: str, chunk_tokens: int | None, spoil: float
) -> None:
    """To the bit what zeros there would give, in sums and in all gradients."""
    hidden, weight, targets = _problem(8, 4, 6)
    results = []
    for value in (0.0, spoil):
        hidden[targets == IGNORED] = value
        with on_face(face) as device:
            results.append(
                _run(
                    lambda h, w: linear_cross_entropy(h, w, targets.to(h.device), chunk_tokens),
                    *(hidden, weight),
                    device=device,
                )
            )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[1][2][targets == IGNORED] == 0).all()


@pytest.mark.parametrize("face", ALL_FACES)
def test_infinite_logits(face: str) -> None:
    """An entry that cannot be chosen costs nothing; an infinite one shows in the sum."""
    infinite = float("inf")
    logits = torch.randn(3, 4098)
    logits[:, :4097] = -infinite
    logits[0, [3, 4097]] = torch.tensor([0.0, 1.0])
    logits[1, 4097] = 2
    logits[2, :3] = torch.tensor([0.5, infinite, 100.0])
    targets = torch.tensor([3, 4097, 0])
    with on_face(face) as device:
        rows = [
            [float(x) for x in cross_entropy_sums(logits[i : i + 1].to(device), t.to(device))]
            for i, t in enumerate(targets.split(1))
        ]
    first = logits[0].logsumexp(0).item()
    assert rows[0] == pytest.approx([first, first**2], rel=1e-6)
    assert rows[1] == pytest.approx([0, 4])
    assert rows[2] == [infinite, infinite]


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_sixteen_bit_projections(face: str, dtype: torch.dtype, chunk_tokens: int | None) -> None:
    hidden, weight, targets = _problem(12, 8, 11)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    expected = _run(
        lambda h, w: _expected(h @ w.T, targets), hidden.double(), weight.double(), device=CPU
    )
    with on_face(face) as device:
        found = _run(
            lambda h, w: linear_cross_entropy(h, w, targets.to(device), chunk_tokens),
            *(hidden, weight),
            device=device,
        )
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype]
    _assert_all_close(found, expected, 1e-2)


def test_weight_gradient_of_chunks_is_summed_in_fp32() -> None:
    """4096 equal parts: a bf16 sum would stop at 256 of them."""
    hidden = torch.ones(4096, 1).bfloat16()
    weight = torch.zeros(2, 1).bfloat16()
    targets = torch.zeros(4096).long()
    found = _run(
        lambda h, w: linear_cross_entropy(h, w, targets, 1),
        *(hidden, weight),
        device=CPU,
        factors=(1.0, 0.0),
    )
    assert found[3].flatten().tolist() == [-2048, 2048]


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_autocast_multiplies_in_16_bits_and_keeps_fp32_gradients(chunk_tokens: int | None) -> None:
    hidden, weight, targets = _problem(11, 6, 9)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(hidden, weight, targets, chunk_tokens)

    found = _run(call, hidden, weight, device=CPU)
    exact = _run(lambda h, w: _expected(h @ w.T, targets), hidden, weight, device=CPU)
    assert all(x.dtype == torch.float32 for x in found)
    _assert_all_close(found, exact, 2e-2)
    assert not torch.equal(found[3], exact[3])
    # Narrowed hidden states and weights, but no narrowed sums.
    rounded = _run(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens),
        *(hidden.bfloat16(), weight.bfloat16()),
        device=CPU,
    )
    assert_close(rounded[3].float(), found[3], 3e-3)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_a_backward_inside_autocast_is_not_narrowed(face: str, chunk_tokens: int | None) -> None:
    hidden, weight, targets = _problem(11, 6, 9)
    grads = []
    with on_face(face) as device:
        for is_inside in (False, True):
            leaves = [x.clone().to(device).requires_grad_() for x in (hidden, weight)]
            sums = linear_cross_entropy(*leaves, targets.to(device), chunk_tokens)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_inside):
                grads.append(torch.autograd.grad(sum(sums), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("face", ALL_FACES)
def test_frozen_inputs_get_no_gradient(face: str) -> None:
    for chunk_tokens in (None, 2):
        for frozen in (0, 1):
            hidden, weight, targets = _problem(5, 3, 4)
            with on_face(face) as device:
                leaves = [hidden.to(device), weight.to(device)]
                leaves[1 - frozen].requires_grad_()
                sums = linear_cross_entropy(*leaves, targets.to(device), chunk_tokens)
                sum(sums).backward()
            assert leaves[frozen].grad is None
            whole = _run(
                lambda h, w, t=targets: linear_cross_entropy_reference(h, w, t),
                *(hidden, weight),
                device=CPU,
                factors=(1.0, 1.0),
            )
            assert_close(leaves[1 - frozen].grad, whole[3 - frozen], 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
def test_strided_inputs_and_poisoned_memory(face: str) -> None:
    hidden, weight, targets = _problem(6, 4, 5)
    expected = _run(
        lambda h, w: linear_cross_entropy_reference(h, w, targets),
        *(hidden.double(), weight.double()),
        device=CPU,
    )
    with on_face(face) as device:
        spread = torch.full((6, 8), float("nan"), device=device)[:, ::2]
        spread.copy_(hidden)
        wanted = torch.full((12,), 99, device=device)[::2]
        wanted.copy_(targets)
        turned = weight.T.contiguous().to(device)
        for chunk_tokens in (None, 4):
            found = _run(
                lambda h, w, c=chunk_tokens: linear_cross_entropy(h, w.T, wanted, c),
                *(spread, turned),
                device=device,
            )
            found[3] = found[3].T
            _assert_all_close(found, expected, 1e-5)
        logits = torch.randn(5, 6)
        sums = cross_entropy_sums(poisoned(logits.T.to(device)), poisoned(targets.to(device)))
    kept = _expected(logits.T.double(), targets)
    assert [x.item() for x in sums] == pytest.approx([x.item() for x in kept], rel=1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_no_tokens(face: str, chunk_tokens: int | None) -> None:
    with on_face(face) as device:
        hidden, weight, targets = (x.to(device) for x in _problem(0, 3, 4))
        found = _run(
            lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens),
            *(hidden, weight),
            device=device,
        )
        logits = _run(
            lambda x: cross_entropy_sums(x, targets), hidden[:, :0] @ weight.T[:0], device=device
        )
    assert [x.abs().sum().item() for x in (*found, *logits)] == [0] * 7


@pytest.mark.parametrize("face", ALL_FACES)
def test_runs_repeat_to_the_bit(face: str) -> None:
    hidden, weight, targets = _problem(9, 5, 7)
    with on_face(face) as device:
        for chunk_tokens in (None, 4):
            first, second = (
                _run(
                    lambda h, w, c=chunk_tokens: linear_cross_entropy(h, w, targets.to(device), c),
                    *(hidden, weight),
                    device=device,
                )
                for _ in range(2)
            )
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("face", FAST_FACES)
def test_a_graph_may_be_used_twice(face: str) -> None:
    """No backward pass may write over what another needs."""
    hidden, weight, targets = _problem(5, 3, 4)
    with on_face(face) as device:
        leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
        for chunk_tokens in (None, 2):
            sums = linear_cross_entropy(*leaves, targets.to(device), chunk_tokens)
            first, second = (
                torch.autograd.grad(sums[0], leaves, retain_graph=True) for _ in range(2)
            )
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("face", FAST_FACES)
def test_registration(face: str) -> None:
    with on_face(face) as device:
        hidden, weight, targets = (x.to(device) for x in _problem(5, 3, 4))
        leaves = (hidden.requires_grad_(), weight.requires_grad_(), targets)
        for chunk_tokens in (0, 2):
            torch.library.opcheck(
                torch.ops.weft.linear_cross_entropy.default, (*leaves, chunk_tokens, torch.float32)
            )
        torch.library.opcheck(
            torch.ops.weft.cross_entropy_sums.default,
            (torch.randn(5, 4, device=device, requires_grad=True), targets),
        )


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_compiled_equals_eager(face: str, chunk_tokens: int | None) -> None:
    hidden, weight, targets = _problem(9, 5, 7)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        sums = linear_cross_entropy(2 * hidden, weight, targets.to(hidden.device), chunk_tokens)
        return sums[0] + 1, sums[1]

    with on_face(face) as device:
        found = _run(torch.compile(call, fullgraph=True), hidden, weight, device=device)
        expected = _run(call, hidden, weight, device=device)
    _assert_all_close(found, expected, 1e-6)


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_recomputed_equals_kept(face: str, chunk_tokens: int | None) -> None:
    hidden, weight, targets = _problem(9, 5, 7)
    with on_face(face) as device:
        arguments = (targets.to(device), chunk_tokens)
        plain = _run(
            lambda h, w: linear_cross_entropy(h, w, *arguments), hidden, weight, device=device
        )
        again = _run(
            lambda h, w: checkpoint(linear_cross_entropy, h, w, *arguments, use_reentrant=False),
            *(hidden, weight),
            device=device,
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_tracing_needs_no_values() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        hidden, weight, targets = _problem(9, 5, 7)
        for chunk_tokens in (None, 4):
            found = _run(
                lambda h, w, c=chunk_tokens: linear_cross_entropy(h, w, targets, c),
                *(hidden, weight),
                device=CPU,
            )
            assert [tuple(x.shape) for x in found] == [(), (), (9, 5), (7, 5)]


@pytest.mark.parametrize("face", [pytest.param(*FAST_FACES[1].values, marks=FAST_FACES[1].marks)])
def test_a_wrong_target_shows_where_nobody_may_look(face: str) -> None:
    logits = torch.randn(3, 5)
    with on_face(face) as device:
        for wrong in (5, -1):
            targets = torch.tensor([0, wrong, 2], device=device)
            entropy, square, _ = torch.ops.weft.cross_entropy_sums(logits.to(device), targets)
            assert torch.isnan(entropy)
            assert torch.isfinite(square)


H, W, T = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"hidden has shape \(2, 2, 3\), expected \(\*, \*\)", {"hidden": H.view(2, 2, 3)}),
        ("hidden is int64", {"hidden": H.long()}),
        (r"weight has shape \(5, 2\), expected \(\*, 3\)", {"weight": W[:, :2]}),
        ("weight is int64", {"weight": W.long()}),
        (
            "hidden is float32 and weight bfloat16, expected one type for both, or autocast",
            {"weight": W.bfloat16()},
        ),
        (r"targets has shape \(3,\), expected \(4\)", {"targets": T[:3]}),
        ("targets is int32, expected int64", {"targets": T.int()}),
        ("targets holds 5, expected 0 to 4, or -100 to ignore", {"targets": T + 1}),
        ("targets holds -1, expected 0 to 4, or -100 to ignore", {"targets": T - 1}),
        ("chunk_tokens is 0, expected at least 1, or None", {"chunk_tokens": 0}),
        ("weight is on meta and hidden on cpu", {"weight": W.to("meta")}),
    ],
)
def test_argument_errors(message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": H, "weight": W, "targets": T, **arguments})


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"logits has shape \(4,\), expected \(\*, \*\)", {"logits": H[:, 0]}),
        ("logits is int64", {"logits": H.long()}),
        ("targets holds 4, expected 0 to 2, or -100 to ignore", {}),
        (r"targets has shape \(1,\), expected \(4\)", {"targets": T[:1]}),
        ("targets is on meta and logits on cpu", {"targets": T.to("meta")}),
    ],
)
def test_argument_errors_of_sums(message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy_sums(**{"logits": H, "targets": T, **arguments})


@needs_sm90_tools
@pytest.mark.parametrize("vocabulary", [260, 128256])
@pytest.mark.parametrize("kernel", ["losses_kernel", "gradient_kernel"])
def test_machine_code_of_sm90(kernel: str, vocabulary: int) -> None:
    from weft.kernels.cross_entropy import triton as kernels

    tile = kernels.tile_of(vocabulary)
    sums = ("p_entropy", "p_log_partition")
    pointers = {"p_logits": "*bf16", "p_targets": "*i64", **dict.fromkeys(sums, "*fp32")}
    sizes = {"T": "i32", "V": "i32"}
    if kernel == "gradient_kernel":
        del pointers["p_entropy"]
        pointers |= {"p_entropy_grad": "*fp32", "p_square_grad": "*fp32", "p_out": "*bf16"}
        sizes["blocks_v"] = "i32"
    built = compile_sm90(
        kernels.__name__,
        kernel,
        {**pointers, **sizes},
        {"BT": tile.tokens, "BV": tile.entries, "IGNORED": IGNORED, "WIDE": "tl.float32"},
        divisible_by_16=[*pointers, *(["V"] if vocabulary % 16 == 0 else [])],
        num_warps=tile.warps,
    )
    assert built.spill_bytes == 0
    assert built.registers <= 128
    # Deterministic: nothing is added to memory.
    assert built.count("RED") == built.count("ATOM") == 0
    if vocabulary % 16 == 0:
        wide_loads = [line for line in built.code if "LDG" in line and ".128" in line]
        assert len(wide_loads) == tile.entries // 32 // tile.warps // 8
