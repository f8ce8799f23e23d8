"""Weights that other runs supply: loaded when a run is opened, and known again by their hash when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..models.errors import CheckpointError, ConfigError
from ..models.task import BaseWeights, Task
from .checkpoint.layout import Manifest
from .checkpoint.manager import CheckpointManager
from .checkpoint.reading import find_checkpoint, read_manifest
from .engines.protocol import Engine

__all__ = ["load_base_weights", "weights_digest"]


def weights_digest(manifest: Manifest, names: Mapping[str, str] | None = None) -> str:
    """What a checkpoint's parameters are known by: names, shapes and the checksums of their chunks.

    Args:
        names: only these parameters, by the values' names; all of them by default.
    """
    wanted = None if names is None else set(names.values())
    parts = [
        [name, list(stored.shape), stored.dtype, [chunk.sha256 for chunk in stored.chunks]]
        for name, stored in sorted(manifest.tensors.items())
        if name.startswith("parameters/")
        and (wanted is None or name.removeprefix("parameters/") in wanted)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_base_weights(
    task: Task,
    engine: Engine,
    checkpoints: CheckpointManager,
    *,
    is_new: bool,
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Collective: fill the parameters that other runs supply.

    Args:
        is_new: whether the run has no checkpoint of its own yet, so that what it only starts from is loaded too.
        known: hashes that the run's checkpoint names, by configuration key.

    Returns:
        Hashes of what stays in other runs, by configuration key.

    Raises:
        CheckpointError: there is no sound checkpoint, or it lacks a parameter.
        ConfigError: it is not the one the run was trained with.
    """
    found: dict[str, str] = {}
    for base in task.base_weights(engine.networks):
        if base.stays_there or is_new:
            digest = _load(base, engine, checkpoints)
            if base.stays_there:
                found[base.key] = digest
    for key, digest in found.items():
        expected = (known or {}).get(key, digest)
        if digest != expected:
            raise ConfigError(
                f"{key} holds other weights ({digest[:12]}) than this run was trained with ({expected[:12]}); point it to those"
            )
    return found


def _load(base: BaseWeights, engine: Engine, checkpoints: CheckpointManager) -> str:
    topology = checkpoints.topology
    path = find_checkpoint(Path(base.source)) if topology.is_main else None
    name = topology.broadcast_json(str(path) if path else None)
    if name is None:
        is_foreign = (Path(base.source) / "config.json").is_file()
        hint = f"; import it first: weft convert import {base.source} RUN" if is_foreign else ""
        raise CheckpointError(f"{base.key}: {base.source} holds no complete checkpoint{hint}")
    shards = {shard.name: shard for shard in (*engine.state_shards(), *engine.base_shards())}
    theirs = [
        replace(shards[f"parameters/{ours}"], name=f"parameters/{source}")
        for ours, source in base.parameters.items()
    ]
    # An engine may hold what is frozen in the type it computes in.
    checkpoints.load(Path(name), theirs, cast=True)
    engine.after_load()
    return weights_digest(read_manifest(Path(name)), base.parameters)
