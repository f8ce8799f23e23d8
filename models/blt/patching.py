"""Patches of a batch: stored with the data, or made on the device from a frozen entropy model.

Nothing here waits for the device. A document's part in a row is patched as a document: the entropy model starts afresh
there, as the trained model does, and its first positions each start a patch. Stored patches were made by the same rule
on the same rows, so both ways agree (to the last bit where the entropy model computes alike: same device, type and
micro-batch size; elsewhere where an entropy is within rounding of the threshold).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.entropy_patching import Patches, patch_boundaries
from ..batch import NEXT_STARTS_PATCH, PackedBatch
from ..errors import ConfigError
from ..part_timer import PartTimer
from ..transformer.config import Config as TransformerConfig
from .patching_config import PatchingConfig

__all__ = [
    "PatchMaker",
    "batch_entropy",
    "boundaries",
    "entropy_architecture",
    "line_starts",
    "make_patches",
    "next_starts",
    "patcher_identity",
    "split_lines",
]

NEWLINE = 10 + 4


def make_patches(
    batch: PackedBatch,
    config: PatchingConfig,
    entropy_network: nn.Module | None,
    room: int,
    timer: PartTimer | None = None,
) -> Patches:
    """Patches of a batch on its device.

    Args:
        room: size of the padded outputs.
        timer: told how long the entropy model takes.

    Raises:
        ConfigError: the data bring no patches and there is no entropy model to make them.
    """
    stored = batch.side.get(NEXT_STARTS_PATCH)
    if config.stored:
        if stored is None:
            raise ConfigError(
                "model.patching.stored is true but the data have no stored patches; prepare them with "
                "weft data prepare --patches-from, or set model.patching.stored=false"
            )
        # The stored bits are rules, forced starts and cuts together: asked as an entropy of 0 or 1.
        return patch_boundaries(
            batch.position_ids, room, entropy=stored.float(), threshold=0.5, forced_starts=1
        )
    entropy = None
    if config.needs_entropy:
        if entropy_network is None:
            raise ConfigError(
                f"model.patching.scheme={config.scheme} needs an entropy model; set model.patching.entropy_model"
            )
        with timer.measure(batch.tokens.device) if timer else contextlib.nullcontext():
            entropy = batch_entropy(batch, entropy_network, config.newline_reset)
    return boundaries(batch.position_ids, batch.tokens, entropy, config, room)


def boundaries(
    position_ids: Tensor, tokens: Tensor, entropy: Tensor | None, config: PatchingConfig, room: int
) -> Patches:
    """`patch_boundaries` by the configured rule; what the rule does not look at may be given too."""
    return patch_boundaries(
        position_ids,
        room,
        config.scheme,
        entropy=entropy if config.needs_entropy else None,
        tokens=tokens if config.scheme == "space" else None,
        threshold=config.threshold,
        rise=config.rise,
        stride=config.stride,
        max_length=config.max_length,
        forced_starts=config.forced_starts,
    )


@torch.no_grad()
def batch_entropy(batch: PackedBatch, network: nn.Module, newline_reset: str = "off") -> Tensor:
    """(T,) fp32 nats: entropy of the prediction made at each position, about the byte after it."""
    if newline_reset != "off":
        batch = split_lines(batch, newline_reset)
    return network(batch, output="entropy")


def split_lines(batch: PackedBatch, newline_reset: str) -> PackedBatch:
    """The same positions with every line a document of its own.

    The number of lines is the device's to know: on a GPU there are as many borders as could be, and the superfluous
    ones all stand at the end.

    Args:
        newline_reset: `after`: a newline ends its line; `before`: it opens the next.
    """
    total, device = batch.tokens.shape[0], batch.tokens.device
    first = line_starts(batch.tokens, batch.position_ids, newline_reset)
    places = torch.arange(total, device=device)
    is_first = places == first
    if device.type == "cpu":
        borders = places[is_first]
    else:
        borders = torch.where(is_first, places, total).sort().values
    end = borders.new_full((1,), total)
    return replace(
        batch,
        position_ids=places - first,
        cu_seqlens=torch.cat([borders, end]).int(),
    )


def line_starts(tokens: Tensor, position_ids: Tensor, newline_reset: str) -> Tensor:
    """(T,) int64: where the line of each of (T,) ids begins; lines end with documents too."""
    is_first = tokens == NEWLINE
    if newline_reset == "after":
        is_first = is_first.roll(1)
    is_first |= position_ids == 0
    places = torch.arange(len(tokens), device=tokens.device)
    return torch.where(is_first, places, 0).cummax(0).values


def entropy_architecture(config: PatchingConfig) -> TransformerConfig:
    """What to build the frozen entropy model from.

    Lines are documents by the thousand whose number only the device knows: flex attention masks them without asking.
    """
    assert config.entropy is not None
    if config.newline_reset == "off" or not torch.cuda.is_available():
        return config.entropy
    return config.entropy.model_copy(update={"attention": "flex"})


def next_starts(batch: PackedBatch, config: PatchingConfig, network: nn.Module | None) -> Tensor:
    """(T,) bool: whether the position after each starts a patch, the last position of a row included."""
    patches = make_patches(batch, config, network, batch.tokens.shape[0] + 1)
    # A byte reads its own patch exactly where the patch ends with it.
    return patches.decoder_ids == patches.patch_ids


class PatchMaker:
    """A rule and its entropy model, as what `weft data prepare` stores patches with.

    Args:
        network: the entropy model on its device; None for rules without one.
        weights: hash of its weights.
        compute: `fp32` or `bf16`; part of the identity, because entropies differ by rounding.
    """

    def __init__(
        self,
        config: PatchingConfig,
        network: nn.Module | None = None,
        weights: str | None = None,
        compute: str = "fp32",
    ) -> None:
        # Whatever a run would read, a maker makes.
        self.config = config.model_copy(update={"stored": False})
        self.network, self.weights, self.compute = network, weights, compute
        self.identity: Mapping[str, Any] = patcher_identity(config, weights, compute)

    def with_levels(self, **levels: float) -> PatchMaker:
        """The same with other levels."""
        config = self.config.model_copy(update=levels)
        return PatchMaker(config, self.network, self.weights, self.compute)

    @property
    def device(self) -> torch.device:
        return (
            torch.device("cpu") if self.network is None else next(self.network.parameters()).device
        )

    @torch.no_grad()
    def next_starts(self, batch: PackedBatch) -> Tensor:
        """(T,) bool, on the entropy model's device."""
        with self._autocast():
            return next_starts(batch.to(self.device), self.config, self.network)

    @torch.no_grad()
    def entropy(self, batch: PackedBatch) -> Tensor:
        """(T,) fp32 nats, on the entropy model's device."""
        if self.network is None:
            raise ConfigError(f"scheme {self.config.scheme} has no entropy model")
        with self._autocast():
            return batch_entropy(batch.to(self.device), self.network, self.config.newline_reset)

    def _autocast(self) -> Any:
        is_bf16 = self.compute == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_bf16)


def patcher_identity(config: PatchingConfig, weights: str | None, compute: str) -> dict[str, Any]:
    """Equal exactly where the same rows get the same patches."""
    identity = config.identity()
    if config.needs_entropy:
        identity |= {"weights": weights, "compute": compute}
    return identity
