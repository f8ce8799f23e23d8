"""Weights of another run: named by their hash, never copied; known again at a resume, on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_resume import resume, run_new
from tiny_run import tensors, write_recipe
from torch import nn
from weft.models.errors import CheckpointError, ConfigError
from weft.models.task import BaseWeights, ParameterGroup
from weft.models.transformer.task import TransformerTask
from weft.trainer import opening
from weft.trainer import train as train_module
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_manifest, read_tensor
from weft.trainer.configuration.load import load_config
from weft.trainer.distributed import Topology
from weft.trainer.train import train

SHORT = ("train.steps=4", "schedule.horizon_steps=30")
LOOKED_AT = "embedding.tokens.weight"


class BasedTask(TransformerTask):
    """The tiny transformer beside a frozen one that another run trained."""

    source = ""
    stays_there = True
    seen: Any = None

    def build_networks(self) -> dict[str, nn.Module]:
        return {**super().build_networks(), "base": super().build_networks()["model"]}

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        names = tuple(f"base/{name}" for name, _ in networks["base"].named_parameters())
        kind = "frozen" if self.stays_there else "adamw"
        dense = tuple(n for n in names if "ngrams" not in n or self.stays_there)
        rest = tuple(n for n in names if n not in dense)
        groups = [ParameterGroup("base", dense, algorithm=kind)]
        if rest:
            groups.append(ParameterGroup("base_tables", rest, algorithm="row_sparse_adam"))
        return [*super().parameter_groups(networks), *groups]

    def base_weights(self, networks: Mapping[str, nn.Module]) -> list[BaseWeights]:
        names = [name for name, _ in networks["base"].named_parameters()]
        parameters = {f"base/{name}": f"model/{name}" for name in names}
        return [BaseWeights(self.source, parameters, self.stays_there, "model.base")]

    def losses(self, networks: Any, batch: Any, phase: str = "train") -> Any:
        weight = networks["base"].get_parameter(LOOKED_AT)
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        type(self).seen = whole.detach().clone()
        return super().losses(networks, batch, phase)


def use_base(patch: pytest.MonkeyPatch, source: Path, *, stays_there: bool = True) -> None:
    patch.setattr(BasedTask, "source", str(source))
    patch.setattr(BasedTask, "stays_there", stays_there)
    patch.setattr(opening, "build_task", BasedTask)


def stored(run: Path, step: int = 4) -> torch.Tensor:
    return read_tensor(step_folder(run, step), f"parameters/model/{LOOKED_AT}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("base"), *SHORT)


def test_it_is_named_not_copied_and_known_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_base(monkeypatch, base)
    run = run_new(tmp_path / "run", *SHORT, "run.seed=3")
    assert torch.equal(BasedTask.seen, stored(base))
    assert not torch.equal(BasedTask.seen, stored(run))
    assert tensors(run, 4).keys() == tensors(base, 4).keys()
    (digest,) = read_manifest(step_folder(run, 4)).state["base_weights"].values()
    assert len(digest) == 64
    BasedTask.seen = None
    assert resume(run, "train.steps=6") == 0
    assert torch.equal(BasedTask.seen, stored(base))
    # Frozen: what the run trains is what it would train alone.
    monkeypatch.setattr(opening, "build_task", TransformerTask)
    alone = run_new(tmp_path / "alone", *SHORT, "run.seed=3", "train.steps=6")
    assert tensors(run, 6) == tensors(alone, 6)


def test_other_weights_in_its_place_are_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_base(monkeypatch, base)
    run = run_new(tmp_path / "run", *SHORT)
    other = run_new_plain(tmp_path / "other", monkeypatch, "run.seed=9")
    use_base(monkeypatch, other)
    with pytest.raises(ConfigError, match=r"model\.base holds other weights \(\w+\) than this run"):
        resume(run, "train.steps=6")
    use_base(monkeypatch, tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"model\.base: .*nowhere holds no complete checkpoint"
    ):
        resume(run, "train.steps=6")


def run_new_plain(folder: Path, patch: pytest.MonkeyPatch, *overrides: str) -> Path:
    patch.setattr(opening, "build_task", TransformerTask)
    return run_new(folder, *SHORT, *overrides)


def test_what_a_run_only_starts_from_is_its_own_afterwards(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_base(monkeypatch, base, stays_there=False)
    run = run_new(tmp_path / "run", *SHORT, "optimizer.weight_decay=0.5")
    saved = tensors(run, 4)
    assert {n for n in saved if n.startswith("parameters/base/")}
    assert read_manifest(step_folder(run, 4)).state["base_weights"] == {}
    # A resume takes the run's own, whatever has become of the other.
    use_base(monkeypatch, tmp_path / "nowhere", stays_there=False)
    assert resume(run, "train.steps=6") == 0


def train_based(topology: Topology, recipe: str, source: str, strategy: str) -> list[Any]:
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    use_base(patch, Path(source))
    settings = [*SHORT, f"parallel.strategy={strategy}"]
    code = train(load_config(recipe, settings, Path(recipe).parent).config)
    return [code, torch.equal(BasedTask.seen, stored(Path(source)))]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_holds_its_part(tmp_path: Path, base: Path, strategy: str) -> None:
    recipe = write_recipe(tmp_path)
    found = run_ranks(2, "test_base_weights:train_based", str(recipe), str(base), strategy)
    assert found == [[0, True]] * 2
    assert tensors(tmp_path / "run", 4).keys() == tensors(base, 4).keys()
