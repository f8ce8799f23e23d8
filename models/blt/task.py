"""BLT as a task: next-byte loss over patches that the data bring or a frozen entropy model makes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..batch import PackedBatch
from ..errors import TrainingError
from ..part_timer import PartTimer
from ..task import BaseWeights, InitSpec, LossOutput, LossTerm, ParameterGroup, Task
from ..transformer.model import Transformer
from .config import Config
from .generation import BLTGenerator
from .network import BLT
from .patching import entropy_architecture, make_patches
from .shapes import parameter_shapes

__all__ = ["BLTTask", "build_task"]

TABLES = "model/embedding.ngrams.weight"
LATENT = "model/latent.blocks."
CUT = 3.0


class BLTTask(Task):
    """Networks: `model`, and `entropy` (frozen) where patches are made on the fly and the scheme needs it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._shapes = parameter_shapes(config)
        self._timer = PartTimer()

    @property
    def has_entropy_network(self) -> bool:
        return self.config.patching.needs_entropy and not self.config.patching.stored

    def build_networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"model": BLT(self.config)}
        if self.has_entropy_network:
            networks["entropy"] = Transformer(entropy_architecture(self.config.patching))
        return networks

    def init_spec(self, name: str) -> InitSpec:
        """Standard deviations as in the released code: (model width)^-0.5, for what leaves an MLP (hidden width)^-0.5."""
        network, _, own = name.partition("/")
        if name.endswith("norm.weight"):
            return InitSpec("constant", value=1.0)
        if network == "entropy":
            return InitSpec("constant")
        if name == TABLES:
            return InitSpec(std=self.config.ngram_init_std(), cut=CUT)
        rows, columns = self._shapes[own]
        width = rows if own.endswith("o_proj.weight") else columns
        return InitSpec(std=width**-0.5, cut=CUT)

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        groups: dict[str, list[str]] = {"local": [], "latent": [], "ngrams": [], "entropy": []}
        for network, module in networks.items():
            for own, _ in module.named_parameters():
                groups[self._group_of(f"{network}/{own}")].append(f"{network}/{own}")
        local, latent, ngrams, entropy = (tuple(names) for names in groups.values())
        found = [
            ParameterGroup("local", local),
            ParameterGroup("latent", latent, lr_scale=self.config.latent.lr_scale),
            ParameterGroup("ngrams", ngrams, algorithm="row_sparse_adam", weight_decay=False),
            ParameterGroup("entropy", entropy, algorithm="frozen", weight_decay=False),
        ]
        return [group for group in found if group.parameters]

    def _group_of(self, name: str) -> str:
        if name.startswith("entropy/"):
            return "entropy"
        if name == TABLES:
            return "ngrams"
        return "latent" if name.startswith(LATENT) else "local"

    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        model = networks["model"]
        assert isinstance(model, BLT)
        found: list[nn.Module] = []
        if "entropy" in networks:
            found.extend(networks["entropy"].blocks)  # type: ignore[arg-type]
        found.extend([*model.encoder.blocks, *model.encoder.cross, *model.latent.blocks])
        for place, block in enumerate(model.decoder.blocks):
            found.extend([*model.decoder.cross[place : place + 1], block])
        return found

    def base_weights(self, networks: Mapping[str, nn.Module]) -> list[BaseWeights]:
        found = []
        if "entropy" in networks:
            assert self.config.patching.entropy_model is not None
            names = [name for name, _ in networks["entropy"].named_parameters()]
            parameters = {f"entropy/{name}": f"model/{name}" for name in names}
            source, key = self.config.patching.entropy_model, "model.patching.entropy_model"
            found.append(BaseWeights(source, parameters, stays_there=True, key=key))
        if self.config.latent.start_from is not None:
            names = [n for n in self._shapes if f"model/{n}".startswith(LATENT)]
            parameters = {f"model/{n}": f"model/{n.removeprefix('latent.')}" for n in names}
            source, key = self.config.latent.start_from, "model.latent.start_from"
            found.append(BaseWeights(source, parameters, stays_there=False, key=key))
        return found

    def network_for_generation(self, networks: Mapping[str, nn.Module]) -> nn.Module:
        model, entropy = networks["model"], networks.get("entropy")
        assert isinstance(model, BLT)
        assert entropy is None or isinstance(entropy, Transformer)
        return BLTGenerator(model, entropy)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {"tokens": batch.target_count, "positions": len(batch.tokens)}

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        patching = self.config.patching
        room = patching.room(len(batch.tokens), batch.row_length)
        # Evaluation is no part of a step.
        timer = self._timer if torch.is_grad_enabled() else None
        patches = make_patches(batch, patching, networks.get("entropy"), room, timer)
        sums = networks["model"](batch, patches)
        return LossOutput(
            {"cross_entropy": LossTerm(sums["cross_entropy"], "tokens")},
            {
                "patches": LossTerm(patches.count + patches.overflow, "positions"),
                "patch_overflow": LossTerm(patches.overflow, "positions"),
            },
        )

    def review(self, record: Mapping[str, float], positions: int) -> dict[str, float]:
        """The step's mean patch size, and how many patches found no room.

        Raises:
            TrainingError: some did not, and `patching.overflow` is `error`.
        """
        if "patches" not in record:
            return {}
        per_position = record["patches"]
        lost = round(record["patch_overflow"] * positions)
        if lost and self.config.patching.overflow == "error":
            have = round(per_position * positions)
            raise TrainingError(
                f"step {int(record['step'])}: there is room for {have - lost} of its {have} patches; raise "
                "model.patching.max_patches (or the threshold, for longer patches), or set model.patching.overflow=merge"
            )
        return {
            "patch_size": 1 / per_position,
            "patches": per_position * positions,
            "patch_overflow": lost,
        }

    def part_seconds(self) -> dict[str, float]:
        return {"entropy_model": self._timer.take()} if self.has_entropy_network else {}

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def build_task(config: Config) -> BLTTask:
    return BLTTask(config)
