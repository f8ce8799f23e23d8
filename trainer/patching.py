"""Patches as a run meets them: the entropy model it names, the level its own data ask for, and what its data bring.

A level that is left open (`model.patching.patch_size` without a threshold) is found once, on rows the run will train
on, before its first step; the answer goes into the run's config.yaml, so a resume never looks again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..models.batch import NEXT_STARTS_PATCH, PackedBatch
from ..models.blt.patch_level import find_level, sample_patches
from ..models.blt.patching import PatchMaker, entropy_architecture, patcher_identity
from ..models.blt.patching_config import PatchingConfig
from ..models.errors import CheckpointError, ConfigError, DataError, WeftError
from ..models.transformer.model import Transformer
from .base_weights import weights_digest
from .checkpoint.reading import find_checkpoint, read_manifest, read_tensor
from .configuration.schema import TrainingConfig
from .data.dataset import Dataset
from .data.loader import PackedLoader
from .data.patches import PatchJob, patcher_changes
from .distributed import Topology

__all__ = [
    "check_data_patches",
    "entropy_weights",
    "fit_level",
    "open_patch_maker",
    "patch_job",
    "patching_of",
    "sample_batches",
    "settle_patching",
]

log = logging.getLogger("weft")

SAMPLE_TOKENS = {"cpu": 1 << 18, "cuda": 1 << 22}
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}
SMALLEST = 1.05
"""Mean bytes a patch, below which it is not worth asking for."""
TOLERANCE = 0.2
"""Of a wanted patch size; further off is another model than the one that was asked for."""


def patching_of(config: TrainingConfig) -> PatchingConfig | None:
    """The patching of the model, None for models without patches."""
    found = getattr(config.model, "patching", None)
    return found if isinstance(found, PatchingConfig) else None


def entropy_weights(source: str, key: str = "model.patching.entropy_model") -> tuple[Path, str]:
    """The checkpoint an entropy model is taken from, and the hash of its weights.

    Raises:
        CheckpointError: there is none.
    """
    path = find_checkpoint(Path(source))
    if path is None:
        raise CheckpointError(
            f"{key}: {source} holds no complete checkpoint; train an entropy model first, such as "
            f"weft train blt/entropy-debug run.dir={source}"
        )
    return path, weights_digest(read_manifest(path))


def open_patch_maker(
    config: PatchingConfig, device: torch.device | str = "cpu", compute: str = "fp32"
) -> PatchMaker:
    """A rule with its entropy model's weights on a device.

    Raises:
        CheckpointError: no weights, or not those of the architecture.
    """
    if not config.needs_entropy:
        return PatchMaker(config)
    assert config.entropy_model is not None
    path, digest = entropy_weights(config.entropy_model)
    with torch.device("meta"):
        network = Transformer(entropy_architecture(config))
    network.to_empty(device=device)
    for name, parameter in network.named_parameters():
        stored = read_tensor(path, f"parameters/model/{name}")
        if stored.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: model/{name} has shape {tuple(stored.shape)}, but model.patching.entropy asks for {tuple(parameter.shape)}"
            )
        parameter.data.copy_(stored)
    return PatchMaker(config, network.eval().requires_grad_(False), digest, compute)


def sample_batches(
    data: Dataset, seed: int, device: str, tokens: int | None = None
) -> Iterator[PackedBatch]:
    """Rows from the beginning of a run's order, each at most once."""
    length = data.sequence_length
    there = sum(source.sequences for source in data.sources)
    rows = max(1, min(there, (tokens or SAMPLE_TOKENS[device]) // length))
    at_once = min(rows, max(1, BATCH_TOKENS[device] // length))
    with PackedLoader(data, seed=seed, batch_rows=at_once, prefetch=2) as loader:
        for _ in range(rows // at_once):
            yield from loader.next_step().micro_batches


def settle_patching(
    config: TrainingConfig, data: Dataset, topology: Topology, *, is_new: bool = True
) -> TrainingConfig:
    """Collective: find the level that is left open, and see that the wanted patch size is what the data give.

    Args:
        is_new: the run starts; one that goes on was looked at then.

    Raises:
        ConfigError: the mean is off by more than 20 %.
        CheckpointError: no entropy model.
    """
    patching = patching_of(config)
    if patching is None or patching.patch_size is None:
        return config
    if not is_new and patching.open_level is None:
        return config
    answer: dict[str, Any] = {}
    if topology.is_main:
        try:
            answer = _measure(config, patching, data, topology.device)
        except WeftError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
    answer = topology.broadcast_json(answer)
    if "error" in answer:
        raise (CheckpointError if answer["kind"] == "CheckpointError" else ConfigError)(
            answer["error"]
        )
    if answer["level"] is None:
        return config
    settled = patching.model_copy(update={str(patching.open_level): answer["level"]})
    model = config.model.model_copy(update={"patching": settled})
    return config.model_copy(update={"model": model})


def _measure(
    config: TrainingConfig, patching: PatchingConfig, data: Dataset, device: torch.device
) -> dict[str, Any]:
    name, wanted = patching.open_level, patching.patch_size
    assert wanted is not None
    batches = sample_batches(data, config.run.seed, device.type)
    level: float | None = None
    if patching.stored:
        found, level = _stored_size(batches), _stored_level(data, name)
    else:
        maker = open_patch_maker(patching, device, config.precision.compute)
        settled, found = fit_level(maker, batches)
        if name is not None:
            level = getattr(settled.config, name)
            log.info("model.patching.%s=%.4f for %g bytes a patch", name, level, wanted)
    _check_size(patching, found)
    return {"level": level, "mean": found}


def fit_level(maker: PatchMaker, batches: Iterable[PackedBatch]) -> tuple[PatchMaker, float]:
    """The maker with its open level found on a sample, and the mean patch size it has there."""
    config, sample = maker.config, sample_patches(maker, batches)
    if config.open_level is not None:
        assert config.patch_size is not None
        level = find_level(sample, config, config.open_level, config.patch_size)
        maker = maker.with_levels(**{config.open_level: level})
    return maker, sample.mean_size(maker.config)


def patch_job(
    config: PatchingConfig, sequence_length: int, device: str = "cpu", compute: str = "fp32"
) -> PatchJob:
    """What `prepare_source` needs to store patches; the weights are loaded here.

    Raises:
        CheckpointError: no entropy model.
    """
    maker = open_patch_maker(config, device, compute)

    def settle(batches: Iterator[PackedBatch]) -> PatchMaker:
        if config.patch_size is None:
            return maker
        settled, found = fit_level(maker, batches)
        _check_size(config, found)
        return settled

    request = {**maker.identity, "patch_size": config.patch_size}
    return PatchJob(request, settle, sequence_length, BATCH_TOKENS[device], SAMPLE_TOKENS[device])


def _check_size(config: PatchingConfig, found: float) -> None:
    wanted = config.patch_size
    if wanted is not None and abs(found / wanted - 1) > TOLERANCE:
        raise ConfigError(_off(config, found, wanted))


def _off(patching: PatchingConfig, found: float, wanted: float) -> str:
    given = next((n for n in ("threshold", "rise") if getattr(patching, n) is not None), None)
    mends = [f"model.patching.patch_size={found:.2f}"] if found >= SMALLEST else []
    if patching.needs_entropy and given and not patching.stored:
        mends.insert(0, f"model.patching.{given}=null to have it found")
    mend = f"set {', or '.join(mends)}" if mends else "choose another rule"
    return f"model.patching.patch_size: the data give {found:.2f} bytes a patch, more than 20 % off the {wanted:g} wanted; {mend}"


def _stored_size(batches: Iterator[PackedBatch]) -> float:
    positions = patches = 0
    for batch in batches:
        stored = batch.side[NEXT_STARTS_PATCH]
        is_start = (batch.position_ids == 0) | stored.roll(1)
        positions, patches = positions + len(is_start), patches + int(is_start.sum())
    return positions / patches


def _stored_level(data: Dataset, name: str | None) -> float | None:
    stored = data.patches
    return None if name is None or stored is None else stored.get(name)


def check_data_patches(config: TrainingConfig, data: Dataset, topology: Topology) -> None:
    """Collective: see that patches stored with the data are those of the run's own patcher.

    Raises:
        DataError: they are not, or there are none where the run needs them.
        CheckpointError: no entropy model.
    """
    patching = patching_of(config)
    if patching is None:
        return
    stored = data.patches
    if stored is None:
        if patching.stored:
            raise DataError(
                "model.patching.stored is true but the data have no stored patches; prepare them with "
                f"weft data prepare SOURCE --out DIR --patches-from {patching.entropy_model or 'RECIPE'}, or set model.patching.stored=false"
            )
        return
    weights = None
    if patching.needs_entropy:
        assert patching.entropy_model is not None
        answer: dict[str, Any] = {}
        if topology.is_main:
            try:
                answer = {"weights": entropy_weights(patching.entropy_model)[1]}
            except WeftError as error:
                answer = {"error": str(error)}
        answer = topology.broadcast_json(answer)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        weights = answer["weights"]
    # Neither says which patches: one is checked with the rows, the other only rounds.
    wanted = {
        **patcher_identity(patching, weights, stored.get("compute", "fp32")),
        "sequence_length": data.sequence_length,
    }
    if changes := patcher_changes(stored, wanted):
        raise DataError(
            f"the data's stored patches are another patcher's ({'; '.join(changes)}); prepare them again with this one, "
            "or set model.patching to theirs"
        )
    if not patching.stored and topology.is_main:
        log.info(
            "the data bring these very patches: model.patching.stored=true spares the entropy model"
        )
