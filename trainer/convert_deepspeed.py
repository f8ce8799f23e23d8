"""DeepSpeed checkpoints to runs, and checkpoints of runs to DeepSpeed's universal layout, one tensor at a time.

An import keeps the fp32 weights, the moments and the optimizer's count of updates, as the checkpoint of step 0, from which a new
run starts with `checkpoint.start_from`. An export holds the same, for `load_universal` of any ZeRO stage on any number of ranks.
DeepSpeed's own layout is not written: it is cut for one stage, one number of ranks and one order of parameters.
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
from ..models.transformer.hugging_face import from_hugging_face_name, to_hugging_face_name
from .checkpoint.layout import Manifest
from .checkpoint.reading import read_manifest, read_tensor
from .checkpoint.writing import write_checkpoint
from .configuration.load import dump_config
from .configuration.schema import TrainingConfig
from .convert import check_space, choose_checkpoint, refuse_trained
from .deepspeed_folder import MOMENTS, DeepSpeedCheckpoint, open_deepspeed
from .files import sync_directory, sync_file, write_text
from .hugging_face_folder import copy_tokenizer, staged_folder
from .optimization.schedule import learning_rate

__all__ = ["ExportedUniversal", "ImportedDeepSpeed", "export_deepspeed", "import_deepspeed"]

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
class ExportedUniversal:
    """What an export made; `updates` is None where the checkpoint had no moments, so that they start at zero."""

    folder: Path
    tag: str
    checkpoint: Path
    parameters: int
    updates: int | None


@dataclass(frozen=True)
class _Model:
    """A model's parameters by logical name (`network/dotted.name`)."""

    shapes: dict[str, tuple[int, ...]]
    group_of: dict[str, ParameterGroup]

    @property
    def trained(self) -> list[str]:
        return [name for name in self.shapes if self.group_of[name].algorithm != "frozen"]


def _model_of(config: TrainingConfig) -> _Model:
    """Without allocating it.

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
    return _Model(
        {
            f"{network}/{name}": tuple(parameter.shape)
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
        },
        {name: group for group in groups for name in group.parameters},
    )


# Import


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
    model = _model_of(config)
    names = _match(checkpoint, model, config, prefix)
    counts = {} if weights_only else _group_updates(checkpoint, model, names)
    kinds = ("fp32",) if weights_only else KINDS
    tensors = _Converted(checkpoint, model, names, kinds, progress)
    with staged_folder(run, overwrite=overwrite, marker="config.yaml") as staging:
        check_space(run, 4 * sum(_numel(shape) for shape in tensors.shapes()))
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
    parameters = sum(_numel(shape) for shape in model.shapes.values())
    most = max((n for phase in counts.values() for n in phase.values()), default=None)
    return ImportedDeepSpeed(run, checkpoint.layout, parameters, most)


def _moved(config: TrainingConfig, run: Path) -> TrainingConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})})


def _match(
    checkpoint: DeepSpeedCheckpoint, model: _Model, config: TrainingConfig, prefix: str
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
    if shape not in (expected, (_numel(expected),)):
        raise CheckpointError(
            f"{name} has shape {list(shape)}, but --model's has {list(expected)}; is it the model it was saved with?"
        )


def _group_updates(
    checkpoint: DeepSpeedCheckpoint, model: _Model, names: Mapping[str, str]
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
        model: _Model,
        names: Mapping[str, str],
        kinds: tuple[str, ...],
        progress: Progress,
    ) -> None:
        self._checkpoint, self._model = checkpoint, model
        self._progress = progress
        trained = set(model.trained)
        self._places = {
            _our_name(kind, name): (kind, name, theirs)
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
        if tensor.numel() != _numel(self._model.shapes[name]):
            raise CheckpointError(
                f"{kind} of {theirs} in {self._checkpoint.folder} has {tensor.numel()} elements instead of {_numel(self._model.shapes[name])}"
            )
        self._progress(tensor.nbytes)
        return tensor.view(self._model.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _our_name(kind: str, name: str) -> str:
    return f"parameters/{name}" if kind == "fp32" else f"optimizer/{kind}/{name}"


# Export


def export_deepspeed(
    config: TrainingConfig,
    run: Path,
    target: Path,
    *,
    step: int | None = None,
    names: str = "weft",
    step_counter: str = "tensor",
    overwrite: bool = False,
    progress: Progress = _no_progress,
) -> ExportedUniversal:
    """Write a checkpoint of a run in DeepSpeed's universal layout.

    Args:
        target: the folder to make; `latest_universal` in it names the tag.
        step: of the checkpoint; None is the newest sound one.
        names: `weft`, or `hf` for Olmo2ForCausalLM's and LlamaForCausalLM's.
        step_counter: `tensor` as torch's optimizers have it, or `int` for DeepSpeed's FusedAdam and DeepSpeedCPUAdam.

    Raises:
        ConfigError: the model cannot be represented, or the output may not be written.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    model = _model_of(config)
    theirs = {name: _their_name(name, names, config) for name in model.shapes}
    checkpoint = choose_checkpoint(run, step)
    manifest = read_manifest(checkpoint)
    updates = _common_updates(manifest, model, checkpoint)
    steps = int(manifest.state.get("imported", {}).get("global_steps", manifest.step))
    tag = f"global_step{steps}_universal"
    counter: Tensor | int = updates or 0
    if step_counter == "tensor":
        counter = torch.tensor(float(counter))
    trained = set(model.trained)
    parameters = sum(_numel(shape) for shape in model.shapes.values())
    held = sum(_numel(shape) for name, shape in model.shapes.items() if name in trained)
    with staged_folder(target, overwrite=overwrite, marker="latest_universal") as staging:
        check_space(target, 4 * (parameters + 2 * held))
        for name, shape in model.shapes.items():
            folder = staging / tag / "zero" / theirs[name]
            folder.mkdir(parents=True)
            for kind in KINDS if name in trained else ("fp32",):
                tensor = _stored(checkpoint, manifest, kind, name, shape)
                _save(folder / f"{kind}.pt", {"param": tensor, "cat_dim": 0})
                progress(tensor.nbytes)
            if name in trained:
                _save(folder / "step.pt", counter)
            sync_directory(folder)
        rate = _next_rate(config, manifest)
        _write_common(staging / tag, len(model.shapes), counter, steps, rate)
        write_text(staging / "latest_universal", tag)
    return ExportedUniversal(target, tag, checkpoint, parameters, updates)


def _their_name(name: str, names: str, config: TrainingConfig) -> str:
    dotted = name.partition("/")[2]
    if names == "weft":
        return dotted
    if not isinstance(config.model, Config):
        raise ConfigError("this model has no Hugging Face names; leave --names=weft")
    if config.model.ngram is not None:
        raise ConfigError("hashed n-gram tables (model.ngram) have no Hugging Face names")
    return to_hugging_face_name(dotted, config.model)


def _common_updates(manifest: Manifest, model: _Model, checkpoint: Path) -> int | None:
    """The one count of updates that DeepSpeed has for all groups; None where there are no moments.

    Raises:
        CheckpointError: groups were updated differently often.
    """
    if not any(name.startswith(f"optimizer/{MOMENTS[0]}/") for name in manifest.tensors):
        return None
    updates = manifest.state.get("engine", {}).get("updates", {})
    counts = {
        group.name: int(updates.get(group.phase, {}).get(group.name, 0))
        for group in (model.group_of[name] for name in model.trained)
    }
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise CheckpointError(
            f"the groups of {checkpoint} were updated differently often ({each}), for which DeepSpeed has no place"
        )
    return next(iter(counts.values()), None)


def _stored(
    checkpoint: Path, manifest: Manifest, kind: str, name: str, shape: tuple[int, ...]
) -> Tensor:
    ours = _our_name(kind, name)
    if kind != "fp32" and ours not in manifest.tensors:
        return torch.zeros(shape)
    tensor = read_tensor(checkpoint, ours)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} in {checkpoint} has shape {list(tensor.shape)}, but the run's config.yaml says {list(shape)}"
        )
    return tensor


def _next_rate(config: TrainingConfig, manifest: Manifest) -> float | None:
    """Of the update that comes next; None where there is no run behind the checkpoint, or it is at its end."""
    if "imported" in manifest.state:
        return manifest.state["imported"].get("learning_rate")
    length, steps = config.train.batch_tokens, config.train.steps
    return (
        learning_rate(config.schedule, config.optimizer.lr, manifest.step + 1, length, steps)
        or None
    )


def _write_common(
    folder: Path, parameters: int, counter: Tensor | int, steps: int, rate: float | None
) -> None:
    """What DeepSpeed wants beside the tensors: counters, and no settings but the rate, so that the reader's own stay."""
    # DeepSpeed's schedulers set the rate after an update, so the next one's is the checkpoint's.
    settings = {} if rate is None else {"lr": rate}
    # Stages 1 and 2 load as many groups as are listed here, and no run has more groups than parameters.
    groups: list[dict[str, Any]] = [{"params": [], **settings} for _ in range(parameters)]
    inner = {"state": {0: {"step": counter}}, "param_groups": groups[:1]}
    state = {"optimizer_state_dict": inner, "param_groups": groups, "ds_version": "0.19.8"}
    _save(folder / "zero" / "optimizer_state.pt", state)
    sync_directory(folder / "zero")
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [],
        "shared_params": {},
        "global_steps": steps,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": _scheduler(steps),
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    # Stage 3 looks for the second name.
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(folder / name, model)
    sync_directory(folder)


def _scheduler(steps: int) -> dict[str, Any]:
    """Where DeepSpeed's schedulers and torch's LambdaLR (that of transformers) stand after so many steps."""
    return {
        "last_batch_iteration": steps - 1,
        "last_epoch": steps,
        "_step_count": steps + 1,
        "lr_lambdas": [],
    }


def _save(path: Path, value: Any) -> None:
    torch.save(value, path)
    sync_file(path)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
