"""Moving averages of weights: what they are, that they survive, and that they are what is scored and sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import weft.trainer.train as train_module
from ranks import run_ranks
from test_resume import resume, run_new, same_run
from tiny_run import write_recipe
from weft.models.errors import ConfigError
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_manifest, read_tensor
from weft.trainer.configuration.load import load_config
from weft.trainer.data.dataset import open_data
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.evaluation import evaluate
from weft.trainer.train import train
from weft.trainer.trained import open_trained

DECAY = 0.8
CHANGES: dict[str, Any] = {
    "train__steps": 6,
    "checkpoint__every": 1,
    "checkpoint__keep": 10,
    "optimizer__ema_decay": DECAY,
    # Withheld updates have a test of their own.
    "optimizer__skip_step": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("averages"), **CHANGES)


def weights(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    path = step_folder(run, step)
    names = [name for name in read_manifest(path).tensors if name.startswith(f"{kind}/")]
    return {name.partition("/")[2]: read_tensor(path, name) for name in names}


def test_an_average_is_the_recursion_over_the_weights_of_all_steps(run: Path) -> None:
    # The weights before the first step are what the first average is made of, solved for.
    first, known = weights(run, 1, "parameters"), weights(run, 1, "ema")
    average = {name: tensor.double() for name, tensor in known.items()}
    assert any(not torch.equal(known[name], first[name]) for name in known)
    for step in range(2, 7):
        now = weights(run, step, "parameters")
        for name, tensor in average.items():
            average[name] = DECAY * tensor + (1 - DECAY) * now[name].double()
            found = weights(run, step, "ema")[name]
            torch.testing.assert_close(found.double(), average[name], rtol=1e-6, atol=1e-8)
    tables = [name for name in now if "ngrams" in name]
    assert tables
    assert set(now) - set(average) == set(tables)


def test_averages_are_resumed_to_the_bit(run: Path, tmp_path: Path) -> None:
    stopped = run_new(tmp_path, **CHANGES | {"train__steps": 3, "schedule__horizon_steps": 6})
    assert resume(stopped, "train.steps=6") == 0
    same_run(stopped, run)
    final = {name for name in read_manifest(step_folder(stopped, 6)).tensors if "ema/" in name}
    assert final


def test_averages_start_from_the_weights_when_switched_on(tmp_path: Path) -> None:
    plain = run_new(
        tmp_path,
        **CHANGES | {"optimizer__ema_decay": None, "train__steps": 2, "schedule__warmup_steps": 1},
    )
    assert not weights(plain, 2, "ema")
    assert resume(plain, "train.steps=3", f"optimizer.ema_decay={DECAY}") == 0
    before, after = weights(plain, 2, "parameters"), weights(plain, 3, "parameters")
    for name, found in weights(plain, 3, "ema").items():
        torch.testing.assert_close(found, DECAY * before[name] + (1 - DECAY) * after[name])
    assert resume(plain, "train.steps=4", "optimizer.ema_decay=null") == 0
    assert not weights(plain, 4, "ema")


def test_evaluation_and_generation_use_the_averages(run: Path) -> None:
    found = {}
    for choice in ("true", "false"):
        with open_trained(run, overrides=[f"eval.ema={choice}"]) as trained:
            data = open_data(trained.config.data)
            scores = evaluate(trained.engine, trained.task, data, trained.config.eval)
            assert scores is not None
            assert scores.total is not None
            found[choice] = scores.total.loss
            held = dict(trained.engine.networks["model"].named_parameters())
            wanted = weights(run, 6, "ema" if choice == "true" else "parameters")
            for name, tensor in wanted.items():
                assert torch.equal(held[name.removeprefix("model/")], tensor), name
    assert found["true"] != found["false"]


def test_evaluation_in_training_swaps_and_swaps_back(tmp_path: Path) -> None:
    config = load_config(str(write_recipe(tmp_path, **CHANGES)), [], tmp_path).config
    engine = build_engine(_task(config), config, Topology(0, 1, 0, 1, torch.device("cpu")))
    engine.start_averages()
    (averages,) = engine.averages.values()  # type: ignore[attr-defined]
    for tensor in averages.tensors.values():
        tensor.zero_()
    before = {name: p.detach().clone() for name, p in engine.networks["model"].named_parameters()}
    with engine.averaged():
        for name, parameter in engine.networks["model"].named_parameters():
            assert parameter.any() == ("ngrams" in name), name
    for name, parameter in engine.networks["model"].named_parameters():
        assert torch.equal(parameter, before[name])
    assert not any(tensor.any() for tensor in averages.tensors.values())


def test_a_withheld_update_changes_no_average(tmp_path: Path) -> None:
    config = load_config(str(write_recipe(tmp_path, **CHANGES)), [], tmp_path).config
    engine = build_engine(_task(config), config, Topology(0, 1, 0, 1, torch.device("cpu")))
    engine.start_averages()
    (averages,) = engine.averages.values()  # type: ignore[attr-defined]
    for parameter in engine.networks["model"].parameters():
        parameter.data += 1.0
    before = {name: tensor.clone() for name, tensor in averages.tensors.items()}
    averages.update(torch.tensor(0.0))
    assert all(torch.equal(averages.tensors[name], tensor) for name, tensor in before.items())
    averages.update(torch.tensor(1.0))
    for name, tensor in before.items():
        torch.testing.assert_close(averages.tensors[name], tensor + (1 - DECAY))


def test_shards_keep_the_averages_of_one_process(run: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, **CHANGES)
    run_ranks(2, "test_averages:train_sharded", str(tmp_path))
    for name, tensor in weights(run, 6, "ema").items():
        found = weights(tmp_path / "run", 6, "ema")[name]
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)


def train_sharded(topology: Topology, folder: str) -> None:
    """Runs on every rank."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    recipe = Path(folder) / "tiny.yaml"
    settings = ["parallel.strategy=fsdp"]
    assert train(load_config(str(recipe), settings, Path(folder)).config) == 0


def test_other_engines_refuse(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **CHANGES, parallel__engine="accelerate")
    with pytest.raises(ConfigError, match="engine accelerate keeps no averages of weights"):
        load_config(str(recipe), [], tmp_path)


def _task(config: Any) -> Any:
    from weft.models import build_task

    return build_task(config.model)
