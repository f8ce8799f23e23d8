"""Row-sparse Adam against torch.optim.SparseAdam, and that a withheld update leaves every bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from weft.trainer.optimization.row_sparse_adam import row_sparse_adam_

ROWS, WIDTH = 50, 8
SETTINGS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6}


def bits(*tensors: Tensor) -> list[bytes]:
    return [t.numpy().tobytes() for t in tensors]


def make_step(step: int) -> tuple[Tensor, Tensor]:
    """Other rows each time, some of them again, one step with all and one with none."""
    generator = torch.Generator().manual_seed(step)
    count = {3: ROWS, 5: 0}.get(step, 1 + 7 * step % 20)
    rows = torch.randperm(ROWS, generator=generator)[:count]
    return rows, torch.randn(count, WIDTH, generator=generator) * 10.0 ** (step % 3 - 1)


def update(state: list[Tensor], step: int, rows: Tensor, gradient: Tensor, keep: float) -> None:
    row_sparse_adam_(
        *state,
        rows,
        gradient,
        step=torch.tensor(float(step)),
        keep=torch.tensor(keep),
        **SETTINGS,
    )


def new_state() -> list[Tensor]:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(99))
    return [weight, torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)]


def test_ten_steps_equal_torchs_sparse_adam() -> None:
    ours = new_state()
    theirs = torch.nn.Parameter(ours[0].clone())
    optimizer = torch.optim.SparseAdam([theirs], **SETTINGS)
    for step in range(1, 11):
        rows, gradient = make_step(step)
        before = [t.clone() for t in ours]
        update(ours, step, rows, gradient, keep=1.0)
        theirs.grad = torch.sparse_coo_tensor(
            rows[None], gradient, theirs.shape, check_invariants=True
        )
        optimizer.step()
        state = optimizer.state[theirs]
        for mine, expected in zip(
            ours, (theirs.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True
        ):
            torch.testing.assert_close(mine, expected, rtol=2e-6, atol=1e-7)
        others = [r for r in range(ROWS) if r not in rows.tolist()]
        for now, then in zip(ours, before, strict=True):
            assert torch.equal(now[others], then[others])
        assert len(rows) == 0 or not torch.equal(ours[0][rows], before[0][rows])


def test_the_first_step_of_a_row_moves_it_by_the_rate() -> None:
    """Adam, equation by hand: m/(1-b1) over sqrt(v/(1-b2)) is the gradient's sign."""
    state = new_state()
    before = state[0].clone()
    gradient = torch.tensor([[5.0, -5.0] * 4])
    update(state, 1, torch.tensor([7]), gradient, keep=1.0)
    expected = before[7] - SETTINGS["lr"] * gradient[0].sign()
    torch.testing.assert_close(state[0][7], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), -float("inf")])
def test_a_withheld_update_leaves_every_bit(value: float) -> None:
    state = new_state()
    for step in range(1, 4):
        update(state, step, *make_step(step), keep=1.0)
    # A product with zero or an addition of zero would lose this sign.
    state[0][4, 0] = state[1][4, 0] = -0.0
    before = bits(*state)
    rows = torch.tensor([1, 4, 20])
    update(state, 4, rows, torch.full((3, WIDTH), value), keep=0.0)
    assert bits(*state) == before
    update(state, 4, rows, torch.full((3, WIDTH), 0.5), keep=1.0)
    assert all(now != then for now, then in zip(bits(*state), before, strict=True))
    assert all(t.isfinite().all() for t in state)
