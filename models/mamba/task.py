"""Mamba as a task: next-token loss on packed ids, of one modality or of several in one vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ..batch import IMAGES, PackedBatch, positions_of
from ..multimodal.task import MultimodalTask
from ..task import BaseWeights, InitSpec, ParameterGroup, RowGroup
from .backbone import SSM, Backbone
from .config import Config
from .model import Mamba
from .sequence_parallel import SequenceGroup, cut_batch, even_lengths

__all__ = ["MambaTask", "build_task"]

EMBEDDING = "embedding.tokens.weight"
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


class MambaTask(MultimodalTask):
    """One network, `model`. Decay is on the projections, the stem and the head alone, by name: A_log has two dimensions too."""

    config: Config

    def build_backbone(self) -> Backbone:
        return Backbone(self.config)

    def build_model(self) -> Mamba:
        return Mamba(self.config)

    def backbone_init(self, name: str) -> InitSpec:
        """As in Mamba's released code; each modality's weights are drawn by themselves.

        Source: arXiv 2312.00752, section 3.6 and appendix E.5: step sizes log-uniform, A = -(1 .. N).
        """
        c = self.config
        parts = name.split(".")
        kind = parts[3] if parts[:2] == ["backbone", "blocks"] else parts[0]
        if "norm" in parts or parts[-1] == "D":
            return InitSpec("constant", value=1.0)
        if parts[-1] == "A_log":
            return InitSpec("log_counting", period=c.d_state)
        if "dt_bias" in parts:
            return InitSpec(
                "softplus_inverse_log_uniform", low=c.dt_min, high=c.dt_max, floor=c.dt_floor
            )
        if kind == "embedding":
            return InitSpec("normal", std=c.init_std)
        inputs = {
            "in_proj": c.d_model,
            "x_proj": c.d_inner,
            "dt_proj": c.rank,
            "out_proj": c.d_inner,
            "conv1d": c.d_conv,
            "head": c.d_model,
        }
        std = inputs[kind] ** -0.5
        if kind == "out_proj" and c.rescale_out:
            std /= math.sqrt(c.n_blocks)
        return InitSpec("uniform", std=std)

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        """Split by decay, and by what a step must have for them to be updated: positions of their modality, or images."""
        members: dict[tuple[str, bool], list[str]] = {}
        for name, _ in networks["model"].named_parameters():
            key = (self._owner(name), self._decays(name))
            members.setdefault(key, []).append(f"model/{name}")
        return [
            ParameterGroup(
                "_".join(part for part in ("decay" if decays else "no_decay", owner) if part),
                tuple(names),
                weight_decay=decays,
                needs=IMAGES if owner == "stem" else positions_of(owner) if owner else None,
            )
            for (owner, decays), names in members.items()
        ]

    def _owner(self, name: str) -> str:
        """The modality whose own a parameter is, `stem`, or nothing for what all share."""
        if name.startswith("stem."):
            return "stem"
        last = name.rpartition(".")[2]
        return last if last in self.config.modalities else ""

    def _decays(self, name: str) -> bool:
        if name == EMBEDDING:
            return self.config.decay_embedding or self.config.tie_embeddings
        parts = name.split(".")
        if parts[0] == "stem":
            return parts[-1] == "weight" and not any("norm" in part for part in parts)
        return parts[0] == "head" or any(part in PROJECTIONS for part in parts)

    def wide_modules(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        return [m for m in networks["model"].modules() if isinstance(m, SSM)]

    def cut_rows(
        self, batch: PackedBatch, networks: Mapping[str, nn.Module], group: RowGroup
    ) -> PackedBatch:
        lengths = even_lengths(batch.row_length, group.ranks)
        self._backbone(networks).sequence_group = SequenceGroup(lengths, group.group)
        return cut_batch(batch, lengths, group.place, self.config.modalities)

    def whole_rows(self, networks: Mapping[str, nn.Module]) -> None:
        self._backbone(networks).sequence_group = None

    def _backbone(self, networks: Mapping[str, nn.Module]) -> Backbone:
        model = networks["model"]
        assert isinstance(model, Mamba)
        return model.backbone  # type: ignore[return-value]

    def base_weights(self, networks: Mapping[str, nn.Module]) -> list[BaseWeights]:
        """The dense run that every modality starts from, where one is named."""
        source = self.config.upcycle_from
        if source is None:
            return []
        names = [name for name, _ in networks["model"].named_parameters()]
        parameters = {f"model/{name}": f"model/{self._dense_name(name)}" for name in names}
        return [BaseWeights(source, parameters, stays_there=False, key="model.upcycle_from")]

    def _dense_name(self, name: str) -> str:
        own, _, last = name.rpartition(".")
        return own if last in self.config.modalities else name

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def build_task(config: Config) -> MambaTask:
    return MambaTask(config)
