"""DeepSpeed checkpoints to runs, one tensor at a time; the way back is in `deepspeed_universal.py`.

An import keeps the fp32 weights, the moments and the optimizer's count of updates, as the checkpoint of step 0, from which a new
run starts with `checkpoint.start_from`. What the files are is in `deepspeed_folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import build_task
from ..models.errors import CheckpointError, ConfigError
from ..models.task import ParameterGroup
from ..models.transformer.config import Config
from ..models.transformer.hugging_face import from_hugging_face_name
from .checkpoint.writing import write_checkpoint
from .configuration.load import dump_config
from .configuration.schema import TrainingConfig
from .convert import check_space, refuse_trained
from .deepspeed_folder import MOMENTS, DeepSpeedCheckpoint, open_deepspeed
from .files import write_text
from .hugging_face_folder import copy_tokenizer, staged_folder

__all__ = [
    "KINDS",
    "ImportedDeepSpeed",
    "ModelParameters",
    "checkpoint_name",
    "count_elements",
    "import_deepspeed",
    "parameters_of",
]

KINDS = ("fp32", *MOMENTS)

Progress = Callable[[int], object]


def _no_progress(count: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class ImportedDeepSpeed:
    """What an import made; `updates` is None where it has no moments."""

    run: Path
    layout: str
    parameters: int
    updates: int | None


@dataclass(frozen=True)
class ModelParameters:
    """A model's parameters by logical name (`network/dotted.name`): shapes, and the groups that train them."""

    shapes: dict[str, tuple[int, ...]]
    group_of: dict[str, ParameterGroup]

    @property
    def trained(self) -> list[str]:
        """Those that are not frozen."""
        return [name for name in self.shapes if self.group_of[name].algorithm != "frozen"]


def parameters_of(config: TrainingConfig) -> ModelParameters:
    """A model's parameters, without allocating it.

    Raises:
        ConfigError: it has several networks, which DeepSpeed's layouts cannot hold.
    """
    task = build_task(config.model)
    with torch.device("meta"):
        networks = task.build_networks()
    if len(networks) != 1:
        raise ConfigError(
            f"a DeepSpeed checkpoint holds one network, and this model has {', '.join(sorted(networks))}"
        )
    groups = task.parameter_groups(networks)
    return ModelParameters(
        {
            f"{network}/{name}": tuple(parameter.shape)
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
        },
        {name: group for group in groups for name in group.parameters},
    )


def import_deepspeed(
    source: Path,
    run: Path,
    config: TrainingConfig,
    *,
    tag: str | None = None,
    prefix: str = "",
    weights_only: bool = False,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    progress: Progress = _no_progress,
) -> ImportedDeepSpeed:
    """Make a run of a DeepSpeed checkpoint: ZeRO 1, 2 or 3 of any number of ranks, or universal.

    Args:
        source: the folder save_checkpoint wrote to, or the folder of one tag.
        config: of the run to be made; parameters may have this model's names, Hugging Face's, or OLMo-core's.
        prefix: what all names begin with there and not here, `module.` say.
        weights_only: leave moments and counts of updates.
        tokenizer: folder to copy the tokenizer's files from.
        progress: told the bytes of each tensor converted.

    Raises:
        ConfigError: not such a checkpoint, names that do not fit, or an output that may not be written.
        CheckpointError: files are missing or damaged, or do not belong to the configuration.
    """
    refuse_trained(run, overwrite=overwrite)
    checkpoint = open_deepspeed(source, tag)
    model = parameters_of(config)
    names = _match(checkpoint, model, config, prefix)
    counts = {} if weights_only else _group_updates(checkpoint, model, names)
    kinds = ("fp32",) if weights_only else KINDS
    tensors = _Converted(checkpoint, model, names, kinds, progress)
    with staged_folder(run, overwrite=overwrite, marker="config.yaml") as staging:
        check_space(run, 4 * sum(count_elements(shape) for shape in tensors.shapes()))
        write_text(staging / "config.yaml", dump_config(_moved(config, run)))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, staging / "tokenizer")
        state: dict[str, Any] = {
            "step": 0,
            "imported": {"folder": source.name, "layout": checkpoint.layout},
        }
        if counts:
            state["imported"] |= {
                "global_steps": checkpoint.global_steps,
                "learning_rate": checkpoint.learning_rate(),
            }
            state["engine"] = {"updates": counts}
        write_checkpoint(staging / "checkpoints" / "step_00000000", tensors, state)
    parameters = sum(count_elements(shape) for shape in model.shapes.values())
    most = max((n for phase in counts.values() for n in phase.values()), default=None)
    return ImportedDeepSpeed(run, checkpoint.layout, parameters, most)


def _moved(config: TrainingConfig, run: Path) -> TrainingConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})})


def _match(
    checkpoint: DeepSpeedCheckpoint, model: ModelParameters, config: TrainingConfig, prefix: str
) -> dict[str, str]:
    """Our logical names -> theirs, complete and of the right shapes."""
    network = next(iter(model.shapes)).partition("/")[0]
    names: dict[str, str] = {}
    for theirs in checkpoint.names:
        plain = theirs.removeprefix(prefix)
        ours: str | None = plain
        if f"{network}/{plain}" not in model.shapes:
            ours = _translate(plain, config)
        if ours is None:
            continue
        name = f"{network}/{ours}"
        if name in names:
            raise CheckpointError(f"{theirs} and {names[name]} are the same parameter")
        _check_shape(checkpoint, theirs, model.shapes.get(name))
        names[name] = theirs
    missing = [name for name in model.shapes if name not in names]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} holds no {missing[0].partition('/')[2]} ({len(missing)} of {len(model.shapes)} parameters are missing); is --model the model it was saved with?"
        )
    return {name: names[name] for name in model.shapes}


def _translate(name: str, config: TrainingConfig) -> str | None:
    """Our name of a parameter that has another there; None for what is none."""
    if not isinstance(config.model, Config):
        raise ConfigError(f"this model has no parameter {name}; is it the one that was saved?")
    try:
        return from_hugging_face_name(name, config.model)
    except ConfigError as error:
        raise ConfigError(
            f"parameter {name!r} of the checkpoint is none of this model's, in its own names or Hugging Face's; "
            "give the right --model, or --prefix for what all names begin with"
        ) from error


def _check_shape(
    checkpoint: DeepSpeedCheckpoint, name: str, expected: tuple[int, ...] | None
) -> None:
    shape = checkpoint.shape(name)
    if expected is None:
        raise CheckpointError(f"{name} does not exist in a model of this size; see --model")
    # Universal checkpoints that were stage 3 are flat.
    if shape not in (expected, (count_elements(expected),)):
        raise CheckpointError(
            f"{name} has shape {list(shape)}, but --model's has {list(expected)}; is it the model it was saved with?"
        )


def _group_updates(
    checkpoint: DeepSpeedCheckpoint, model: ModelParameters, names: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Phase -> group -> how often it was updated.

    Raises:
        CheckpointError: a parameter that this model trains has no moments, or counts differ within a group.
    """
    counts: dict[str, dict[str, int]] = {}
    for name in model.trained:
        theirs, group = names[name], model.group_of[name]
        if not checkpoint.is_trained(theirs):
            raise CheckpointError(
                f"{theirs} has no moments in {checkpoint.folder}; add --weights-only to import weights alone"
            )
        found = checkpoint.updates(theirs)
        known = counts.setdefault(group.phase, {}).setdefault(group.name, found)
        if known != found:
            raise CheckpointError(
                f"{theirs} was updated {found} times and others of its group {known} times; add --weights-only"
            )
    return counts


class _Converted(Mapping[str, Tensor]):
    """Tensors under our checkpoint names, each put together when it is asked for."""

    def __init__(
        self,
        checkpoint: DeepSpeedCheckpoint,
        model: ModelParameters,
        names: Mapping[str, str],
        kinds: tuple[str, ...],
        progress: Progress,
    ) -> None:
        self._checkpoint, self._model = checkpoint, model
        self._progress = progress
        trained = set(model.trained)
        self._places = {
            checkpoint_name(kind, name): (kind, name, theirs)
            for name, theirs in names.items()
            for kind in kinds
            if kind == "fp32" or name in trained
        }

    def shapes(self) -> Iterator[tuple[int, ...]]:
        for _, name, _ in self._places.values():
            yield self._model.shapes[name]

    def __getitem__(self, key: str) -> Tensor:
        kind, name, theirs = self._places[key]
        tensor = self._checkpoint.read(kind, theirs)
        if tensor.numel() != count_elements(self._model.shapes[name]):
            raise CheckpointError(
                f"{kind} of {theirs} in {self._checkpoint.folder} has {tensor.numel()} elements instead of {count_elements(self._model.shapes[name])}"
            )
        self._progress(tensor.nbytes)
        return tensor.view(self._model.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def checkpoint_name(kind: str, name: str) -> str:
    """Of `fp32` or a moment of a parameter, in our checkpoints."""
    return f"parameters/{name}" if kind == "fp32" else f"optimizer/{kind}/{name}"


def count_elements(shape: tuple[int, ...]) -> int:
    """The product of a shape."""
    return torch.Size(shape).numel()
