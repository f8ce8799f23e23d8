"""The ops inside modules that FSDP2 shards and activation checkpointing runs twice: the same losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weft.kernels import (
    causal_conv1d,
    linear_cross_entropy,
    rms_norm,
    route_by_modality,
    routed_linear,
    routed_rms_norm,
    selective_scan,
)

ROWS, LENGTH, WIDTH, STATE = 2, 24, 12, 4


class Block(nn.Module):
    """One of each op with weights: routed projections and norm, convolution, scan, gated norm."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.3)
        self.norms = nn.Parameter(torch.rand(2, WIDTH) + 0.5)
        self.taps = nn.Parameter(torch.randn(WIDTH, 4) * 0.5)
        self.a_log = nn.Parameter(torch.rand(WIDTH, STATE))
        self.b_proj = nn.Linear(WIDTH, STATE, bias=False)
        self.c_proj = nn.Linear(WIDTH, STATE, bias=False)
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor, modality: Tensor, positions: Tensor) -> Tensor:
        routing = route_by_modality(modality, 2)
        rows = routing.permute(x.flatten(0, 1))
        rows = routed_rms_norm(rows, self.norms, routing, 1e-6)
        u = routing.restore(routed_linear(rows, self.projections, routing)).view_as(x)
        u = causal_conv1d(u, self.taps, None, "silu", position_ids=positions)
        y = selective_scan(
            u,
            u,
            -self.a_log.exp(),
            self.b_proj(u),
            self.c_proj(u),
            delta_softplus=True,
            position_ids=positions,
        )
        return x + rms_norm(y, self.scale, 1e-6, gate=self.gate(x))


class Model(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Parameter(torch.randn(32, WIDTH) * 0.3)
        self.recompute = recompute

    def forward(self, x: Tensor, modality: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, modality, positions, use_reentrant=False)
            else:
                x = block(x, modality, positions)
        return linear_cross_entropy(x.flatten(0, 1), self.head, targets, 16)[0]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    total = ROWS * LENGTH
    return (
        torch.randn(ROWS, LENGTH, WIDTH, generator=generator),
        torch.randint(0, 2, (total,), generator=generator),
        (torch.arange(LENGTH) % 7).expand(ROWS, -1),
        torch.randint(0, 32, (total,), generator=generator),
    )


def losses_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*batch())
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return loss.detach(), found


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", [False, True])
def test_fsdp2_gives_the_same_gradients(recompute: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected_loss, expected = losses_and_gradients(Model())
    model = Model(recompute)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    loss, found = losses_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_recomputation_alone_changes_no_bit() -> None:
    loss, found = losses_and_gradients(Model())
    again, recomputed = losses_and_gradients(Model(recompute=True))
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], recomputed[name]) for name in found)
