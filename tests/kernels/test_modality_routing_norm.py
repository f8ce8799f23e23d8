"""RMS norm and the way of heads to their positions, on all faces, against float64 and against parts that exist."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import ALL_FACES, DEVICE, assert_close, needs_triton, on_face, poisoned
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from weft.kernels import apply_rotary, rotary_frequencies, rotary_table
from weft.kernels.faces import use_kernels
from weft.kernels.modality_routing import (
    Routing,
    qk_norm_rope_unpermute,
    route_by_modality,
    routed_rms_norm,
)
from weft.kernels.modality_routing import norm as norm_module
from weft.kernels.modality_routing.norm import _routed_rms_norm_backward_op, _routed_rms_norm_op
from weft.kernels.modality_routing.qk import _turn_backward_op, _turn_op
from weft.kernels.modality_routing.reference import (
    qk_norm_rope_unpermute_reference,
    routed_rms_norm_reference,
)
from weft.kernels.rms_norm import rms_norm_reference
from weft.kernels.rotary import RotaryTable

EPS = 1e-5
IDS = {
    "mixed": [0, 2, 2, 0, 1, 2, 0],
    "absent": [2, 0, 2, 0, 0],
    "one position": [1],
    "no positions": [],
    "one modality": [1] * 18,
}
NORMS = ["none", "head", "row", "mixed"]


@pytest.fixture(autouse=True)
def _nothing_by_luck() -> Iterator[None]:
    """What an op does not write is NaN (the largest integer), instead of what lay there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def route(ids: list[int], device: torch.device | str = "cpu", n: int = 3) -> Routing:
    return route_by_modality(torch.tensor(ids, dtype=torch.uint8), n).to(device)


def random_ids(total: int, n: int = 3) -> list[int]:
    return torch.randint(0, n, (total,), generator=torch.Generator().manual_seed(total)).tolist()


def gradients(
    run: Callable[..., Any], inputs: list[Tensor], seeds: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a function of fresh leaves."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = run(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    given = [seed.to(value) for seed, value in zip(seeds, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, given, materialize_grads=True)
    return [value.detach() for value in outputs], list(grads)


def compare(ours: tuple[list[Tensor], ...], theirs: tuple[list[Tensor], ...], tol: float) -> None:
    pairs = zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True)
    for index, (found, expected) in enumerate(pairs):
        assert_close(found.cpu(), expected.cpu(), tol, f"value {index}")


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("channels", [1, 3, 33, 64])
@pytest.mark.parametrize("name", IDS)
def test_norm_and_gradients_in_float64(face: str, channels: int, name: str) -> None:
    ids = IDS[name]
    x = torch.randn(len(ids), channels, dtype=torch.float64)
    weights, seed = torch.randn(3, channels, dtype=torch.float64), torch.randn_like(x)
    modality = torch.tensor(ids).sort().values
    with on_face(face) as device:
        routing = route(ids, device)
        ours = gradients(
            lambda x, w: routed_rms_norm(x, w, routing, EPS),
            [x.to(device), weights.to(device)],
            [seed],
        )

    def alone(x: Tensor, w: Tensor) -> Tensor:
        """One modality after the other by the norm of models with a single one."""
        return torch.cat([rms_norm_reference(x[modality == m], w[m], EPS) for m in range(3)])

    compare(ours, gradients(alone, [x, weights], [seed]), 1e-10)
    for m in set(range(3)) - set(ids):
        assert not ours[1][1][m].any()


@pytest.mark.parametrize("total", [1, 15, 16, 17, 33, 200])
@needs_triton
def test_norm_of_triton_at_the_borders_of_its_programs(total: int) -> None:
    ids = random_ids(total)
    x, weights = torch.randn(total, 130, dtype=torch.float64), torch.rand(3, 130).double()
    expected = gradients(
        lambda x, w: routed_rms_norm_reference(x, w, route(ids).offsets, EPS)[0],
        [x, weights],
        [torch.ones_like(x)],
    )
    with on_face("triton") as device:
        routing, ones = route(ids, device), torch.ones_like(x)
        run = lambda x, w: routed_rms_norm(x, w, routing, EPS)  # noqa: E731
        ours = gradients(run, [x.to(device), weights.to(device)], [ones])
    compare(ours, expected, 1e-10)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_norm_in_each_type(face: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    ids = random_ids(20)
    # The squares overflow fp16, and a bf16 sum of them would lose all digits.
    x, weights = (300 + torch.randn(20, 70)).to(dtype), (torch.rand(3, 70) + 0.5).to(weight_dtype)
    seed = torch.randn(20, 70).to(dtype)
    with on_face(face) as device:
        routing = route(ids, device)
        run = lambda x, w: routed_rms_norm(x, w, routing, EPS)  # noqa: E731
        ours = gradients(run, [x.to(device), weights.to(device)], [seed])
    assert [value.dtype for value in (*ours[0], *ours[1])] == [dtype, dtype, weight_dtype]
    offsets = route(ids).offsets
    expected = gradients(
        lambda x, w: routed_rms_norm_reference(x, w, offsets, EPS)[0],
        [x.double(), weights.double()],
        [seed],
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(ours[0][0].cpu(), expected[0][0], tolerance)
    # The gradient of nearly equal channels is a small difference of large terms.
    assert_close(ours[1][0].cpu(), expected[1][0], 10 * tolerance)
    assert_close(ours[1][1].cpu(), expected[1][1], tolerance)


def test_norm_of_thousands_of_rows_and_of_separate_weights() -> None:
    routing = route_by_modality(torch.randint(0, 2, (5000,)), 2)
    x, parts = torch.randn(5000, 33), [torch.rand(33, requires_grad=True) for _ in range(2)]
    parts[0].requires_grad_(False)
    out = routed_rms_norm(x, parts, routing, EPS)
    rows = torch.stack(parts).detach().double().requires_grad_()
    expected, _ = routed_rms_norm_reference(x.double(), rows, routing.offsets, EPS)
    assert_close(out.detach(), expected.detach(), 1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert parts[0].grad is None
    assert_close(parts[1].grad, rows.grad[1], 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
def test_equal_weights_are_one_norm(face: str) -> None:
    x, weight = torch.randn(9, 12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    with on_face(face) as device:
        out = routed_rms_norm(
            x.to(device), [weight.to(device)] * 3, route(random_ids(9), device), EPS
        )
    torch.testing.assert_close(
        out.cpu(), rms_norm_reference(x, weight, EPS), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("face", ALL_FACES)
def test_norm_of_strange_inputs_in_poisoned_memory(face: str) -> None:
    ids = random_ids(6)
    wide, weights = torch.randn(6, 40, dtype=torch.float64), torch.rand(3, 10).double()
    inputs = [wide[:, 5:15], wide[:, :20:2], wide[:1, :10].expand(6, 10), wide.t()[:10, :6].t()]
    with on_face(face) as device:
        routing = route(ids, device)
        for x in [*inputs, poisoned(wide[:, :10].contiguous())]:
            held = poisoned(weights.to(device)).requires_grad_()
            given = x.to(device).requires_grad_()
            out = routed_rms_norm(given, held, routing, EPS)
            expected, _ = routed_rms_norm_reference(
                x.contiguous(), weights, route(ids).offsets, EPS
            )
            assert_close(out.detach().cpu(), expected, 1e-12)
            out.sum().backward()
            assert torch.isfinite(held.grad).all()


@pytest.mark.parametrize("face", ALL_FACES)
def test_nan_in_a_row_stays_in_the_row_and_its_modality(face: str) -> None:
    ids = [0, 1, 0, 2, 1]
    x = torch.randn(5, 8)
    x[2] = float("nan")  # sorted rows: 0, 0, 1, 1, 2
    with on_face(face) as device:
        given, weights = x.to(device).requires_grad_(), torch.rand(3, 8, device=device)
        weights.requires_grad_()
        out = routed_rms_norm(given, weights, route(ids, device), EPS)
        out.backward(torch.ones_like(out))
    is_hit = torch.tensor([False, False, True, False, False])
    for value in (out, given.grad):
        assert torch.equal(value.isnan().any(1).cpu(), is_hit)
    assert torch.equal(weights.grad.isnan().any(1).cpu(), torch.tensor([False, True, False]))


def test_rows_too_wide_for_registers_run_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_module, "WIDEST_ROW", 4)
    x, weights, routing = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5), route([0, 1, 0])
    with on_face("triton" if DEVICE.type == "cuda" else "reference"):
        out = routed_rms_norm(x, weights, routing, EPS)
    expected, _ = routed_rms_norm_reference(x, weights, routing.offsets, EPS)
    assert torch.equal(out, expected)


class Case:
    """Heads of a batch, their weights and table, and the gradients that come back."""

    def __init__(
        self,
        ids: list[int],
        norm: str,
        heads: tuple[int, int, int] = (4, 2, 6),
        dtype: torch.dtype = torch.float64,
        has_table: bool = True,
    ) -> None:
        n_q, n_k, width = heads
        self.ids, total = ids, len(ids)
        self.heads = [torch.randn(total, n, width).to(dtype) for n in (n_q, n_k, n_k)]
        full = {"none": (0, 0), "head": (width, width), "row": (n_q * width, n_k * width)}
        sizes = full.get(norm, (n_q * width, width))
        self.weights = [(torch.rand(3, n) + 0.5).to(dtype) for n in sizes if n]
        self.seeds = [torch.randn_like(value) for value in self.heads]
        self.table: RotaryTable | None = None
        if has_table:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            positions = torch.arange(total) % 7
            self.table = rotary_table(positions, rotary_frequencies(width, 1e4, dtype=wide))

    def run(self, face: str) -> tuple[list[Tensor], list[Tensor]]:
        with on_face(face) as device:
            routing, table = route(self.ids, device), self.table
            if table is not None:
                table = RotaryTable(table.cos.to(device), table.sin.to(device))

            def op(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
                rows = weights or (None, None)
                return qk_norm_rope_unpermute(q, k, v, routing, table, *rows, eps=EPS)

            inputs = [value.to(device) for value in (*self.heads, *self.weights)]
            return gradients(op, inputs, self.seeds)

    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """By the definition, in float64."""
        routing, table = route(self.ids), self.table
        turns = (None, None) if table is None else (table.cos.double(), table.sin.double())

        def op(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            rows = weights or (None, None)
            return qk_norm_rope_unpermute_reference(
                q, k, v, *rows, *turns, routing.inverse, routing.offsets, EPS
            )

        return gradients(op, [value.double() for value in (*self.heads, *self.weights)], self.seeds)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", IDS)
def test_heads_and_gradients_in_float64(face: str, norm: str, name: str) -> None:
    case = Case(IDS[name], norm)
    found = case.run(face)
    compare(found, case.expected(), 1e-10)
    for grad in found[1][3:]:
        for m in set(range(3)) - set(case.ids):
            assert not grad[m].any()


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("heads", [(1, 1, 2), (3, 3, 10), (6, 2, 8)])
@pytest.mark.parametrize("has_table", [False, True])
def test_odd_heads_with_and_without_positions(
    face: str, heads: tuple[int, int, int], has_table: bool
) -> None:
    case = Case(random_ids(9), "row", heads, has_table=has_table)
    compare(case.run(face), case.expected(), 1e-10)


@pytest.mark.parametrize("total", [15, 16, 17, 33])
@needs_triton
def test_heads_of_triton_at_the_borders_of_its_programs(total: int) -> None:
    case = Case(random_ids(total), "mixed", (2, 1, 4))
    compare(case.run("triton"), case.expected(), 1e-10)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("norm", ["none", "head", "row"])
def test_heads_are_norm_restore_and_rotary(face: str, norm: str) -> None:
    """The fused op against the ops it fuses, each tested on its own."""
    case = Case(random_ids(12), norm)
    routing = route(case.ids)

    def parts(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> list[Tensor]:
        out = []
        for x, w in zip((q, k), weights or (None, None), strict=True):
            if w is not None and norm == "head":
                modality = torch.tensor(case.ids).sort().values
                x = torch.cat([rms_norm_reference(x[modality == m], w[m], EPS) for m in range(3)])
            elif w is not None:
                x = routed_rms_norm(x.flatten(1), w, routing, EPS).view(x.shape)
            out.append(apply_rotary(routing.restore(x), case.table))
        return [*out, routing.restore(v)]

    expected = gradients(parts, [*case.heads, *case.weights], case.seeds)
    compare(case.run(face), expected, 1e-10)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_in_each_type(face: str, dtype: torch.dtype) -> None:
    case = Case(random_ids(14), "row", dtype=dtype)
    found = case.run(face)
    assert {value.dtype for value in itertools.chain(*found)} == {dtype}
    compare(found, case.expected(), 1e-5 if dtype == torch.float32 else 1e-2)


def test_thousands_of_positions() -> None:
    case = Case(random_ids(3000), "head", (4, 2, 16), torch.float32)
    compare(case.run("cpu"), case.expected(), 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
def test_heads_gradcheck(face: str) -> None:
    with on_face(face) as device:
        routing = route([1, 0, 1], device, 2)
        positions = torch.tensor([0, 1, 0], device=device)
        table = rotary_table(positions, rotary_frequencies(2, 10.0, dtype=torch.float64).to(device))
        shapes = [(3, 2, 2), (3, 1, 2), (3, 1, 2), (2, 4), (2, 2)]
        inputs = [
            torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
            for shape in shapes
        ]

        def run(q: Tensor, k: Tensor, v: Tensor, q_w: Tensor, k_w: Tensor) -> tuple[Tensor, ...]:
            return qk_norm_rope_unpermute(q, k, v, routing, table, q_w, k_w, eps=EPS)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("face", ALL_FACES)
def test_slices_of_one_projection_in_poisoned_memory(face: str) -> None:
    ids, (n_q, n_k, width) = random_ids(7), (2, 1, 4)
    joint = torch.randn(7, (n_q + 2 * n_k) * width, dtype=torch.float64)
    weights = torch.rand(3, width, dtype=torch.float64)
    expected = [joint[:, a:b].unflatten(1, (-1, width)) for a, b in ((0, 8), (8, 12), (12, 16))]
    offsets, inverse = route(ids).offsets, route(ids).inverse
    wanted = qk_norm_rope_unpermute_reference(
        *expected, weights, weights, None, None, inverse, offsets, EPS
    )
    with on_face(face) as device:
        held = poisoned(joint.to(device)).requires_grad_()
        rows = poisoned(weights.to(device))
        q, k, v = (part.unflatten(1, (-1, width)) for part in held.split([8, 4, 4], 1))
        out = qk_norm_rope_unpermute(q, k, v, route(ids, device), None, rows, rows, EPS)
        sum(value.sum() for value in out).backward()
    compare(([value.detach() for value in out],), (list(wanted),), 1e-12)
    assert torch.isfinite(held.grad).all()
    assert torch.equal(held.grad[:, 12:].cpu(), torch.ones(7, 4, dtype=torch.float64))
    # Heads that do not lie end to end are copied first.
    turned = torch.randn(width, n_q, 7, dtype=torch.float64).permute(2, 1, 0)
    strange = [turned, turned[:, :1].expand(7, 1, width), expected[2]]
    with on_face(face) as device:
        found = qk_norm_rope_unpermute(*(x.to(device) for x in strange), route(ids, device))
    assert torch.equal(found[0].cpu(), turned[inverse])
    assert torch.equal(found[1].cpu(), strange[1][inverse])


@pytest.mark.parametrize("face", ALL_FACES)
def test_nan_in_a_position_stays_there(face: str) -> None:
    case = Case([0, 1, 0, 2, 1], "row")
    with torch.no_grad():
        for value in case.heads:
            value[3] = float("nan")  # sorted row 3 is position 4, of modality 1
    outputs, grads = case.run(face)
    for value in outputs:
        assert value.isnan().flatten(1).any(1).tolist() == [False] * 4 + [True]
    for value in grads[:2]:
        assert value.isnan().flatten(1).any(1).tolist() == [False] * 3 + [True, False]
    assert torch.isfinite(grads[2]).all()
    for value in grads[3:]:
        assert value.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("face", ALL_FACES)
def test_same_bits_each_time(face: str) -> None:
    case = Case(random_ids(20), "mixed", dtype=torch.float32)
    first, second = case.run(face), case.run(face)
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("face", ALL_FACES)
def test_results_that_nobody_uses_count_as_zeros(face: str) -> None:
    case = Case([0, 1, 0], "head")
    case.seeds[1:] = [torch.zeros_like(seed) for seed in case.seeds[1:]]
    expected = case.run(face)
    with on_face(face) as device:
        leaves = [value.to(device).requires_grad_() for value in (*case.heads, *case.weights)]
        table = RotaryTable(case.table.cos.to(device), case.table.sin.to(device))
        out = qk_norm_rope_unpermute(*leaves[:3], route(case.ids, device), table, *leaves[3:], EPS)
        grads = torch.autograd.grad(out[0], leaves, case.seeds[0].to(device))
    for found, wanted in zip(grads, expected[1], strict=True):
        assert torch.equal(found, wanted)


def test_nothing_is_kept_where_nothing_is_normalised() -> None:
    case, kept = Case([0, 1, 0], "none", dtype=torch.float32), []
    q, k, v = (value.requires_grad_() for value in case.heads)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        qk_norm_rope_unpermute(q, k, v, route(case.ids), case.table)
    assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in (q, k, v)}


def heads_errors() -> dict[str, tuple[Any, ...]]:
    q, k, w = torch.ones(2, 4, 6), torch.ones(2, 2, 6), torch.ones(3, 6)
    table = RotaryTable(torch.ones(2, 3), torch.ones(2, 3))
    return {
        "q has shape \\(3, 4, 6\\), expected \\(2, \\*, \\*\\)": (torch.ones(3, 4, 6), k, k),
        "k has shape \\(2, 2, 8\\), expected \\(2, \\*, 6\\)": (q, torch.ones(2, 2, 8), k),
        "v has shape \\(2, 1, 6\\), expected \\(2, 2, 6\\)": (q, k, k[:, :1]),
        "q has heads of width 5, expected an even one": (q[..., 1:], k[..., 1:], k[..., 1:]),
        "q has 3 heads and k 2, expected a multiple": (q[:, 1:], k, k),
        "q is int64, expected float64": (q.long(), k.long(), k.long()),
        "v is float64, expected float32": (q, k, k.double()),
        "table.cos has shape \\(2, 3\\), expected \\(2, 2\\)": (
            q[..., 2:],
            k[..., 2:],
            k[..., 2:],
            table,
        ),
        "table.sin has shape \\(1, 3\\)": (q, k, k, RotaryTable(table.cos, table.sin[1:])),
        "q_weights has 5 channels, expected 6 \\(a head\\) or 24 \\(a row\\)": (
            q,
            k,
            k,
            table,
            w[:, 1:],
        ),
        "k_weights has 24 channels, expected 6 \\(a head\\) or 12 \\(a row\\)": (
            q,
            k,
            k,
            table,
            w,
            torch.ones(3, 24),
        ),
        "q_weights has shape \\(2, 6\\), expected \\(3, 6\\)": (q, k, k, table, w[1:]),
        "q_weights has 1 tensors but the routing 3": (q, k, k, table, [w[0]]),
        "k_weights is int64, expected float64": (q, k, k, table, w, w.long()),
        "k is on meta and routing on cpu": (q, k.to("meta"), k),
        "table is on meta": (q, k, k, RotaryTable(table.cos.to("meta"), table.sin.to("meta"))),
    }


@pytest.mark.parametrize("message", heads_errors())
def test_heads_errors_name_what_is_wrong(message: str) -> None:
    q, k, v, *rest = heads_errors()[message]
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_unpermute(q, k, v, route([0, 2]), *rest)


@pytest.mark.parametrize(
    ("message", "x", "weights"),
    [
        ("x has shape \\(3, 4\\), expected \\(2, \\*\\)", torch.ones(3, 4), torch.ones(3, 4)),
        ("x is int64, expected float64", torch.ones(2, 4).long(), torch.ones(3, 4)),
        ("weights has shape \\(3, 5\\), expected \\(3, 4\\)", torch.ones(2, 4), torch.ones(3, 5)),
        ("weights has 2 tensors", torch.ones(2, 4), [torch.ones(4)] * 2),
        ("weights\\[0\\] has shape \\(5,\\)", torch.ones(2, 4), [torch.ones(5)] * 3),
        ("weights is int64, expected", torch.ones(2, 4), torch.ones(3, 4).long()),
        ("weights is on meta", torch.ones(2, 4), torch.ones(3, 4, device="meta")),
    ],
)
def test_norm_errors_name_what_is_wrong(message: str, x: Tensor, weights: Any) -> None:
    with pytest.raises(ValueError, match=message):
        routed_rms_norm(x, weights, route([0, 2]), EPS)


@pytest.mark.parametrize("face", ALL_FACES)
def test_opcheck(face: str) -> None:
    case = Case([0, 2, 0], "mixed", (2, 1, 4), torch.float32)
    with on_face(face) as device:
        routing = route(case.ids, device)
        q, k, v, q_w, k_w = (
            value.to(device).requires_grad_() for value in (*case.heads, *case.weights)
        )
        cos, sin = case.table.cos.to(device), case.table.sin.to(device)
        indices = (routing.order, routing.inverse, routing.offsets)
        for weights, table in (((q_w, k_w), (cos, sin)), ((q_w, None), (None, None))):
            torch.library.opcheck(_turn_op, (q, k, v, *weights, *table, *indices, EPS))
        out = _turn_op(q, k, v, q_w, k_w, cos, sin, *indices, EPS)
        grads = [torch.randn_like(value) for value in out[:3]]
        saved = (q, k, q_w, k_w, cos, sin, routing.order, routing.offsets, *out[3:])
        saved = tuple(value.detach() for value in saved)
        torch.library.opcheck(_turn_backward_op, (*grads, *saved))
        nothing = torch.empty(0, device=device)
        bare = (*[None] * 6, routing.order, routing.offsets, nothing, nothing)
        torch.library.opcheck(_turn_backward_op, (*grads, *bare))
        x, w = q.detach().flatten(1).requires_grad_(), torch.rand(3, 8, device=device)
        torch.library.opcheck(_routed_rms_norm_op, (x, w.requires_grad_(), routing.offsets, EPS))
        y, scale = _routed_rms_norm_op(x, w, routing.offsets, EPS)
        saved = (x.detach(), w.detach(), routing.offsets, scale.detach())
        torch.library.opcheck(_routed_rms_norm_backward_op, (torch.ones_like(y), *saved))


@pytest.mark.parametrize("face", ALL_FACES)
def test_compiled_and_checkpointed_are_the_same(face: str) -> None:
    case = Case([0, 2, 0, 1], "mixed", (2, 1, 4), torch.float32)
    with on_face(face) as device:
        routing = route(case.ids, device)
        table = RotaryTable(case.table.cos.to(device), case.table.sin.to(device))
        norm = torch.rand(3, 8, device=device)

        def block(q: Tensor, k: Tensor, v: Tensor, q_w: Tensor, k_w: Tensor, w: Tensor) -> Tensor:
            q, k, v = qk_norm_rope_unpermute(q, k, v, routing, table, q_w, k_w, EPS)
            mixed = (q * k + v).flatten(1)
            return routing.restore(routed_rms_norm(routing.permute(mixed), w, routing, EPS))

        inputs = [value.to(device) for value in (*case.heads, *case.weights, norm)]
        seeds = [torch.randn(4, 8)]
        plain = gradients(block, inputs, seeds)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for run in (compiled, lambda *x: checkpoint(block, *x, use_reentrant=False)):
            again = gradients(run, inputs, seeds)
            for one, other in zip(itertools.chain(*plain), itertools.chain(*again), strict=True):
                assert torch.equal(one, other)


def test_the_face_is_chosen_when_a_compiled_block_runs() -> None:
    routing, x, w = route([0, 1]), torch.randn(2, 4), torch.rand(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: routed_rms_norm(x, w, routing, EPS), fullgraph=True, backend="aot_eager"
    )
    compiled(x, w)
    with pytest.raises(ValueError, match="unknown kernels"), use_kernels("nonsense"):
        pass
    seen: list[Tensor] = []
    original = norm_module.routed_rms_norm_reference
    try:
        norm_module.routed_rms_norm_reference = lambda *a: seen.append(a[0]) or original(*a)
        with use_kernels("reference"):
            compiled(x, w)
    finally:
        norm_module.routed_rms_norm_reference = original
    assert len(seen) == 1
