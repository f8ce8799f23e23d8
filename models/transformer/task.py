"""The transformer as a task: next-token loss with z-loss on packed text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..batch import PackedBatch
from ..task import InitSpec, LossOutput, LossTerm, ParameterGroup, Task
from .config import Config
from .model import Transformer

__all__ = ["TransformerTask", "build_task"]

EMBEDDING = "embedding.tokens.weight"
TABLES = "embedding.ngrams.weight"


class TransformerTask(Task):
    """One network, `model`; decay on all but the input embedding (OLMo 2, section 3.3.4)."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build_networks(self) -> dict[str, nn.Module]:
        return {"model": Transformer(self.config)}

    def init_spec(self, name: str) -> InitSpec:
        if name.endswith("norm.weight"):
            return InitSpec("constant", value=1.0)
        std = self.config.ngram_init_std() if name.endswith(TABLES) else self.config.init_std
        return InitSpec("trunc_normal", std=std, cut=self.config.init_cut)

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        names = [f"model/{name}" for name, _ in networks["model"].named_parameters()]
        special = {f"model/{EMBEDDING}": "no_decay", f"model/{TABLES}": "ngrams"}
        if self.config.tie_embeddings:
            special.pop(f"model/{EMBEDDING}")
        chosen: dict[str, list[str]] = {}
        for name in names:
            chosen.setdefault(special.get(name, "decay"), []).append(name)
        return [
            ParameterGroup(
                group,
                tuple(members),
                algorithm="row_sparse_adam" if group == "ngrams" else "adamw",
                weight_decay=group == "decay",
            )
            for group, members in sorted(chosen.items())
        ]

    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        return list(networks["model"].blocks)  # type: ignore[arg-type]

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {"tokens": batch.target_count}

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        sums = networks["model"](batch)
        return LossOutput(
            {
                "cross_entropy": LossTerm(sums["cross_entropy"], "tokens"),
                "z_loss": LossTerm(sums["z_loss"], "tokens", weight=self.config.z_loss),
            }
        )

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def build_task(config: Config) -> TransformerTask:
    return TransformerTask(config)
