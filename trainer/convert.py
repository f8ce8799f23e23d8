"""Hugging Face folders to runs and back, one tensor or one file at a time.

An imported run holds a complete configuration and the weights alone, as its checkpoint of step 0. Either direction writes
a hidden folder and renames it, so what exists is whole. Names and settings are in a family's `hugging_face` module. A
frozen network that comes with a model (the entropy model of a BLT) is a run of its own, inside the model's.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.errors import CheckpointError, ConfigError
from ..models.hugging_face import HuggingFaceLayout, export_forms, layout_for, layout_of
from ..models.section import Section
from .checkpoint.reading import find_checkpoint, list_checkpoints, read_manifest, read_tensor
from .checkpoint.writing import write_checkpoint
from .configuration.documents import dump_yaml
from .configuration.load import dump_config, load_run_config
from .configuration.schema import TrainingConfig
from .data.vocabulary import ByteVocabulary
from .files import free_bytes, write_json, write_text
from .hugging_face_folder import (
    StoredTensor,
    copy_tokenizer,
    find_tokenizer,
    open_tensors,
    read_json,
    read_stored,
    special_ids,
    staged_folder,
    write_shards,
)

__all__ = [
    "Exported",
    "Imported",
    "check_space",
    "choose_checkpoint",
    "config_of_folder",
    "export_run",
    "import_folder",
    "refuse_trained",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREFIX = "parameters/model/"
BYTE_VOCABULARY_SIZE = 260
LONGEST_SEQUENCE = 8192
"""Imported runs do not start with longer samples than this, whatever the model could take."""
BATCH_TOKENS = 524_288

Progress = Callable[[int], object]


def _no_progress(count: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    run: Path
    config: TrainingConfig
    parameters: int


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    folder: Path
    checkpoint: Path
    parameters: int
    files: tuple[str, ...]


class _Weights(Mapping[str, Tensor]):
    """One network's tensors under their checkpoint names, each read and widened to fp32 when it is asked for.

    Args:
        stored: by our names, of all networks.
        network: the companion whose tensors these are; empty for the model itself.
        arrange: their values to ours, given our name.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        network: str,
        arrange: Callable[[str, Tensor], Tensor],
        progress: Progress,
    ) -> None:
        self._stored, self._arrange, self._progress = stored, arrange, progress
        split = {name: _network_of(name) for name in stored}
        self._names = {
            f"{PREFIX}{own}": name for name, (place, own) in split.items() if place == network
        }

    def __getitem__(self, name: str) -> Tensor:
        ours = self._names[name]
        tensor = read_stored(self._stored[ours]).to(torch.float32)
        self._progress(tensor.nbytes)
        return self._arrange(ours, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _network_of(name: str) -> tuple[str, str]:
    """The companion a parameter belongs to, empty for the model itself, and its name there."""
    network, _, own = name.rpartition("/")
    return network, own


def import_folder(
    source: Path,
    run: Path,
    overrides: Sequence[str] = (),
    *,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    progress: Progress = _no_progress,
) -> Imported:
    """Make a run of a Hugging Face folder; OLMo-core's parameter names are understood as well.

    Args:
        source: folder with config.json and safetensors (one file, or shards with an index).
        run: the run folder to make.
        overrides: `key=value`, laid over the run's configuration.
        tokenizer: folder with tokenizer.json; default `source`, where it has one.
        overwrite: replace an imported run; a run that has trained is never replaced.
        progress: told the bytes of each tensor converted.

    Raises:
        ConfigError: the model cannot be represented, or the output may not be written.
        CheckpointError: files are missing or damaged, or do not belong to the configuration.
    """
    stored = open_tensors(source)
    theirs = read_json(source / "config.json")
    layout = layout_for(theirs)
    model = layout.from_hugging_face_config(theirs)
    refuse_trained(run, overwrite=overwrite)
    companions = dict(layout.companions(model))
    places = {name: str((run / name).absolute()) for name in companions}
    model = layout.with_companions(model, places)
    found = None if layout.READS_BYTES else tokenizer or find_tokenizer(source)
    positions = layout.longest_positions(theirs)
    state = {"step": 0, "imported": {"folder": source.name, "max_positions": positions}}
    with staged_folder(run, overwrite=overwrite, marker="config.yaml") as staging:
        draft = _draft_config(model, positions, run, found, overrides)
        write_text(staging / "config.yaml", dump_yaml(draft))
        config = load_run_config(staging, overrides).config
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})})
        weights = _match(stored, layout, config.model)
        parameters = sum(_numel(tensor.shape) for tensor in weights.values())
        check_space(run, 4 * parameters)
        write_text(staging / "config.yaml", dump_config(config))
        if found is not None:
            copy_tokenizer(_tokenizer_folder(found), staging / "tokenizer")
        for network in ("", *companions):
            folder = staging / network
            if network:
                folder.mkdir()
                own = _draft_config(companions[network], positions, run / network, found, overrides)
                write_text(folder / "config.yaml", dump_yaml(own))
            arrange = functools.partial(_to_ours, layout, config.model)
            tensors = _Weights(weights, network, arrange, progress)
            write_checkpoint(folder / "checkpoints" / "step_00000000", tensors, state)
    return Imported(run, config, parameters)


def _to_ours(layout: HuggingFaceLayout, model: Section, name: str, tensor: Tensor) -> Tensor:
    return layout.arrange(name, tensor, model, to_theirs=False)


def config_of_folder(
    source: Path, run: Path, overrides: Sequence[str], tokenizer: Path | None = None
) -> tuple[TrainingConfig, Path | None]:
    """The configuration of a run made of a Hugging Face folder, and the folder of its tokenizer.

    Raises:
        ConfigError: the model cannot be represented, or there is no tokenizer for its vocabulary.
    """
    theirs = read_json(source / "config.json")
    layout = layout_for(theirs)
    model = layout.from_hugging_face_config(theirs)
    given = None if layout.READS_BYTES else tokenizer or find_tokenizer(source)
    positions = layout.longest_positions(theirs)
    with tempfile.TemporaryDirectory() as drafts:
        draft = _draft_config(model, positions, run, given, overrides)
        write_text(Path(drafts) / "config.yaml", dump_yaml(draft))
        config = load_run_config(Path(drafts), overrides).config
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})}), given


def refuse_trained(run: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where `overwrite` would replace more than an import."""
    if overwrite and (run / "metrics.jsonl").exists():
        raise ConfigError(f"{run} holds a run that has trained; choose another folder")


def _draft_config(
    model: Section,
    positions: int | None,
    run: Path,
    tokenizer: Path | None,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Plain data of the run's configuration before overrides."""
    length = min(int(positions or 2048), LONGEST_SEQUENCE)
    vocabulary, size = "bytes", getattr(model, "vocab_size", None)
    if tokenizer is not None:
        vocabulary = f"hf:{(run / 'tokenizer').absolute()}"
    elif size != BYTE_VOCABULARY_SIZE and not _sets(overrides, "data.vocabulary"):
        raise ConfigError(
            f"no tokenizer.json beside the weights, and {size} ids are not the byte vocabulary's "
            f"{BYTE_VOCABULARY_SIZE}; add --tokenizer FOLDER or data.vocabulary=hf:FOLDER"
        )
    corpus = {"name": "python-stdlib", "path": "builtin:python-stdlib"}
    return {
        "run": {"name": run.name, "dir": str(run)},
        "model": model.model_dump(mode="json"),
        "data": {"sources": [corpus], "vocabulary": vocabulary, "sequence_length": length},
        "train": {"batch_tokens": max(1, BATCH_TOKENS // length) * length},
    }


def _sets(overrides: Sequence[str], key: str) -> bool:
    return any(text.partition("=")[0].strip() == key for text in overrides)


def _tokenizer_folder(path: Path) -> Path:
    """The folder of a tokenizer given as a folder or as its tokenizer.json."""
    folder = path.parent if path.is_file() else path
    if find_tokenizer(folder) is None:
        raise ConfigError(f"there is no tokenizer.json in {folder}; give the folder that has it")
    return folder


def _match(
    stored: Mapping[str, StoredTensor], layout: HuggingFaceLayout, model: Section
) -> dict[str, StoredTensor]:
    """Their tensors under our names, in the model's order, complete and of the right shapes."""
    ours: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        mapped = layout.from_hugging_face_name(name, model)
        if mapped is None:
            continue
        if mapped in ours:
            raise CheckpointError(
                f"{name} and {ours[mapped].name} are the same parameter; keep one of them"
            )
        ours[mapped] = tensor
    shapes = layout.parameter_shapes(model)
    for name, tensor in ours.items():
        if name not in shapes:
            raise CheckpointError(f"{tensor.name} does not exist in a model of config.json's size")
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.name} has shape {list(tensor.shape)}, but config.json's model has {list(shapes[name])}"
            )
    missing = [name for name in shapes if name not in ours]
    if missing:
        theirs = layout.to_hugging_face_name(missing[0], model)
        raise CheckpointError(
            f"{len(missing)} of {len(shapes)} parameters are missing, the first is {theirs}; fetch the folder again"
        )
    return {name: ours[name] for name in shapes}


def export_run(
    config: TrainingConfig,
    run: Path,
    target: Path,
    *,
    step: int | None = None,
    dtype: str = "fp32",
    max_shard_bytes: int = 5 * 10**9,
    max_positions: int | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    progress: Progress = _no_progress,
) -> Exported:
    """Write a checkpoint of a run as a folder that transformers reads.

    Args:
        config: the run's.
        target: the folder to make.
        step: of the checkpoint; None is the newest sound one.
        dtype: `fp32`, `bf16` or `fp16`.
        max_shard_bytes: most bytes of one safetensors file; also the peak of memory.
        max_positions: `max_position_embeddings`; default what an import said, else `data.sequence_length`.
        tokenizer: folder with tokenizer.json; default the one of `data.vocabulary`.

    Raises:
        ConfigError: Hugging Face has no such model, or the output may not be written.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    model = config.model
    layout = layout_of(model)
    layout.check_exportable(model)
    checkpoint = choose_checkpoint(run, step)
    places = {"": checkpoint, **_companion_checkpoints(layout, model)}
    tokens, ids = _tokenizer_of(config, tokenizer)
    imported = read_manifest(checkpoint).state.get("imported") or {}
    said = {
        "max_positions": max_positions
        or imported.get("max_positions")
        or config.data.sequence_length,
        **{f"{kind}_id": ids[kind] for kind in ("bos", "eos", "pad")},
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }
    forms = export_forms(layout, model)
    files: list[str] = []
    parameters = sum(
        _numel(shape)
        for form, _ in forms.values()
        for shape in layout.parameter_shapes(form).values()
    )
    with staged_folder(target, overwrite=overwrite, marker=_marker(forms)) as staging:
        check_space(target, parameters * DTYPES[dtype].itemsize)
        for name, (form, stored_name) in forms.items():
            folder = staging / name
            folder.mkdir(exist_ok=True)
            shapes, read = _readers(layout, form, stored_name, places)
            written = write_shards(
                folder,
                shapes,
                read,
                dtype=DTYPES[dtype],
                max_shard_bytes=max_shard_bytes,
                progress=progress,
            )
            files += [str(file.relative_to(staging)) for file in written]
            write_json(folder / "config.json", layout.to_hugging_face_config(form, **said))
            write_json(folder / "generation_config.json", _generation_settings(ids))
            if tokens is not None:
                copy_tokenizer(tokens, folder)
    return Exported(target, checkpoint, parameters, tuple(files))


def _marker(forms: Mapping[str, Any]) -> str:
    """The file by which a folder is known to be such an export."""
    return str(Path(next(iter(forms))) / "config.json")


def _readers(
    layout: HuggingFaceLayout,
    form: Section,
    stored_name: Callable[[str], str],
    places: Mapping[str, Path],
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes of a model by their names, and what reads one of its parameters from the checkpoints at `places`."""
    shapes = layout.parameter_shapes(form)
    names = {layout.to_hugging_face_name(name, form): name for name in shapes}

    def read(theirs: str) -> Tensor:
        ours = names[theirs]
        network, own = _network_of(stored_name(ours))
        tensor = _read_parameter(places[network], own, shapes[ours])
        return layout.arrange(ours, tensor, form, to_theirs=True)

    return {theirs: shapes[ours] for theirs, ours in names.items()}, read


def _companion_checkpoints(layout: HuggingFaceLayout, model: Section) -> dict[str, Path]:
    """Where the weights of a model's companions are.

    Raises:
        CheckpointError: there is nothing sound.
    """
    found = {}
    for name, place in layout.companion_runs(model).items():
        path = find_checkpoint(Path(place))
        if path is None:
            raise CheckpointError(
                f"{place} holds no complete checkpoint of the model's {name} network, which belongs to the export"
            )
        found[name] = path
    return found


def choose_checkpoint(run: Path, step: int | None) -> Path:
    if step is None:
        found = find_checkpoint(run)
        if found is None:
            raise CheckpointError(f"{run} has no complete checkpoint to export")
        return found
    steps = {info.step: info.path for info in list_checkpoints(run)}
    if step not in steps:
        have = ", ".join(str(s) for s in sorted(steps)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {have}")
    return steps[step]


def _read_parameter(checkpoint: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = read_tensor(checkpoint, f"{PREFIX}{name}")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} in {checkpoint} has shape {list(tensor.shape)}, but the run's config.yaml says {list(shape)}"
        )
    return tensor


def _tokenizer_of(
    config: TrainingConfig, tokenizer: Path | None
) -> tuple[Path | None, dict[str, int | None]]:
    """The folder to copy the tokenizer from, and its special ids."""
    vocabulary = config.data.vocabulary
    if tokenizer is None and vocabulary == "bytes":
        ids = ByteVocabulary
        return None, {"bos": ids.BOS, "eos": ids.EOS, "pad": ids.PAD}
    path = tokenizer or Path(vocabulary.removeprefix("hf:")).expanduser()
    folder = _tokenizer_folder(path)
    return folder, special_ids(folder)


def _generation_settings(ids: Mapping[str, int | None]) -> dict[str, Any]:
    known = {f"{kind}_token_id": value for kind, value in ids.items() if value is not None}
    return {"_from_model_config": True, **known}


def check_space(target: Path, needed: int) -> None:
    """Raise CheckpointError where `needed` bytes do not fit on the disk of `target`."""
    free = free_bytes(target.absolute())
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free"
        )


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
