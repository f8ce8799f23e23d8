"""Checkpoints of runs in DeepSpeed's universal layout, one tensor at a time.

It holds whole fp32 weights and moments, for `load_universal` of any ZeRO stage on any number of ranks. DeepSpeed's own layout is
not written: it is cut for one stage, one number of ranks and one order of parameters, which only the engine that loads it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.errors import CheckpointError, ConfigError
from ..models.transformer.config import Config
from ..models.transformer.hugging_face import to_hugging_face_name
from .checkpoint.layout import Manifest
from .checkpoint.reading import read_manifest, read_tensor
from .configuration.schema import TrainingConfig
from .convert import check_space, choose_checkpoint
from .convert_deepspeed import (
    KINDS,
    ModelParameters,
    checkpoint_name,
    count_elements,
    parameters_of,
)
from .deepspeed_folder import MOMENTS
from .files import sync_directory, sync_file, write_text
from .hugging_face_folder import staged_folder
from .optimization.schedule import learning_rate

__all__ = ["ExportedUniversal", "export_deepspeed"]

FORMAT_OF = "0.19.8"
"""The version of DeepSpeed whose universal layout is written; stages 1 and 2 refuse one that names none."""

Progress = Callable[[int], object]


def _no_progress(count: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class ExportedUniversal:
    """What an export made; `updates` is None where the checkpoint had no moments, so that they start at zero."""

    folder: Path
    tag: str
    checkpoint: Path
    parameters: int
    updates: int | None


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
    model = parameters_of(config)
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
    parameters = sum(count_elements(shape) for shape in model.shapes.values())
    held = sum(count_elements(shape) for name, shape in model.shapes.items() if name in trained)
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


def _common_updates(manifest: Manifest, model: ModelParameters, checkpoint: Path) -> int | None:
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
    ours = checkpoint_name(kind, name)
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
    state = {"optimizer_state_dict": inner, "param_groups": groups, "ds_version": FORMAT_OF}
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
