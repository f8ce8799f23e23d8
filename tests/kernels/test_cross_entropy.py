"""Loss sums against torch in float64, with ignored targets, in 16 bits, and by chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from weft.kernels import IGNORED, cross_entropy_sums, linear_cross_entropy


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
