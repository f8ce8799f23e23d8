"""Routing by modality against numpy, and routed linear maps against a loop over rows in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from weft.kernels.modality_routing import (
    Routing,
    route_by_modality,
    routed_linear,
    routed_linear_unsorted,
)
from weft.kernels.modality_routing.linear import _routed_linear_op, _weight_grad_op
from weft.kernels.modality_routing.reference import routed_linear_reference
from weft.kernels.modality_routing.routing import _assert_values, _gather_rows_op

LAYOUTS = {
    "two": [0, 1, 1, 0, 0, 1, 0],
    "last is absent": [0, 1, 0, 1],
    "first is absent": [2, 1, 1, 2, 1],
    "only the middle": [1, 1, 1],
    "one position": [2],
    "no positions": [],
}


@pytest.fixture(autouse=True)
def _nothing_by_luck() -> Iterator[None]:
    """What an op does not write is NaN (the largest integer), instead of what lay there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def route(ids: list[int], n_modalities: int = 3) -> Routing:
    return route_by_modality(torch.tensor(ids, dtype=torch.uint8), n_modalities)


def loop(x: Tensor, ids: list[int], weights: list[Tensor], bias: list[Tensor] | None) -> Tensor:
    """Each row of x, in the order of positions, by its own modality's weights."""
    rows = [
        weights[m] @ row + (0 if bias is None else bias[m]) for row, m in zip(x, ids, strict=True)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, weights[0].shape[0])


def parameters(n: int = 3, outputs: int = 4, channels: int = 5) -> tuple[list[Tensor], ...]:
    def make(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(n)]

    return make(outputs, channels), make(outputs)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 4), max_size=40))
def test_routing_is_numpys_stable_sort(ids: list[int]) -> None:
    routing = route(ids, 5)
    order = np.argsort(np.array(ids, dtype=np.int64), kind="stable")
    assert routing.order.tolist() == order.tolist()
    assert routing.inverse[routing.order].tolist() == list(range(len(ids)))
    assert routing.sizes == tuple(ids.count(m) for m in range(5))
    assert routing.offsets.tolist() == np.cumsum(routing.sizes).tolist()
    assert (routing.offsets.dtype, routing.total, routing.n_modalities) == (
        torch.int32,
        len(ids),
        5,
    )
    x = torch.randn(len(ids), 2, 3)
    assert torch.equal(routing.permute(x), x[torch.from_numpy(order)])
    assert torch.equal(routing.restore(routing.permute(x)), x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_and_given_sizes(dtype: torch.dtype) -> None:
    routing = route_by_modality(torch.tensor([1, 0, 1], dtype=dtype), 2, sizes=[1, 2])
    assert routing.order.tolist() == [1, 0, 2]
    assert routing.sizes == (1, 2)


def test_more_modalities_than_a_small_type_counts() -> None:
    ids = torch.tensor([127, 0, 127], dtype=torch.int8)
    assert route_by_modality(ids, 300).sizes[127] == 2


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2), (6, 0)])
def test_gradient_of_a_permutation_is_the_inverse_one(shape: tuple[int, ...]) -> None:
    routing = route([1, 0, 2, 1, 0, 0])
    x = torch.randn(shape, requires_grad=True)
    seed = torch.randn(shape)
    (permuted,) = torch.autograd.grad(routing.permute(x), x, seed)
    assert torch.equal(permuted, seed[routing.inverse])
    (restored,) = torch.autograd.grad(routing.restore(x), x, seed)
    assert torch.equal(restored, seed[routing.order])


def test_permutation_twice_differentiable_and_of_strange_inputs() -> None:
    routing = route([1, 0, 2, 1])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(routing.permute, x)
    torch.autograd.gradgradcheck(lambda a: routing.restore(a) ** 2, x)
    expanded = torch.randn(1, 3).expand(4, 3)
    strided = torch.randn(3, 4).t()
    for tensor in (expanded, strided, torch.arange(4)):
        assert torch.equal(routing.permute(tensor), tensor[routing.order])
    # The gradient of a sum has strides of 0.
    routing.permute(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 3, dtype=torch.float64))


def test_a_routing_moves_and_does_not_change() -> None:
    routing = route([1, 0])
    moved = routing.to("meta")
    assert (moved.order.device.type, moved.sizes) == ("meta", routing.sizes)
    with pytest.raises(AttributeError, match="a Routing does not change, so sizes cannot be set"):
        routing.sizes = (0, 2)


ROUTING_ERRORS = {
    "modality is float32 of shape": (lambda: route_by_modality(torch.zeros(2), 1)),
    "of shape \\(1, 2\\), expected integers of shape \\(T,\\)": (
        lambda: route_by_modality(torch.zeros(1, 2, dtype=torch.uint8), 1)
    ),
    "n_modalities is 0, expected at least 1": lambda: route([], 0),
    "sizes is \\[1\\], expected 2 integers": (
        lambda: route_by_modality(torch.tensor([0]), 2, sizes=[1])
    ),
    "sizes is \\[2, -1\\], expected 2 integers that are not negative": (
        lambda: route_by_modality(torch.tensor([0]), 2, sizes=[2, -1])
    ),
    "sizes add up to 3 but modality has 2": (
        lambda: route_by_modality(torch.tensor([0, 1]), 2, sizes=[1, 2])
    ),
    "sizes is \\[2, 0\\] but modality holds \\[1, 1\\]": (
        lambda: route_by_modality(torch.tensor([0, 1]), 2, sizes=[2, 0])
    ),
    "modality holds 3, expected ids from 0 to 2: a modality without weights": (
        lambda: route([0, 3])
    ),
    "modality holds -1, expected ids from 0 to 1": (
        lambda: route_by_modality(torch.tensor([0, -1]), 2)
    ),
    "sizes are missing and modality is on meta": (
        lambda: route_by_modality(torch.tensor([0], device="meta"), 2)
    ),
    "x has shape \\(2, 1\\) but the routing has 1 rows": lambda: route([0]).permute(
        torch.ones(2, 1)
    ),
    "x has shape \\(\\) but the routing has 1 rows": lambda: route([0]).restore(torch.tensor(1)),
    "x is on meta and routing on cpu": lambda: route([0]).permute(torch.ones(1, device="meta")),
}


@pytest.mark.parametrize("message", ROUTING_ERRORS)
def test_routing_errors_name_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTING_ERRORS[message]()


@pytest.mark.parametrize(("ids", "sizes"), [([0, 1], [2, 0]), ([0, 2], [1, 1]), ([-1, 1], [1, 1])])
def test_a_device_asserts_what_the_host_cannot_see(ids: list[int], sizes: list[int]) -> None:
    sorted_ids = torch.tensor(ids)
    offsets = torch.searchsorted(sorted_ids, torch.arange(2), right=True, out_int32=True)
    with pytest.raises(RuntimeError, match="sizes differ from what modality holds"):
        _assert_values(sorted_ids, offsets, sizes)
    _assert_values(torch.tensor([0, 1]), torch.tensor([1, 2]), [1, 1])


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_linear_is_a_loop_over_rows(name: str, has_bias: bool, is_stacked: bool) -> None:
    ids, (weights, biases) = LAYOUTS[name], parameters()
    x = torch.randn(len(ids), 5, dtype=torch.float64, requires_grad=True)
    given = torch.stack(weights) if is_stacked else weights
    given_bias = (torch.stack(biases) if is_stacked else biases) if has_bias else None
    out = routed_linear_unsorted(x, given, route(ids), given_bias)
    expected = loop(x, ids, weights, biases if has_bias else None)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *weights, *(biases if has_bias else [])]
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, seed)
    for m, grad in enumerate(ours[1:4]):
        assert m in ids or torch.equal(grad, torch.zeros_like(grad))
    if not ids:
        return
    theirs = torch.autograd.grad(expected, inputs, seed, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_linear_gradcheck(is_stacked: bool) -> None:
    routing, (weights, biases) = route([0, 2, 2, 0, 2]), parameters(outputs=2, channels=3)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        w, b = list(parts[:3]), list(parts[3:])
        if is_stacked:
            return routed_linear(x, torch.stack(w), routing, torch.stack(b))
        return routed_linear(x, w, routing, b)

    assert torch.autograd.gradcheck(run, (x, *weights, *biases))


def test_reference_is_the_loop() -> None:
    ids, (weights, biases) = [1, 0, 2, 2, 0], parameters()
    routing, x = route(ids), torch.randn(5, 5, dtype=torch.float64)
    stacked = (torch.stack(weights), routing.offsets, torch.stack(biases))
    out = routing.restore(routed_linear_reference(routing.permute(x), *stacked))
    torch.testing.assert_close(out, loop(x, ids, weights, biases), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thousands_of_rows_in_each_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 3, (3000,), generator=generator)
    routing = route_by_modality(ids, 3)
    exact = [torch.randn(shape, generator=generator) for shape in ((3000, 33), (3, 17, 33))]
    x, weights = (value.to(dtype).requires_grad_() for value in exact)
    seed = torch.randn(3000, 17, generator=generator).to(dtype)
    out = routed_linear(x, weights, routing)
    wide = [value.detach().double().requires_grad_() for value in (x, weights)]
    expected = routed_linear_reference(wide[0], wide[1], routing.offsets)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(out, expected, tolerance)
    ours = torch.autograd.grad(out, (x, weights), seed)
    theirs = torch.autograd.grad(expected, wide, seed.double())
    for name, found, wanted in zip(("x", "weights"), ours, theirs, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, tolerance, name)


def test_equal_weights_are_one_dense_map() -> None:
    x, weight, bias = torch.randn(50, 16), torch.randn(8, 16), torch.randn(8)
    ids = torch.randint(0, 3, (50,))
    out = routed_linear_unsorted(x, [weight] * 3, route_by_modality(ids, 3), [bias] * 3)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))
    alone = routed_linear(x, [weight], route_by_modality(torch.zeros(50).int(), 1), [bias])
    assert torch.equal(alone, torch.nn.functional.linear(x, weight, bias))


def test_relabelling_modalities_with_their_weights_changes_nothing() -> None:
    ids, (weights, _) = torch.tensor([0, 2, 1, 1, 2, 0, 2]), parameters()
    x = torch.randn(7, 5, dtype=torch.float64)
    out = routed_linear_unsorted(x, weights, route_by_modality(ids, 3))
    other = routed_linear_unsorted(x, weights[::-1], route_by_modality(2 - ids, 3))
    torch.testing.assert_close(out, other, rtol=1e-12, atol=1e-12)


def test_strided_and_expanded_inputs() -> None:
    routing, (weights, _) = route([0, 1, 1, 2]), parameters()
    wide = torch.randn(4, 12, dtype=torch.float64)
    for x in (wide[:, 2:7], wide[:1, :5].expand(4, 5), wide[:, :10:2], wide.t()[:5, :4].t()):
        out = routed_linear(x, [w.t().contiguous().t() for w in weights], routing)
        expected = routed_linear(x.contiguous(), weights, routing)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        assert out.is_contiguous()


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input() -> None:
    routing, (weights, biases) = route([0, 1, 1, 0]), parameters()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for tensor in (weights[1], biases[0]):
        tensor.requires_grad_(False)
    computed: list[list[int]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.weft.routed_linear_weight_grad.default:
                computed.append(list(args[3]))
            return func(*args, **(kwargs or {}))

    out = routed_linear(x, weights, routing, biases)
    with Watch():
        out.sum().backward()
    assert computed == [[0, 2]]
    assert weights[1].grad is None
    assert biases[0].grad is None
    assert weights[0].grad is not None
    assert torch.equal(weights[2].grad, torch.zeros_like(weights[2]))
    assert torch.equal(biases[1].grad, torch.full((4,), 2.0, dtype=torch.float64))

    def kept(x: Tensor, weights: list[Tensor]) -> list[int]:
        pointers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: pointers.append(t.data_ptr()) or t, lambda t: t
        ):
            routed_linear(x, weights, routing)
        return pointers

    frozen = [weight.detach() for weight in weights]
    assert x.data_ptr() not in kept(x, frozen)
    constant = x.detach()
    assert constant.data_ptr() in kept(constant, weights)
    assert not {weight.data_ptr() for weight in weights} & set(kept(constant, weights))


def test_nan_of_one_modality_stays_there() -> None:
    ids, (weights, biases) = [0, 1, 0, 1, 1], parameters()
    routing = route(ids)
    x = torch.randn(5, 5, dtype=torch.float64)
    x[[1, 3, 4]] = float("nan")
    x.requires_grad_()
    out = routed_linear_unsorted(x, weights, routing, biases)
    assert torch.isfinite(out[[0, 2]]).all()
    assert out[[1, 3, 4]].isnan().all()
    out.backward(out.detach())
    assert torch.isfinite(weights[0].grad).all()
    assert torch.isfinite(biases[0].grad).all()
    assert torch.isfinite(x.grad[[0, 2]]).all()
    assert torch.equal(weights[2].grad, torch.zeros_like(weights[2]))


@pytest.mark.parametrize("ids", [[0, 2, 2, 0, 2, 2, 2], [1], []])
def test_grouped_is_the_same_in_bf16(ids: list[int]) -> None:
    routing, total = route(ids), len(ids)
    x = torch.randn(total, 16).bfloat16().requires_grad_()
    weights = torch.randn(3, 24, 16).bfloat16().requires_grad_()
    seed = torch.randn(total, 24).bfloat16()
    results = []
    for grouped in (False, True):
        out = routed_linear(x, weights, routing, grouped=grouped)
        results.append((out, *torch.autograd.grad(out, (x, weights), seed)))
    for name, plain, other in zip(("out", "x", "weights"), *results, strict=True):
        assert_close(other, plain.double(), 1e-2, name)
    absent = [m for m in range(3) if m not in ids]
    assert torch.equal(results[1][2][absent], torch.zeros(len(absent), 24, 16).bfloat16())


def linear_errors() -> dict[str, tuple]:
    x, w = torch.ones(3, 8), torch.ones(2, 16, 8)
    return {
        "x has shape \\(4, 8\\), expected \\(3, \\*\\)": (torch.ones(4, 8), w),
        "weights has shape \\(3, 16, 8\\), expected \\(2, \\*, 8\\)": (x, torch.ones(3, 16, 8)),
        "weights has 3 tensors but the routing 2 modalities": (x, [w[0]] * 3),
        "weights\\[1\\] has shape \\(16, 7\\), expected \\(\\*, 8\\)": (x, [w[0], w[0, :, 1:]]),
        "weights\\[1\\] has shape \\(15, 8\\), expected \\(16, 8\\)": (x, [w[0], w[0, 1:]]),
        "weights are float64 and x is float32": (x, w.double()),
        "x is int64, expected float64": (x.long(), w),
        "weights is on meta and x on cpu": (x, w.to("meta")),
        "bias is on meta and x on cpu": (x, w, torch.ones(2, 16, device="meta")),
        "bias has shape \\(2, 15\\), expected \\(2, 16\\)": (x, w, torch.ones(2, 15)),
        "bias has 1 tensors but the routing 2 modalities": (x, w, [torch.ones(16)]),
        "grouped takes weights in one tensor": (x, [w[0], w[1]], None, True),
        "and no bias; leave it off": (x, w, torch.ones(2, 16), True),
        "grouped takes bfloat16, not float32; leave it off": (x, w, None, True),
        "grouped takes channels in multiples of 8, not weights of shape \\(2, 15, 8\\)": (
            x.bfloat16(),
            w[:, 1:].bfloat16(),
            None,
            True,
        ),
    }


@pytest.mark.parametrize("message", linear_errors())
def test_linear_errors_name_what_is_wrong(message: str) -> None:
    x, weights, *rest = linear_errors()[message]
    bias, grouped = (*rest, None, False)[:2] if len(rest) < 2 else rest
    with pytest.raises(ValueError, match=message):
        routed_linear(x, weights, route([0, 1, 0], 2), bias, grouped=bool(grouped))


def test_opcheck() -> None:
    routing = route([0, 2, 2, 0])
    x = torch.randn(4, 5, requires_grad=True)
    weights = [torch.randn(3, 5, requires_grad=True) for _ in range(3)]
    bias = [torch.randn(3, requires_grad=True) for _ in range(3)]
    sizes = list(routing.sizes)
    torch.library.opcheck(_gather_rows_op, (x, routing.order, routing.inverse))
    torch.library.opcheck(_routed_linear_op, (x, weights, bias, sizes, routing.offsets, False))
    stacked = [torch.randn(3, 3, 5, requires_grad=True)]
    torch.library.opcheck(_routed_linear_op, (x, stacked, [], sizes, routing.offsets, False))
    grad = torch.randn(4, 3)
    arguments = (grad, x.detach(), sizes, [0, 1], routing.offsets, False)
    torch.library.opcheck(_weight_grad_op, arguments)


def block(x: Tensor, weights: list[Tensor], bias: Tensor, routing: Routing) -> Tensor:
    hidden = routed_linear(routing.permute(x), weights, routing)
    return routing.restore(routed_linear(hidden.tanh(), bias, routing))


def test_compiled_and_checkpointed_are_the_same() -> None:
    weights = [torch.randn(6, 6, requires_grad=True) for _ in range(3)]
    second = torch.randn(3, 2, 6, requires_grad=True)
    routing, x = route([0, 2, 1, 1, 0, 2, 2, 0]), torch.randn(8, 6, requires_grad=True)
    inputs = (x, *weights, second)
    expected = block(x, weights, second, routing)
    plain = torch.autograd.grad(expected.sum(), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    again = checkpoint(block, x, weights, second, routing, use_reentrant=False)
    for found in (compiled(x, weights, second, routing), again):
        assert torch.equal(found, expected)
        for ours, theirs in zip(torch.autograd.grad(found.sum(), inputs), plain, strict=True):
            assert torch.equal(ours, theirs)


def test_other_sizes_compile_nothing_again() -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    weights, second = [torch.randn(6, 6) for _ in range(3)], torch.randn(3, 2, 6)
    counts = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.cat(
            [torch.arange(3), torch.arange(3), torch.randint(0, 3, (14,), generator=generator)]
        )
        routing, x = route_by_modality(ids, 3), torch.randn(20, 6)
        assert torch.equal(
            compiled(x, weights, second, routing), block(x, weights, second, routing)
        )
        counts.append(counter.frame_count)
    # Each size becomes dynamic when it first changes; nothing after that.
    assert counts[-1] <= 4
    assert counts[5:] == [counts[-1]] * 7


def test_autocast_casts_as_linear_does() -> None:
    routing = route_by_modality(torch.zeros(4).int(), 1)
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = routed_linear(x, [weight], routing, [bias])
        expected = torch.nn.functional.linear(x, weight, bias)
        assert routed_linear(x.double(), [weight.double()], routing).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert_close(out, expected.double(), 1e-2)
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_flops_are_counted() -> None:
    routing, (weights, _) = route([0, 2, 2, 0]), parameters()
    weights[2].requires_grad_(False)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        routed_linear(x, weights, routing).sum().backward()
    # Forward, gradient of x, and of the weights of two rows out of four.
    assert counter.get_total_flops() == 2 * 5 * 4 * (4 + 4 + 2)


def test_same_bits_each_time() -> None:
    routing = route_by_modality(torch.randint(0, 2, (300,)), 2)
    x = torch.randn(300, 32, requires_grad=True)
    weights = torch.randn(2, 32, 32, requires_grad=True)
    runs = []
    for _ in range(2):
        out = routed_linear(x, weights, routing)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, weights))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
