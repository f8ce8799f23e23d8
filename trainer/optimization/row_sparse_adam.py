"""Adam for tables whose gradient touches few rows: only those rows, and their moments, are read and written.

Moments of untouched rows stay as they are (as in torch.optim.SparseAdam), so the cost of a step is that of
the rows seen, not of the table. No decay: it would touch every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_sparse_adam_"]


def row_sparse_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    gradient: Tensor,
    *,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    keep: Tensor,
) -> None:
    """Update in place.

    Args:
        weight, exp_avg, exp_avg_sq: (N, D).
        rows: (k,) int64, distinct.
        gradient: (k, D), already clipped.
        step: () number of this update, from 1, on the device.
        keep: () 1 to update, 0 to leave everything to the bit as it is.
    """
    beta1, beta2 = betas
    old_avg, old_sq = exp_avg[rows], exp_avg_sq[rows]
    new_avg = torch.lerp(old_avg, gradient, 1 - beta1)
    new_sq = (old_sq * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # The correction of the second moment is outside the root's epsilon, as torch.optim.SparseAdam has it.
    update = new_avg / (new_sq.sqrt() + eps) * (lr * correction2.sqrt() / correction1)
    # `where`, not a product with zero: a gradient that is not finite must leave no trace.
    is_kept = keep > 0
    exp_avg[rows] = torch.where(is_kept, new_avg, old_avg)
    exp_avg_sq[rows] = torch.where(is_kept, new_sq, old_sq)
    current = weight[rows]
    weight[rows] = torch.where(is_kept, current - update, current)
