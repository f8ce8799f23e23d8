"""Updates of the plain local tensors a rank holds, whatever sharding they come from.

One code path serves a single process, DDP and FSDP: the optimizer sees local ranges as leaves that share their storage,
so its state is plain ranges too and goes into the checkpoint as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...models.task import ParameterGroup
from .config import OptimizerConfig
from .row_sparse_adam import row_sparse_adam_

__all__ = ["LocalParameter", "Updates"]


@dataclass
class LocalParameter:
    """A parameter as this rank holds it.

    Args:
        name: logical name.
        parameter: the module's parameter, a DTensor where it is sharded.
        local: returns the local tensor of the parameter or of its gradient.
    """

    name: str
    parameter: nn.Parameter
    local: Callable[[Tensor], Tensor]
    leaf: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.leaf = nn.Parameter(self.local(self.parameter.detach()), requires_grad=True)

    def refresh(self) -> None:
        """Point the leaf at the parameter's storage, which sharding may have moved, and at its gradient."""
        self.leaf.data = self.local(self.parameter.detach())
        gradient = self.parameter.grad
        self.leaf.grad = None if gradient is None or gradient.is_sparse else self.local(gradient)


class Updates:
    """The optimizers of one phase.

    Args:
        groups: of this phase.
        locals_by_name: every parameter of the run.
        config: learning rate, decay and so on.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        locals_by_name: Mapping[str, LocalParameter],
        config: OptimizerConfig,
    ) -> None:
        self.config = config
        self.groups = [
            group for group in groups if group.algorithm != "frozen" and group.parameters
        ]
        self.dense = [group for group in self.groups if group.algorithm == "adamw"]
        self.sparse = [group for group in self.groups if group.algorithm == "row_sparse_adam"]
        self.members = {g.name: [locals_by_name[n] for n in g.parameters] for g in self.groups}
        # What is clipped by itself has an optimizer of its own: a fused update has one clip.
        self.clipped_alone = [group for group in self.dense if group.clip_grad_norm is not None]
        together = [group for group in self.dense if group.clip_grad_norm is None]
        self.adamw = {
            name: self._build_adamw(groups)
            for name, groups in [
                ("", together),
                *((group.name, [group]) for group in self.clipped_alone),
            ]
            if groups
        }
        self.sparse_state = {
            item.name: {
                "exp_avg": torch.zeros_like(item.leaf),
                "exp_avg_sq": torch.zeros_like(item.leaf),
            }
            for group in self.sparse
            for item in self.members[group.name]
        }
        first = next(iter(locals_by_name.values())).leaf
        self.sparse_steps = {
            group.name: torch.zeros((), device=first.device) for group in self.sparse
        }

    def _build_adamw(self, dense: Sequence[ParameterGroup]) -> torch.optim.AdamW:
        c = self.config
        groups: list[dict[str, Any]] = [
            {
                "params": [item.leaf for item in self.members[group.name]],
                "weight_decay": c.weight_decay if group.weight_decay else 0.0,
                "lr_scale": group.lr_scale,
                "betas": group.betas or c.betas,
            }
            for group in dense
        ]
        optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)
        # State from the start, so that a checkpoint can be loaded before the first step.
        for group in dense:
            for item in self.members[group.name]:
                optimizer.state[item.leaf] = {
                    "step": torch.zeros((), device=item.leaf.device),
                    "exp_avg": torch.zeros_like(item.leaf),
                    "exp_avg_sq": torch.zeros_like(item.leaf),
                }
        return optimizer

    def refresh(self) -> None:
        for items in self.members.values():
            for item in items:
                item.refresh()

    def dense_gradients(self) -> dict[str, Tensor]:
        """This rank's part of each, by logical name."""
        return {
            item.name: item.leaf.grad
            for group in self.dense
            for item in self.members[group.name]
            if item.leaf.grad is not None
        }

    def apply(
        self,
        lr: float,
        keep: Tensor,
        clips: Mapping[str, Tensor],
        sparse_gradients: Mapping[str, Tensor],
        left_out: Collection[str] = (),
    ) -> None:
        """Update every group.

        Args:
            lr: scheduled rate.
            keep: () 1, or 0 to withhold the update, moments and step counts included.
            clips: () factor on every gradient, by name of the groups that are clipped alone; of all others under "".
            sparse_gradients: coalesced, by logical name.
            left_out: names of groups that stay as they are.
        """
        for group in self.dense:
            if group.name in left_out:
                # To AdamW no gradient is another thing than zeros, which would still decay weights and follow momentum.
                for item in self.members[group.name]:
                    item.leaf.grad = None
        for name, adamw in self.adamw.items():
            for settings in adamw.param_groups:
                settings["lr"] = lr * settings["lr_scale"]
            # The fused kernel divides by the scale and does nothing where inf was found: no host sync.
            adamw.grad_scale = clips[name].reciprocal()  # type: ignore[attr-defined]
            adamw.found_inf = 1.0 - keep  # type: ignore[attr-defined]
            adamw.step()
        for group in self.sparse:
            if group.name in left_out:
                continue
            self.sparse_steps[group.name] += keep
            for item in self.members[group.name]:
                gradient = sparse_gradients.get(item.name)
                if gradient is not None:
                    row_sparse_adam_(
                        item.leaf.data,
                        self.sparse_state[item.name]["exp_avg"],
                        self.sparse_state[item.name]["exp_avg_sq"],
                        gradient.indices()[0],
                        gradient.values() * clips[""],
                        step=self.sparse_steps[group.name].clamp_min(1),
                        lr=lr * group.lr_scale * self.config.sparse_lr_scale,
                        betas=self.config.betas,
                        eps=self.config.eps,
                        keep=keep,
                    )

    def clear_gradients(self) -> None:
        for items in self.members.values():
            for item in items:
                item.parameter.grad = None
                item.leaf.grad = None

    def moments(self, item: LocalParameter) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq` of a parameter; empty where it is frozen."""
        if item.name in self.sparse_state:
            return self.sparse_state[item.name]
        state = self._state_of(item)
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")} if state else {}

    def _state_of(self, item: LocalParameter) -> dict[str, Tensor]:
        for adamw in self.adamw.values():
            if item.leaf in adamw.state:
                return adamw.state[item.leaf]
        return {}

    def step_counts(self) -> dict[str, int]:
        """Updates made by each group; waits for the device."""
        counts = {group.name: int(self.sparse_steps[group.name]) for group in self.sparse}
        for group in self.dense:
            counts[group.name] = int(self._state_of(self.members[group.name][0])["step"])
        return counts

    def set_step_counts(self, counts: Mapping[str, int]) -> None:
        for group in self.groups:
            count = counts.get(group.name, 0)
            if group.name in self.sparse_steps:
                self.sparse_steps[group.name].fill_(count)
                continue
            for item in self.members[group.name]:
                self._state_of(item)["step"].fill_(count)
