"""The causal convolution as shifted multiply-adds over whole rows, for the CPU.

Document borders are rare: everything is computed as if there were none, and the few tokens whose taps
cross a border are computed again by selection and written over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from ..faces import wide_dtype
from .reference import silu_slope

__all__ = ["conv_backward", "conv_forward"]


class _Rows:
    """Inputs with the state in front, (B, N, D), and how far back each of them may look.

    `reach` (B, N) is the number of tokens before each that belong to its document, at most W - 1; None where
    there are no borders.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        dtype = wide_dtype(x)
        self.width = weight.shape[1]
        self.taps = weight.to(dtype).T.contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.before = 0 if state is None else self.width - 1
        wide = x.to(dtype).contiguous()
        self.x = wide if state is None else torch.cat([state.to(dtype), wide], dim=1)
        self.reach: Tensor | None = None
        if positions is not None:
            continues = pad(positions != 0, (self.before, 0), value=True)
            if state is None:
                continues[:, :1] = False
            self.reach = _reach(continues, self.width - 1)

    def pre_activation(self) -> Tensor:
        out = self.x * self.taps[-1]
        for back in range(1, min(self.width, out.shape[1])):
            out[:, back:].addcmul_(self.x[:, :-back], self.taps[-1 - back])
        if self.reach is not None:
            reach = self.reach.flatten()
            places = (reach < self.width - 1).nonzero()[:, 0]
            self._correct(out, self.x, places, lambda b: (places - b, reach[places] >= b))
        return out if self.bias is None else out.add_(self.bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        out = grad * self.taps[-1]
        for back in range(1, min(self.width, out.shape[1])):
            out[:, :-back].addcmul_(grad[:, back:], self.taps[-1 - back])
        if self.reach is not None:
            length, reach = out.shape[1], self.reach.flatten()
            is_wrong = torch.zeros_like(self.reach, dtype=torch.bool)
            for back in range(1, min(self.width, length)):
                is_wrong[:, :-back] |= self.reach[:, back:] < back
            places = is_wrong.flatten().nonzero()[:, 0]

            def later(back: int) -> tuple[Tensor, Tensor]:
                at = (places + back).clamp(max=len(reach) - 1)
                return at, (places % length + back < length) & (reach[at] >= back)

            self._correct(out, grad, places, later)
        return out

    def weight_grad(self, grad: Tensor) -> Tensor:
        """(D, W). Products of two documents are written over: one of them may hold a NaN."""
        out = grad.new_zeros(grad.shape[2], self.width)
        for back in range(min(self.width, grad.shape[1])):
            first = max(back, self.before)
            product = grad[:, first:] * self.x[:, first - back : grad.shape[1] - back]
            if self.reach is not None and back:
                product[self.reach[:, first:] < back] = 0
            out[:, -1 - back] = product.sum((0, 1))
        return out

    def _correct(
        self,
        out: Tensor,
        source: Tensor,
        places: Tensor,
        look: Callable[[int], tuple[Tensor, Tensor]],
    ) -> None:
        """Rewrite the rows `places` of `out` from those rows of `source` that `look(back)` finds inside."""
        rows = source.view(-1, source.shape[2])
        exact = rows[places] * self.taps[-1]
        for back in range(1, self.width):
            at, is_inside = look(back)
            seen = torch.where(is_inside[:, None], rows[at.clamp(min=0)], 0)
            exact.addcmul_(seen, self.taps[-1 - back])
        out.view(-1, out.shape[2])[places] = exact


def _reach(continues: Tensor, most: int) -> Tensor:
    reach = torch.zeros_like(continues, dtype=torch.int8)
    still = continues.clone()
    for back in range(1, most + 1):
        reach += still
        still &= pad(continues, (back, 0), value=True)[:, : continues.shape[1]]
    return reach


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> Tensor:
    """As in `reference.py`."""
    rows = _Rows(x, weight, bias, state, positions)
    out = rows.pre_activation()[:, rows.before :]
    return (silu(out, inplace=True) if has_silu else out).to(x.dtype)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `reference.py`."""
    rows = _Rows(x, weight, bias, state, positions)
    grad = grad.to(rows.x.dtype)
    if has_silu:
        grad = grad * silu_slope(rows.pre_activation()[:, rows.before :])
    grad = pad(grad, (0, 0, rows.before, 0))
    padded_grad = rows.input_grad(grad)
    if state is None:
        padded_grad = pad(padded_grad, (0, 0, rows.width - 1, 0))
    return padded_grad, rows.weight_grad(grad), grad.sum((0, 1))
