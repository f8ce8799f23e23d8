"""Mixture-of-Transformers and LMFusion as a task: groups by modality, and weights that a base supplies."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..batch import IMAGES, positions_of
from ..multimodal.generation import GenerativeModel
from ..multimodal.task import MultimodalTask
from ..task import BaseWeights, InitSpec, ParameterGroup
from .backbone import RoutedTransformer
from .config import Config

__all__ = ["MixtureOfTransformersTask", "build_task"]

EMBEDDING = "embedding.tokens.weight"
SPECIAL = "embedding.special"
STEM = "stem."
BACKBONE = "backbone."
KEY = "model.base.source"


class MixtureOfTransformersTask(MultimodalTask):
    """See `MultimodalTask`. Groups: `embedding` and `special` (no decay), `shared`, one for each modality, and `stem`; what is a
    base's is the group `base`.
    """

    config: Config

    def build_backbone(self) -> RoutedTransformer:
        return RoutedTransformer(self.config)

    def build_model(self) -> GenerativeModel:
        return GenerativeModel(self.config, self.build_backbone())

    def backbone_init(self, name: str) -> InitSpec:
        if "norm.weight" in name:
            return InitSpec("constant", value=1.0)
        return InitSpec("trunc_normal", std=self.config.init_std, cut=self.config.init_cut)

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        members: dict[str, list[str]] = {}
        for name in self.shapes:
            members.setdefault(self._group_of(name), []).append(f"model/{name}")
        return [self._make_group(group, tuple(names)) for group, names in members.items()]

    def _group_of(self, name: str) -> str:
        if name.startswith(STEM):
            return "stem"
        if name == SPECIAL:
            return "special"
        suffix = name.rpartition(".")[2]
        owner = suffix if suffix in self.config.modalities else "shared"
        if name == EMBEDDING and not self.config.tie_embeddings:
            owner = "embedding"
        base = self.config.base
        if base is None or owner not in ("text", "shared", "embedding"):
            return owner
        return "base_embedding" if owner == "embedding" and not base.freeze else "base"

    def _make_group(self, group: str, names: tuple[str, ...]) -> ParameterGroup:
        base, modalities = self.config.base, self.config.modalities
        is_based = group in ("base", "base_embedding")
        is_frozen = base is not None and (
            (is_based and base.freeze) or (group == "special" and not base.train_special)
        )
        needs = None
        if group == "stem" or (group == "special" and "image" in modalities):
            needs = IMAGES
        elif group in modalities:
            needs = positions_of(group)
        return ParameterGroup(
            group,
            names,
            algorithm="frozen" if is_frozen else "adamw",
            weight_decay=not is_frozen and group not in ("embedding", "base_embedding", "special"),
            lr_scale=base.lr_scale if base is not None and is_based else 1.0,
            needs=None if is_frozen else needs,
        )

    def base_weights(self, networks: Mapping[str, nn.Module]) -> list[BaseWeights]:
        base = self.config.base
        if base is None:
            return []
        theirs, copies = {}, {}
        for name in self.shapes:
            group = self._group_of(name)
            if group in ("base", "base_embedding"):
                theirs[f"model/{name}"] = self._name_in_base(name)
            elif group in self.config.modalities and base.start_others:
                copies[f"model/{name}"] = self._name_in_base(name)
        found = [BaseWeights(base.source, theirs, stays_there=base.freeze, key=KEY)]
        if copies:
            found.append(BaseWeights(base.source, copies, stays_there=False, key=KEY))
        return found

    def _name_in_base(self, name: str) -> str:
        stem, _, suffix = name.removeprefix(BACKBONE).rpartition(".")
        own = stem if suffix in self.config.modalities else f"{stem}.{suffix}"
        return f"model/{own}"

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def build_task(config: Config) -> MixtureOfTransformersTask:
    return MixtureOfTransformersTask(config)
