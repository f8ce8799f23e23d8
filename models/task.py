"""What a model family gives the trainer: its networks, its parameter groups, and its losses.

The loop knows steps and phases, not models. A family that trains several networks in turn (a
tokenizer and its discriminator, say) names several phases; everything else has one. Read
`models/transformer/task.py` for the plainest example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from .batch import PackedBatch
from .errors import ConfigError

__all__ = [
    "BaseWeights",
    "InitSpec",
    "LossOutput",
    "LossTerm",
    "ParameterGroup",
    "RowGroup",
    "Task",
]


@dataclass(frozen=True)
class InitSpec:
    """How one parameter starts. `trunc_normal` has mean 0 and is cut at `cut` standard deviations.

    `log_counting` is log(1), log(2) .. log(period), over and over in row-major order. `softplus_inverse_log_uniform` is what
    softplus makes log-uniform in [low, high), and at least `floor`.

    Args:
        unit_rows: rows of that many elements are scaled to length 1; 0 leaves them as drawn.
    """

    kind: Literal[
        "trunc_normal",
        "normal",
        "uniform",
        "constant",
        "log_counting",
        "softplus_inverse_log_uniform",
    ] = "trunc_normal"
    std: float = 0.02
    cut: float = 3.0
    value: float = 0.0
    period: int = 1
    low: float = 1e-3
    high: float = 0.1
    floor: float = 0.0
    unit_rows: int = 0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share optimizer settings.

    Args:
        name: appears in metrics and checkpoints.
        parameters: logical names, `network/dotted.parameter.name`.
        algorithm: `adamw`, `row_sparse_adam` (tables whose gradient touches few rows), or `frozen`.
        weight_decay: whether the configured decay applies.
        lr_scale: factor on the scheduled learning rate.
        phase: the phase whose step updates it.
        averaged: whether `optimizer.ema_decay` keeps an average of it; never of tables that are updated by row.
        needs: name of one of `Task.counts`; a step whose global count of it is 0 leaves the group as it is, decay, momentum and
            step count included. None is updated in every step.
        betas: of AdamW, instead of `optimizer.betas`.
        clip_grad_norm: of this group's own gradient, which then is no part of the norm that clips the phase's other groups.
        whole: every rank keeps all of it in fp32, also where other groups are sharded.
    """

    name: str
    parameters: tuple[str, ...]
    algorithm: Literal["adamw", "row_sparse_adam", "frozen"] = "adamw"
    weight_decay: bool = True
    lr_scale: float = 1.0
    phase: str = "train"
    averaged: bool = True
    needs: str | None = None
    betas: tuple[float, float] | None = None
    clip_grad_norm: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class BaseWeights:
    """Parameters that come from another run's checkpoint instead of being drawn.

    Args:
        source: run folder or checkpoint folder; one from elsewhere is imported first (`weft convert import`).
        parameters: logical name here -> `network/dotted.name` there; shapes must be equal.
        stays_there: they are frozen, and this run's checkpoints name them by their hash instead of holding a copy.
            Otherwise they are only what a new run starts from.
        key: of the configuration, for messages.
    """

    source: str
    parameters: Mapping[str, str]
    stays_there: bool
    key: str


@dataclass(frozen=True)
class RowGroup:
    """The ranks that share every row of their batches, in the order of positions.

    Args:
        place: of this rank among them.
        ranks: how many they are.
        group: a `torch.distributed` process group of them.
    """

    place: int
    ranks: int
    group: Any


@dataclass(frozen=True)
class LossTerm:
    """A sum over this micro-batch, and the global count that will divide it.

    The objective is the sum over terms of `weight * total / global_count[count]`, with counts taken
    over all ranks and all micro-batches of the step, so that neither changes the gradient.
    """

    total: Tensor
    count: str
    weight: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """Losses to train on, and sums that are only reported (also divided by a global count).

    Args:
        carried: detached tensors of this micro-batch that the step's next phase finds in its batch's `side`.
        vectors: sums of more than one value over this micro-batch, such as how often each code was used; `Task.summarise`
            makes metrics of them.
    """

    terms: dict[str, LossTerm]
    metrics: dict[str, LossTerm] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """One model family, built from its configuration. Holds no tensors itself."""

    @abstractmethod
    def build_networks(self) -> dict[str, nn.Module]:
        """Networks by name, uninitialised; the engine calls this under the meta device."""

    @abstractmethod
    def init_spec(self, name: str) -> InitSpec:
        """How the parameter with this logical name (`network/dotted.name`) starts."""

    @abstractmethod
    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        """Every parameter in exactly one group."""

    @abstractmethod
    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        """The repeated layers, in order of execution: units of sharding, recomputation and compilation."""

    def wide_modules(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        """Modules inside blocks whose own parameters are gathered in fp32 where weights are sharded."""
        return []

    @abstractmethod
    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """What the losses of this micro-batch are divided by, as host integers."""

    @abstractmethod
    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        """One micro-batch's losses."""

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs (forward and backward) of one position, by the family's published formula."""

    def draw(self, batch: PackedBatch, seed: int) -> PackedBatch:
        """The batch with what is random in it, such as the noise on its images: made on the host, ahead of the step.

        Must be a function of (seed, `IMAGE_KEYS`) alone, so that neither ranks nor micro-batches change it.

        Args:
            batch: on the CPU.
            seed: of the run; a fixed one in evaluation.
        """
        return batch

    def cut_rows(
        self, batch: PackedBatch, networks: Mapping[str, nn.Module], group: RowGroup
    ) -> PackedBatch:
        """One rank's stretch of every row, and the networks told that the next forward is on it.

        Args:
            batch: whole rows, on the CPU.
            group: the ranks that share them. `Task.whole_rows` undoes it.

        Raises:
            ConfigError: the family cannot, see `parallel.sequence_ranks`.
        """
        raise ConfigError(
            "this model family cannot cut rows over ranks; set parallel.sequence_ranks=1"
        )

    def whole_rows(self, networks: Mapping[str, nn.Module]) -> None:  # noqa: B027 - most families know no others
        """The networks told that the next forward is on whole rows."""

    def begin_step(self, step: int) -> None:  # noqa: B027 - most families are the same in every step
        """Called before the phases of each step, with its number from 1: what a ramp is a function of."""

    def summarise(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """() metrics of a step from `LossOutput.vectors`, summed over its micro-batches and all ranks; on their device."""
        return {}

    def facts(self) -> dict[str, Any]:
        """JSON-able, of files beside the data that steps depend on, such as their hashes; a run keeps to those it began with."""
        return {}

    def base_weights(self, networks: Mapping[str, nn.Module]) -> list[BaseWeights]:
        """Parameters that other runs supply."""
        return []

    def network_for_generation(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        """What `generate` calls: has `config` and `forward_cached`, see `models.generation`."""
        return next(iter(networks.values()))

    def part_seconds(self) -> dict[str, float]:
        """Seconds that named parts of the steps since the last call took on this rank's device; never waits for it."""
        return {}

    def review(self, record: Mapping[str, float], positions: int) -> dict[str, float]:
        """What follows from a step's values (means by name, over all ranks) and is to be recorded with them.

        Args:
            positions: of the step, over all ranks.

        Raises:
            TrainingError: the run must not go on.
        """
        return {}

    def phases(self, step: int) -> Sequence[str]:
        """Phases of this step, in order. Each is a backward and an update of its own groups."""
        return ("train",)
