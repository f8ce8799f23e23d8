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
    if keep.device.type == "cpu" and not keep:
        # Free to ask here, and it saves choosing row by row below.
        return
    beta1, beta2 = betas
    # Not `weight[rows]`: on the CPU it takes many times as long.
    current, old_avg, old_sq = (t.index_select(0, rows) for t in (weight, exp_avg, exp_avg_sq))
    new_avg = torch.lerp(old_avg, gradient, 1 - beta1)
    new_sq = (old_sq * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # The correction of the second moment is outside the root's epsilon, as torch.optim.SparseAdam has it.
    update = new_avg / new_sq.sqrt().add_(eps)
    updated = current - update.mul_(lr * correction2.sqrt() / correction1)
    if keep.device.type != "cpu":
        # `where`, not a product with zero: a gradient that is not finite must leave no trace.
        is_kept = keep > 0
        new_avg = torch.where(is_kept, new_avg, old_avg)
        new_sq = torch.where(is_kept, new_sq, old_sq)
        updated = torch.where(is_kept, updated, current)
    for whole, part in ((weight, updated), (exp_avg, new_avg), (exp_avg_sq, new_sq)):
        whole.index_copy_(0, rows, part)
