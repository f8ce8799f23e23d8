"""The one protocol behind which torch, DeepSpeed and Accelerate are interchangeable.

An engine owns the networks, their master weights and their optimizers. It is told which
micro-batches to run and when to update; it never sees files. What it holds is described to
the checkpoint as flat ranges of logically named tensors (`TensorShard`), which any engine on any number
of ranks can produce and fill.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...models.batch import PackedBatch
from ...models.task import LossOutput
from ..distributed import Topology

__all__ = ["Engine", "StepResult", "TensorShard"]


@dataclass(frozen=True)
class TensorShard:
    """A contiguous range, in row-major order, of one logical tensor; the part this rank holds.

    Args:
        name: `parameters/NETWORK/dotted.name`, `ema/NETWORK/dotted.name`, or `optimizer/KIND/NETWORK/dotted.name` with KIND
            `exp_avg` or `exp_avg_sq`, or `optimizer/NAME` for state that belongs to no parameter.
        shape: the whole tensor's shape.
        start: first flat element held here.
        tensor: the elements held, contiguous, on any device; `numel()` is the range's length. Loading
            writes into it in place.
        is_writer: whether this rank writes the range; of several ranks that hold the same one, exactly one does.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    is_writer: bool


@dataclass(frozen=True)
class StepResult:
    """Device tensors, so that asking for a step does not wait for it.

    Args:
        grad_norm: () fp32, global norm before clipping.
        skipped: () fp32, 1 where the update was withheld (outlier or non-finite), else 0.
        group_norms: the same as `grad_norm` of groups that are clipped alone, which are no part of it.
    """

    grad_norm: Tensor
    skipped: Tensor
    group_norms: dict[str, Tensor] = field(default_factory=dict)


class Engine(ABC):
    """Networks, master weights and optimizers of one run on this rank."""

    topology: Topology
    networks: dict[str, nn.Module]
    count_of: dict[str, str]
    """Which global count divides each sum that `forward_backward` gave so far."""
    vectors: dict[str, Tensor]
    """`LossOutput.vectors` of the last `forward_backward`, summed over its micro-batches on this rank."""

    @property
    @abstractmethod
    def data_rank(self) -> int:
        """This rank's index among those that see different data."""

    @property
    @abstractmethod
    def data_ranks(self) -> int:
        """How many ranks see different data."""

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts what belongs to whole rows: of the ranks that share rows, the first does."""
        return True

    def own_part(self, batch: PackedBatch) -> PackedBatch:
        """This rank's part of a micro-batch: its stretch of every row where ranks share rows, else the batch."""
        return batch

    @abstractmethod
    def forward_backward(
        self, phase: str, micro_batches: Sequence[PackedBatch], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Collective: accumulate the gradient of one phase over this rank's micro-batches.

        Args:
            counts: the step's global counts (all ranks, all micro-batches) that divide the losses; a count of 0 divides by 1,
                and groups that need it are left out of the update that follows (`ParameterGroup.needs`).

        Returns:
            Detached fp32 sums of each term and metric over this rank's micro-batches.
        """

    @abstractmethod
    def step(self, phase: str, learning_rate: float, loss: Tensor | None = None) -> StepResult:
        """Collective: clip, decide whether to skip, update the phase's groups, clear gradients.

        Args:
            loss: () the step's global mean loss, for the outlier rule; None where it is off.
        """

    def withheld_norms(self) -> dict[str, float]:
        """Gradient norm of each parameter, by logical name, in the last step whose update was withheld.

        Empty where there was none, or where the engine does not keep them.
        """
        return {}

    @abstractmethod
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        """Losses of one batch without gradients."""

    @abstractmethod
    def sum_over_ranks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collective: device scalars summed over the data ranks, without a host sync."""

    def sum_vectors(self) -> dict[str, Tensor]:
        """Collective: `vectors` summed over the data ranks, without a host sync."""
        return self.vectors

    @abstractmethod
    def state_shards(self) -> list[TensorShard]:
        """Everything that must survive, as ranges of logical tensors held by this rank.

        Parameters whose weights stay in another run (`BaseWeights.stays_there`) are not among them.
        """

    @abstractmethod
    def base_shards(self) -> list[TensorShard]:
        """Parameters whose weights stay in another run, as ranges held by this rank; nobody writes them."""

    def start_averages(self) -> None:  # noqa: B027 - not every engine keeps averages
        """A new run's weights are all there: averages of weights begin as copies of them."""

    def averaged(self) -> contextlib.AbstractContextManager[Any]:
        """The networks compute with the averages of their weights meanwhile, where the run keeps them."""
        return contextlib.nullcontext()

    def after_load(self) -> None:  # noqa: B027 - most engines compute with the shards themselves
        """Collective: the shards were filled from outside; what is computed with has to follow them."""

    @abstractmethod
    def scalar_state(self) -> dict[str, Any]:
        """JSON-able state that is the same on all ranks (optimizer step counts)."""

    @abstractmethod
    def load_scalar_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `scalar_state` gave, after the shards were filled in place."""

    @abstractmethod
    def network_for_generation(self, name: str) -> nn.Module:
        """A network that can be called outside training; may gather weights (Collective)."""
