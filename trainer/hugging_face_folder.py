"""A Hugging Face model folder on disk: safetensors (one file or shards with an index), config.json, tokenizer files.

Only safetensors are read; pickled weights are refused, never executed. Files are opened to read their headers, and a
tensor's bytes are read when it is asked for. `trainer/convert.py` turns such folders into runs and back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.errors import CheckpointError, ConfigError
from .files import sync_directory, sync_file, write_json

__all__ = [
    "StoredTensor",
    "copy_tokenizer",
    "find_tokenizer",
    "open_tensors",
    "read_json",
    "read_stored",
    "special_ids",
    "staged_folder",
    "write_shards",
]

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = ("F64", "F32", "F16", "BF16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape and type (`F32`, `BF16`, ...) from the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, read from the headers alone.

    Raises:
        ConfigError: there is no such folder, or it has no safetensors.
        CheckpointError: a file is missing, truncated or damaged, or holds something else than floats.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}; give a folder with config.json and safetensors"
        )
    index = _find_index(folder)
    placed = _read_index(index) if index else None
    files = sorted({folder / name for name in placed.values()}) if placed else _plain_files(folder)
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if placed is None or placed.get(tensor.name) == file.name:
                if tensor.name in found:
                    raise CheckpointError(
                        f"{tensor.name} is in {found[tensor.name].file} and in {file}"
                    )
                found[tensor.name] = tensor
    lost = sorted(set(placed or ()) - set(found))
    if lost:
        assert placed is not None
        raise CheckpointError(
            f"{index} places {lost[0]} in {placed[lost[0]]}, which does not have it"
        )
    return found


def _find_index(folder: Path) -> Path | None:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    return folder / INDEX if folder / INDEX in indices else next(iter(indices), None)


def _read_index(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path} has no weight_map; fetch the folder again")
    for name in set(placed.values()):
        # An index is input: it must not lead out of its folder.
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(f"{path} names a file outside its folder: {name!r}")
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"{path.name} names {name}, which is not in {path.parent}; fetch it again"
            )
    return placed


def _plain_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ConfigError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code and are never opened; "
            "save it as safetensors first (transformers: save_pretrained)"
        )
    raise ConfigError(
        f"{folder} has no safetensors files; give a folder with config.json and safetensors"
    )


def _read_header(file: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in FLOATS:
                    raise CheckpointError(
                        f"{name} in {file} is {dtype}; only {', '.join(FLOATS)} can be read"
                    )
                yield StoredTensor(file, name, tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or not readable ({error}); fetch it again"
        ) from error


def read_stored(stored: StoredTensor) -> Tensor:
    """The tensor's values, on the CPU.

    Raises:
        CheckpointError: the file cannot be read any more.
    """
    try:
        with safe_open(stored.file, framework="pt") as opened:
            return opened.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {stored.name} from {stored.file}: {error}") from error


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Callable[[int], object],
) -> list[Path]:
    """Write tensors as safetensors, in order, with an index where there are several files.

    Args:
        shapes: names and shapes of what is to be written.
        read: gives one tensor; called once each, and no more than one file's tensors are held at a time.
        dtype: type of what is written.
        max_shard_bytes: a file is this large at most, unless a single tensor is larger.
        progress: told the bytes of each tensor read.
    """
    sizes = {name: _numel(shape) * dtype.itemsize for name, shape in shapes.items()}
    groups = _group(sizes, max_shard_bytes)
    files, placed = [], {}
    for number, names in enumerate(groups, 1):
        one = len(groups) == 1
        file = "model.safetensors" if one else f"model-{number:05}-of-{len(groups):05}.safetensors"
        held = {}
        for name in names:
            held[name] = read(name).to(dtype).contiguous()
            placed[name] = file
            progress(sizes[name])
        save_file(held, folder / file, metadata={"format": "pt"})
        sync_file(folder / file)
        files.append(folder / file)
    if len(groups) > 1:
        parameters = sum(_numel(shape) for shape in shapes.values())
        metadata = {"total_parameters": parameters, "total_size": sum(sizes.values())}
        write_json(
            folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(placed.items()))}
        )
    return files


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _group(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > largest:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def find_tokenizer(folder: Path) -> Path | None:
    """The folder itself if it has a tokenizer.json."""
    return folder if (folder / "tokenizer.json").is_file() else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and nothing else, into an existing or new folder."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            sync_file(target / name)


def special_ids(folder: Path) -> dict[str, int | None]:
    """Ids of `bos`, `eos` and `pad` as tokenizer_config.json names them; None for what it does not name."""
    tokenizer = read_json(folder / "tokenizer.json")
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {item["content"]: item["id"] for item in tokenizer.get("added_tokens") or ()}
    found: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        found[kind] = ids.get(token.get("content") if isinstance(token, dict) else token)
    return found


@contextmanager
def staged_folder(target: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes it when the block ends, and vanishes if the block fails.

    Args:
        overwrite: replace what is there, provided it holds `marker`: nobody's home folder is ever removed.

    Raises:
        ConfigError: the target exists and may not be replaced.
        CheckpointError: it cannot be written.
    """
    check_target(target, overwrite=overwrite, marker=marker)
    staging = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        sync_directory(staging)
        _swap(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool, marker: str) -> None:
    """Raise ConfigError if `target` may not become the output."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{target} already exists; choose another folder or add --overwrite")
    if not (target / marker).is_file():
        raise ConfigError(
            f"{target} has no {marker} and so is nothing that --overwrite may replace"
        )


def _swap(staging: Path, target: Path) -> None:
    aside = target.parent / f".{target.name}.{os.getpid()}.replaced"
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(staging, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
