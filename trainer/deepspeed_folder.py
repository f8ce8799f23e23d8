"""DeepSpeed's checkpoint folders, read without DeepSpeed: its own ZeRO layout (stages 1, 2, 3) and the universal one.

    FOLDER/latest, FOLDER/latest_universal                  one line: the TAG
    FOLDER/TAG/*_model_states.pt                            shapes, counters, the module in its compute type
    FOLDER/TAG/*zero_pp_rank_R_mp_rank_00_optim_states.pt   what rank R held: flat fp32 weights and moments
    FOLDER/TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt  universal: whole tensors

All of these are pickles. They are mapped and read with torch's restricted reader, in which every class that a file names is one
of ours that does nothing, so no code of a file is run. A tensor is put together from the ranks' pieces when it is asked for.
Source of the layouts: deepspeed/checkpoint/ds_to_universal.py and deepspeed/utils/zero_to_fp32.py of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.errors import CheckpointError, ConfigError

__all__ = ["MOMENTS", "DeepSpeedCheckpoint", "open_deepspeed", "read_pickled"]

MOMENTS = ("exp_avg", "exp_avg_sq")
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_")


class _Inert:
    """Stands where a file has an object of a class we do not need: it takes anything and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Nothing is kept."""


class _Fragment:
    """`deepspeed.utils.tensor_fragment.fragment_address`: `numel` elements from `start` of a flat tensor."""

    numel: int
    start: int


_STAND_INS: dict[str, Any] = {
    "deepspeed.utils.tensor_fragment.fragment_address": _Fragment,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}


def read_pickled(file: Path) -> Any:
    """What torch.save wrote, mapped; foreign classes and functions are replaced by one that does nothing.

    Raises:
        CheckpointError: the file is missing, damaged, or cannot be read in this way.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing; copy the checkpoint again, with all ranks' files"
        )
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} is truncated, or older than the zip format of torch 1.6; copy it again, or save it again with a newer torch"
        )
    foreign: list[str] = []
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(_STAND_INS.get(n, _Inert), n) for n in foreign]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:
        named = f" (it names {', '.join(sorted(foreign))})" if foreign else ""
        raise CheckpointError(
            f"{file} cannot be read without running what is in it{named}; save it again without such objects in its client state"
        ) from error
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} is damaged ({reason}); copy it again") from error


class DeepSpeedCheckpoint(ABC):
    """One checkpoint of DeepSpeed, in either layout.

    Attributes:
        folder: the folder of the tag.
        layout: for people: `ZeRO 2 on 4 ranks`, `universal`.
        names: of all parameters, as the model named them.
        global_steps: steps of the run that wrote it; 0 where it does not say.
    """

    folder: Path
    layout: str
    names: tuple[str, ...]
    global_steps: int

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter; flat where the layout does not say."""

    @abstractmethod
    def is_trained(self, name: str) -> bool:
        """Whether there are moments of it."""

    @abstractmethod
    def read(self, kind: str, name: str) -> Tensor:
        """Flat fp32 values of `fp32`, `exp_avg` or `exp_avg_sq`.

        Raises:
            CheckpointError: pieces are missing.
        """

    @abstractmethod
    def updates(self, name: str) -> int:
        """How often the optimizer has updated a trained parameter."""

    @abstractmethod
    def learning_rate(self) -> float | None:
        """Of the update that would have come next, in the first group; None where it does not say."""


def open_deepspeed(folder: Path, tag: str | None = None) -> DeepSpeedCheckpoint:
    """The checkpoint in a folder that save_checkpoint or ds_to_universal wrote, or in the folder of one tag.

    Args:
        tag: which one; default the one `latest` names, else `latest_universal`.

    Raises:
        ConfigError: there is none there, or it is of a kind that cannot be read.
        CheckpointError: files are missing or damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give the one save_checkpoint wrote to")
    place = _find_tag(folder, tag)
    if (place / "zero").is_dir():
        return _Universal(place)
    _refuse_model_parallel(place)
    return _Partitioned(place)


def _find_tag(folder: Path, tag: str | None) -> Path:
    if tag is None:
        if (folder / "zero").is_dir() or any(folder.glob("*_optim_states.pt")):
            return folder
        pointer = next(
            (p for p in (folder / "latest", folder / "latest_universal") if p.is_file()), None
        )
        if pointer is None:
            raise ConfigError(
                f"{folder} is no DeepSpeed checkpoint: it has neither latest nor *_optim_states.pt; give the folder save_checkpoint wrote to"
            )
        tag = pointer.read_text(encoding="utf-8", errors="replace").strip()
    # A pointer is input: it must not lead out of its folder.
    if os.path.basename(tag) != tag or tag in ("", ".", ".."):
        raise ConfigError(f"{tag!r} is not the name of a tag in {folder}")
    place = folder / tag
    if not place.is_dir():
        tags = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ConfigError(f"{folder} has no tag {tag}; it has {', '.join(tags) or 'none'}")
    if not (place / "zero").is_dir() and not any(place.glob("*_optim_states.pt")):
        raise ConfigError(
            f"{place} has no *_optim_states.pt: it was not written by ZeRO 1, 2 or 3; save the model as safetensors and use weft convert import"
        )
    return place


def _refuse_model_parallel(place: Path) -> None:
    """Only data parallel checkpoints are put together here; DeepSpeed itself does the rest."""
    files = [path.name for path in place.glob("*.pt")]
    kinds = {
        "experts": any("expert" in name or name.startswith("expp_rank_") for name in files),
        "pipeline stages": any(name.startswith("layer_") for name in files),
        "tensor parallel ranks": any(re.search(r"mp_rank_0*[1-9]", name) for name in files),
    }
    found = [kind for kind, is_there in kinds.items() if is_there]
    if found:
        raise ConfigError(
            f"{place} is split into {' and '.join(found)}; make it universal first: python -m deepspeed.checkpoint.ds_to_universal"
        )


@dataclass(frozen=True)
class _Piece:
    """`count` elements from `offset` of what one rank holds of one group."""

    rank: int
    group: int
    offset: int
    count: int


class _Partitioned(DeepSpeedCheckpoint):
    """DeepSpeed's own layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        if not files:
            raise CheckpointError(
                f"{folder} has no zero_pp_rank_*_optim_states.pt; copy the checkpoint again"
            )
        self._ranks = [_entry(read_pickled(f), "optimizer_state_dict", f) for f in files]
        first = self._ranks[0]
        self._stage = int(first.get("zero_stage", 1))
        self.layout = f"ZeRO {self._stage} on {len(self._ranks)} ranks"
        self._check_ranks(first.get("partition_count"))
        self._models = self._open_models()
        model = self._models[0]
        self.global_steps = int(model.get("global_steps") or 0)
        self._shapes = {
            name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()
        }
        self._group_of = {n: g for g, group in enumerate(model["param_shapes"]) for n in group}
        self._pieces = self._cut(model["param_shapes"])
        self._frozen = self._find_frozen(model)
        self.names = (*self._pieces, *self._frozen)

    def _check_ranks(self, count: Any) -> None:
        expected = max(count) if isinstance(count, list) else count
        if expected is not None and expected != len(self._ranks):
            raise CheckpointError(
                f"{self.folder} has the *_optim_states.pt of {len(self._ranks)} ranks and was written by {expected}; copy the others too"
            )

    def _open_models(self) -> list[Mapping[str, Any]]:
        pattern = "zero_pp_rank_*_model_states.pt" if self._stage == 3 else "mp_rank_00_model_*.pt"
        files = sorted(self.folder.glob(pattern), key=_rank_of)
        wanted = len(self._ranks) if self._stage == 3 else 1
        if len(files) != wanted:
            raise CheckpointError(
                f"{self.folder} has {len(files)} *_model_states.pt instead of {wanted}; copy the checkpoint again"
            )
        models = [read_pickled(file) for file in files]
        for model, file in zip(models, files, strict=True):
            _entry(model, "param_shapes", file)
        return models

    def _cut(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, list[_Piece]]:
        pieces: dict[str, list[_Piece]] = {name: [] for group in groups for name in group}
        for rank, state in enumerate(self._ranks):
            for name, piece in (
                self._cut_evenly(rank, groups) if self._stage == 3 else _cut_mapped(rank, state)
            ):
                if name not in pieces:
                    raise CheckpointError(f"{self.folder}: {name} has no entry in param_shapes")
                pieces[name].append(piece)
        return pieces

    def _cut_evenly(
        self, rank: int, groups: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, _Piece]]:
        """Stage 3: each parameter in equal parts, the last ones padded."""
        for group, shapes in enumerate(groups):
            offset = 0
            for name, shape in shapes.items():
                total = torch.Size(shape).numel()
                part = -(-total // len(self._ranks))
                count = max(0, min(part, total - rank * part))
                yield name, _Piece(rank, group, offset, count)
                offset += part

    def _find_frozen(self, model: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """What the optimizer does not have: the model's own values, in the ranks' parts."""
        if self._stage == 3:
            shapes = model.get("frozen_param_shapes") or {}
            self._shapes |= {name: tuple(shape) for name, shape in shapes.items()}
            parts = [rank.get("frozen_param_fragments") or {} for rank in self._models]
            return {name: [p[name] for p in parts if name in p] for name in shapes}
        left_out = {*self._pieces, *model.get("buffer_names", ()), *model.get("shared_params", ())}
        module = model.get("module") or {}
        found = {name: [tensor] for name, tensor in module.items() if name not in left_out}
        self._shapes |= {name: tuple(parts[0].shape) for name, parts in found.items()}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def is_trained(self, name: str) -> bool:
        return name in self._pieces and set(MOMENTS) <= self._state(0, self._group_of[name]).keys()

    def read(self, kind: str, name: str) -> Tensor:
        total = torch.Size(self._shapes[name]).numel()
        if name in self._frozen:
            parts = [part.reshape(-1).float() for part in self._frozen[name]]
            if sum(part.numel() for part in parts) < total:
                raise CheckpointError(f"{self.folder}: parts of {name} are missing")
            return torch.cat(parts)[:total]
        pieces = self._pieces[name]
        if sum(piece.count for piece in pieces) != total:
            raise CheckpointError(
                f"{self.folder}: the ranks hold {sum(p.count for p in pieces)} of {total} elements of {name}"
            )
        return torch.cat([self._part(kind, name, piece) for piece in pieces])

    def _part(self, kind: str, name: str, piece: _Piece) -> Tensor:
        flat = self._flat(kind, piece)
        if not isinstance(flat, Tensor) or flat.numel() < piece.offset + piece.count:
            raise CheckpointError(
                f"{self.folder}: rank {piece.rank} has too little of {kind} of {name}; copy the checkpoint again"
            )
        return flat.detach().reshape(-1)[piece.offset : piece.offset + piece.count].float()

    def _flat(self, kind: str, piece: _Piece) -> Any:
        if kind != "fp32":
            return self._state(piece.rank, piece.group).get(kind)
        key = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
        groups = self._ranks[piece.rank].get(key, ())
        return groups[piece.group] if piece.group < len(groups) else None

    def _base(self, rank: int) -> Any:
        return self._ranks[rank].get(
            "optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"
        )

    def _state(self, rank: int, group: int) -> dict[str, Any]:
        """The optimizer's entries for one group; `elastic` checkpoints have a list instead of torch's dictionary."""
        base = self._base(rank)
        states = base.get("state", {}) if isinstance(base, dict) else dict(enumerate(base or ()))
        return states.get(group, {})

    def _settings(self) -> list[dict[str, Any]]:
        base = self._base(0)
        return base.get("param_groups", []) if isinstance(base, dict) else []

    def learning_rate(self) -> float | None:
        return _rate(self._settings())

    def updates(self, name: str) -> int:
        group, settings = self._group_of[name], self._settings()
        places = (
            self._state(0, group),
            settings[group] if self._stage != 3 and group < len(settings) else {},
        )
        counts = [int(place["step"]) for place in places if "step" in place]
        counts += [int(self._ranks[0].get("base_optimizer_state_step", self.global_steps))]
        return counts[0]


def _rate(settings: Sequence[Mapping[str, Any]]) -> float | None:
    rate = settings[0].get("lr") if settings else None
    return None if rate is None else float(rate)


def _cut_mapped(rank: int, state: Mapping[str, Any]) -> Iterator[tuple[str, _Piece]]:
    """Stages 1 and 2, whose partitions cut anywhere, say where each parameter's part is."""
    if "param_slice_mappings" not in state:
        raise ConfigError(
            "the checkpoint has no param_slice_mappings: its DeepSpeed is too old; load it with a newer one and save it again"
        )
    for group, parts in enumerate(state["param_slice_mappings"]):
        for name, part in parts.items():
            yield name, _Piece(rank, group, part.start, part.numel)


def _rank_of(file: Path) -> int:
    found = _RANK.search(file.name)
    return int(found.group(1)) if found else 0


def _entry(value: Any, key: str, file: Path) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise CheckpointError(f"{file} has no {key}; is it a file that DeepSpeed wrote?")
    return value[key]


class _Universal(DeepSpeedCheckpoint):
    """The universal layout: a folder for each parameter, whole tensors."""

    layout = "universal"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(sorted(file.parent.name for file in folder.glob("zero/*/fp32.pt")))
        if not self.names:
            raise CheckpointError(f"{folder / 'zero'} has no NAME/fp32.pt; convert it again")
        models = sorted(folder.glob("*_model_states.pt"), key=_rank_of)
        steps = read_pickled(models[0]).get("global_steps") if models else 0
        self.global_steps = int(steps or 0)

    def _tensor(self, kind: str, name: str) -> Tensor:
        """Stages 1 and 2 are converted into dictionaries, stage 3 into bare flat tensors."""
        file = self.folder / "zero" / name / f"{kind}.pt"
        value = read_pickled(file)
        value = value.get("param") if isinstance(value, dict) else value
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file} holds no tensor; convert the checkpoint again")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor("fp32", name).shape)

    def is_trained(self, name: str) -> bool:
        return all((self.folder / "zero" / name / f"{kind}.pt").is_file() for kind in MOMENTS)

    def read(self, kind: str, name: str) -> Tensor:
        return self._tensor(kind, name).reshape(-1).float()

    def updates(self, name: str) -> int:
        file = self.folder / "zero" / name / "step.pt"
        return int(read_pickled(file)) if file.is_file() else self._common_updates()

    def learning_rate(self) -> float | None:
        return _rate(self._shared.get("param_groups", ()))

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        """What belongs to no parameter."""
        state = read_pickled(self.folder / "zero" / "optimizer_state.pt")
        return state if isinstance(state, dict) else {}

    def _common_updates(self) -> int:
        """Of a checkpoint that has one count for all."""
        states = self._shared.get("optimizer_state_dict", {}).get("state", {})
        counts = [int(state["step"]) for state in states.values() if "step" in state]
        return (*counts, int(self._shared.get("base_optimizer_state_step", self.global_steps)))[0]
