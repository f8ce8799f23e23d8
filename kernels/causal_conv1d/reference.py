"""The definition of the causal convolution, differentiated by autograd, and its gradient written out.

B rows of L tokens, D channels, W taps. Tap `back` is the input `back` tokens before: weight[:, W - 1 - back].
A document starts where `positions` (B, L) is 0. Taps outside the document are selected away, not multiplied by
zero: a NaN on one side of a border never crosses it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from ..faces import wide_dtype

__all__ = [
    "causal_conv1d_reference",
    "conv_backward",
    "conv_forward",
    "document_numbers",
    "keep_last_document",
    "last_inputs",
    "silu_slope",
]


def document_numbers(positions: Tensor, before: int) -> Tensor:
    """(B, before + L): how many documents have started up to each token; 0 for those before the row."""
    return pad((positions == 0).cumsum(1), (before, 0))


def _padded(x: Tensor, state: Tensor | None, width: int) -> Tensor:
    """The inputs with the W - 1 before the row in front, in the type of the accumulators."""
    rows, _, channels = x.shape
    before = x.new_zeros(rows, width - 1, channels) if state is None else state
    return torch.cat([before.to(wide_dtype(x)), x.to(wide_dtype(x))], dim=1)


def _tap(padded: Tensor, documents: Tensor | None, back: int, before: int) -> Tensor:
    """(B, L, D): the input `back` tokens before each, 0 where that is another document's."""
    length = padded.shape[1] - before
    seen = padded[:, before - back : before - back + length]
    if documents is None:
        return seen
    is_same = documents[:, before:] == documents[:, before - back : before - back + length]
    return torch.where(is_same[..., None], seen, 0)


def _pre_activation(
    padded: Tensor, documents: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    width = weight.shape[1]
    wide = weight.to(padded.dtype)
    out = wide[:, width - 1] * _tap(padded, documents, 0, width - 1)
    for back in range(1, width):
        out = out + wide[:, width - 1 - back] * _tap(padded, documents, back, width - 1)
    return out if bias is None else out + bias.to(padded.dtype)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> Tensor:
    """(B, L, D) of the public function; also its definition for autograd."""
    before = weight.shape[1] - 1
    documents = None if positions is None else document_numbers(positions, before)
    out = _pre_activation(_padded(x, state, before + 1), documents, weight, bias)
    return (silu(out) if has_silu else out).to(x.dtype)


def silu_slope(pre: Tensor) -> Tensor:
    """silu'(z) = s (1 + z (1 - s)) with s = sigmoid(z)."""
    gate = pre.sigmoid()
    return gate * (1 + pre * (1 - gate))


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the state before it, (B, W - 1 + L, D), of weight (D, W) and of bias (D,)."""
    width = weight.shape[1]
    before, length = width - 1, x.shape[1]
    documents = None if positions is None else document_numbers(positions, before)
    padded = _padded(x, state, width)
    wide = weight.to(padded.dtype)
    grad = grad.to(padded.dtype)
    if has_silu:
        grad = grad * silu_slope(_pre_activation(padded, documents, weight, bias))
    padded_grad, weight_grad = torch.zeros_like(padded), torch.zeros_like(wide)
    for back in range(width):
        place = slice(before - back, before - back + length)
        given = grad
        if documents is not None:
            given = torch.where((documents[:, before:] == documents[:, place])[..., None], grad, 0)
        padded_grad[:, place] += wide[:, before - back] * given
        taps = _tap(padded, documents, back, before)
        weight_grad[:, before - back] = (grad * taps).sum((0, 1))
    return padded_grad, weight_grad, grad.sum((0, 1))


def last_inputs(x: Tensor, state: Tensor | None, positions: Tensor | None, before: int) -> Tensor:
    """(B, W - 1, D): the final state of the public function."""
    tail = x[:, max(0, x.shape[1] - before) :]
    missing = before - tail.shape[1]
    if missing:
        rows, _, channels = x.shape
        zeros = x.new_zeros(rows, missing, channels)
        front = zeros if state is None else state[:, before - missing :].to(x.dtype)
        tail = torch.cat([front, tail], dim=1)
    if positions is None:
        return tail.clone(memory_format=torch.contiguous_format)
    return keep_last_document(tail, positions)


def keep_last_document(tail: Tensor, positions: Tensor) -> Tensor:
    """`tail` (B, W - 1, D), of the last tokens of each row, with 0 for tokens of earlier documents."""
    before = tail.shape[1]
    last = positions[:, max(0, positions.shape[1] - before) :]
    numbers = document_numbers(last, before - last.shape[1])
    return torch.where((numbers == numbers[:, -1:])[..., None], tail, 0)


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    position_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of `causal_conv1d`, differentiated by autograd."""
    before = weight.shape[1] - 1
    positions = None if position_ids is None else position_ids.view(x.shape[:2])
    out = conv_forward(x, weight, bias, initial_state, positions, activation == "silu")
    return out, last_inputs(x, initial_state, positions, before)
