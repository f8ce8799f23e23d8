"""Routings of one modality, which move nothing, and rows restored with a bias of their modality in fp32."""

from __future__ import annotations

import pytest
import torch
from weft.kernels.modality_routing import (
    restore_with_bias,
    route_by_modality,
    route_one_modality,
)
from weft.kernels.modality_routing.restore_bias import _restore_op

LAYOUTS = [[0, 1, 1, 0, 2, 1], [0, 1, 0, 1], [2, 2], [1], []]


@pytest.mark.parametrize("modality", [0, 1, 2])
def test_one_modality_is_the_sorted_routing_without_a_sort(modality: int) -> None:
    found = route_one_modality(4, 3, modality)
    expected = route_by_modality(torch.full((4,), modality), 3)
    for name in ("order", "inverse", "offsets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.sizes == expected.sizes
    assert found.is_identity
    assert expected.is_identity
    with pytest.raises(ValueError, match="modality is 3, expected an id from 0 to 2"):
        route_one_modality(4, 3, 3)


def test_an_identity_gives_what_it_got_and_others_do_not() -> None:
    x = torch.randn(4, 3)
    routing = route_by_modality(torch.ones(4, dtype=torch.uint8), 2)
    assert routing.permute(x) is x
    assert routing.restore(x) is x
    with pytest.raises(ValueError, match="the routing has 4 rows"):
        routing.permute(x[:2])
    assert not route_by_modality(torch.tensor([0, 1]), 2).is_identity
    assert route_by_modality(torch.empty(0, dtype=torch.uint8), 2).is_identity


@pytest.mark.parametrize("ids", LAYOUTS)
@pytest.mark.parametrize("is_stacked", [True, False])
def test_restored_rows_have_the_bias_of_their_modality(ids: list[int], is_stacked: bool) -> None:
    routing = route_by_modality(torch.tensor(ids, dtype=torch.uint8), 3)
    x = torch.randn(len(ids), 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    expected = x + bias[torch.tensor(ids, dtype=torch.int64)]

    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        given = bias if is_stacked else list(bias.unbind(0))
        return restore_with_bias(routing.permute(x), given, routing)

    assert torch.equal(run(x, bias), expected)
    seed = torch.randn_like(expected)
    found = torch.autograd.grad(run(x, bias), (x, bias), seed)
    for mine, theirs in zip(found, torch.autograd.grad(expected, (x, bias), seed), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_sum_is_wider_than_the_rows_and_nan_stays_in_its_modality() -> None:
    routing = route_by_modality(torch.tensor([1, 0]), 2)
    x = torch.tensor([[0.001], [0.001]], dtype=torch.bfloat16, requires_grad=True)
    bias = torch.tensor([[-6.9], [2.0]], requires_grad=True)
    out = restore_with_bias(x, bias, routing)
    assert out.dtype == torch.float32
    assert abs(out[1].item() + 6.899) < 1e-5
    out.backward(torch.tensor([[float("nan")], [3.0]]))
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)
    assert bias.grad[0].item() == 3.0
    assert bias.grad[1].isnan().all()


def test_opcheck() -> None:
    routing = route_by_modality(torch.tensor([1, 0, 1]), 2)
    x, bias = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    places = (routing.order, routing.inverse, routing.offsets, list(routing.sizes))
    torch.library.opcheck(_restore_op, (x, bias, *places))
