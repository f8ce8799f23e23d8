"""Statistics gathered in parts, hooks that leave no mark, and who is to blame for a number that is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weft.kernels.faces import wanted_face
from weft.models.batch import IGNORED, PackedBatch
from weft.models.task import LossOutput, LossTerm
from weft.trainer.replay.kernels import compare_kernels
from weft.trainer.replay.samples import sample_losses
from weft.trainer.replay.statistics import StatisticsVisitor, TensorStatistics, visit_modules


def test_parts_add_up_to_the_whole() -> None:
    values = torch.randn(1000) * 3 + 100
    values[::7] = 0
    values[5], values[500] = torch.nan, -torch.inf
    found = TensorStatistics()
    for part in values.split([1, 300, 699]):
        found.add(part.view(1, -1))
    finite = values[torch.isfinite(values)].double()
    assert (found.count, found.non_finite, found.zeros) == (1000, 2, int((finite == 0).sum()))
    assert found.mean == pytest.approx(float(finite.mean()), rel=1e-6)
    assert found.std == pytest.approx(float(finite.std(correction=0)), rel=1e-5)
    assert found.abs_max == float(finite.abs().max())


def test_statistics_of_nothing_and_of_nothing_finite() -> None:
    found = TensorStatistics()
    found.add(torch.zeros(0))
    assert (found.count, found.std, found.zero_fraction) == (0, 0.0, 0.0)
    found.add(torch.full((3,), torch.nan))
    assert (found.non_finite, found.abs_max) == (3, 0.0)


def test_a_sparse_gradient_counts_the_rows_it_has() -> None:
    found = TensorStatistics()
    found.add(torch.sparse_coo_tensor([[1, 1, 4]], torch.ones(3, 2), (9, 2)))
    assert (found.count, found.abs_max) == (4, 2.0)


class Broken(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


class BreaksBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Broken.apply(x)


class BreaksForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 0


def visit(network: nn.Module, **options: Any) -> StatisticsVisitor:
    visitor = StatisticsVisitor(**options)
    with visit_modules({"net": network}, visitor):
        network(torch.randn(3, 4)).sum().backward()
    return visitor


def test_the_module_that_breaks_the_gradient_is_named() -> None:
    network = nn.Sequential(nn.Linear(4, 4), BreaksBackward(), nn.Linear(4, 4))
    stops: list[str] = []
    visitor = visit(network, on_failure=lambda module, *_: stops.append(type(module).__name__))
    assert visitor.first is not None
    assert (visitor.first.where, visitor.first.module) == ("backward", "net.1")
    assert visitor.first_bad_gradient == "net.0"
    assert visitor.modules["net.2"].gradient.non_finite == 0
    assert stops == ["BreaksBackward"]


def test_a_computation_between_modules_is_their_parents() -> None:
    visitor = visit(nn.Sequential(nn.Linear(4, 4), BreaksForward(), nn.ReLU()))
    assert visitor.first is not None
    assert (visitor.first.module, visitor.first.own) == ("net.1", True)
    assert visitor.first.parameters == ()


def test_what_was_bad_before_the_network_blames_nobody() -> None:
    visitor = StatisticsVisitor()
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with visit_modules({"net": network}, visitor):
        network(torch.full((3, 4), torch.nan))
    assert visitor.first is None


def test_an_exception_says_in_which_module() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(RuntimeError) as caught:
        visit(network)
    assert caught.value.__notes__ == ["in module net.1"]
    assert not network[0]._forward_hooks
    assert not network[0]._backward_hooks


def test_a_break_is_where_it_was_asked_for() -> None:
    seen: list[Any] = []
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    visit(network, break_at="net.1", on_break=lambda *values: seen.append(values))
    ((module, inputs, output),) = seen
    assert module is network[1]
    assert inputs[0][0].shape == (3, 2)
    assert output.shape == (3, 1)


def test_a_recomputed_forward_is_counted_once() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    visitor = visit(nn.Sequential(nn.Linear(4, 4), Recomputed()))
    assert visitor.modules["net.1.inner"].output.count == 12
    assert visitor.modules["net.1.inner"].gradient.count == 12


def test_hooks_change_no_value() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    network(x).square().sum().backward()
    expected = [p.grad for p in network.parameters()]
    network.zero_grad(set_to_none=True)
    with visit_modules({"net": network}, StatisticsVisitor()):
        network(x).square().sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_a_wrong_kernel_is_found_where_it_is_first_used() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if wanted_face() == "reference" else x * 1.5

    network = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    face, found = compare_kernels(
        {"net": network}, lambda: network(x).sum().backward(), torch.device("cpu")
    )
    assert face == "cpu"
    output = {d.name: d.output for d in found}
    assert output["net.0"] == 0
    assert output["net.1"] == pytest.approx(0.5)
    assert {d.name: d.gradient for d in found}["net.0"] == pytest.approx(0.5)
    assert network[0].weight.grad is None


def test_a_batch_with_side_tensors_is_run_whole_for_each_row() -> None:
    targets = torch.tensor([1, 2, IGNORED, 4, IGNORED, IGNORED])
    batch = PackedBatch(
        tokens=torch.arange(6),
        targets=targets,
        position_ids=torch.tensor([0, 1, 0, 1, 0, 1]),
        cu_seqlens=torch.tensor([0, 2, 4, 6], dtype=torch.int32),
        max_seqlen=2,
        row_length=2,
        sample_ids=(7, 8, 9),
        source_ids=(0, 1, 0),
        target_count=3,
    )

    def evaluate(part: PackedBatch) -> LossOutput:
        sizes.append(len(part.tokens))
        counted = part.targets[part.targets != IGNORED]
        return LossOutput({"loss": LossTerm(counted.sum(), "tokens")})

    sizes: list[int] = []
    plain = sample_losses([batch], evaluate, seed=0)
    assert sizes == [2, 2, 2]
    with_side = dataclasses.replace(batch, side={"latents": torch.zeros(5)})
    assert sample_losses([with_side], evaluate, seed=0) == plain
    assert sizes[3:] == [6, 6, 6]
    assert [(s.sample, s.loss, s.targets) for s in plain] == [
        (8, 4.0, 1),
        (7, 1.5, 2),
        (9, None, 0),
    ]
