"""`weft debug RECIPE`: every shipped recipe trains in its smallest form, and what goes wrong fails a check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from weft.launch import trial
from weft.launch.debug import command
from weft.launch.options import RECIPES
from weft.models.errors import ConfigError, DataError
from weft.models.transformer.config import Config
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.configuration.load import load_config
from weft.trainer.configuration.recipes import list_recipes
from weft.trainer.configuration.schema import TrainingConfig

FEW = ["train.steps=8", "checkpoint.every=4", "optimizer.skip_step_minimum=4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point a recipe at a little code; the built-in corpus takes longer to prepare than the runs take."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts").mkdir()
    for number in range(20):
        lines = (f"def f{i}(x):\n    return x * {i * number} + {number}\n" for i in range(40))
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    source = json.dumps([{"name": "code", "path": str(folder / "texts")}])
    return [f"data.sources={source}", "data.vocabulary=bytes", f"data.cache_dir={folder}/cache"]


def debug(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(command, words, standalone_mode=False)


def recipe(name: str, *overrides: str) -> TrainingConfig:
    return load_config(name, list(overrides), RECIPES).config


# One of each kind; that the smallest form of all others is valid is checked below, and 32b runs on two ranks.
@pytest.mark.parametrize("name", ["olmo2/debug", "olmo2/quickstart", "olmo2/1b", "llama3/8b"])
def test_shipped_recipes_pass(name: str, text: list[str]) -> None:
    done = debug(name, *text, "model.vocab_size=260", *FEW, "run.threads=1")
    assert done.exception is None, done.output
    assert done.return_value == 0, done.output
    assert "all checks hold" in done.output
    assert "evaluation works" in done.output
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()


def test_two_ranks_with_sharded_weights(text: list[str], tmp_path: Path) -> None:
    done = debug(
        *("olmo2/32b", "--ranks", 2, "--keep", tmp_path / "runs", "run.threads=1"),
        *(*text, "model.vocab_size=260", *FEW),
    )
    assert done.return_value == 0, done.output
    assert "8 steps on 2 ranks" in done.output
    kept = recipe(str(tmp_path / "runs" / "recipe.yaml"))
    assert (kept.parallel.strategy, kept.parallel.shard_ranks) == ("hsdp", 2)
    manifest = step_folder(tmp_path / "runs" / "resumed", 8) / "manifest.json"
    assert json.loads(manifest.read_text())["world_size"] == 2


def test_what_was_made_small_is_printed_and_overrides_win(text: list[str], tmp_path: Path) -> None:
    done = debug(
        *("olmo2/quickstart", "--keep", tmp_path, *text, *FEW, "data.sequence_length=64"),
    )
    assert done.exception is None
    rows = [line.split() for line in done.output.splitlines()]
    assert ["data.sequence_length", "256", "64"] not in rows  # as asked for, not made small
    assert ["model.ngram.rows", "65536", "4096"] in rows
    assert ["model.d_model", "128", "64"] in rows
    assert recipe(str(tmp_path / "recipe.yaml")).data.sequence_length == 64


def test_data_that_is_not_here_says_how_to_go_on() -> None:
    done = debug("olmo2/7b")
    assert isinstance(done.exception, DataError)
    assert "data.sources.0.path=" in str(done.exception)
    assert "weft debug olmo2/7b --builtin-data" in str(done.exception)


def test_the_built_in_corpus_brings_its_vocabulary() -> None:
    config = recipe("olmo2/1b")
    changes = trial.smallest_settings(config, 1, use_builtin=True)
    assert changes["data.sources"] == [trial.BUILTIN]
    assert (changes["data.vocabulary"], changes["model.vocab_size"]) == ("bytes", 260)
    assert "data.vocabulary" not in trial.smallest_settings(config, 1)


@pytest.mark.parametrize("name", list_recipes(RECIPES))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_smallest_form_is_valid_and_small(name: str, ranks: int) -> None:
    config = recipe(name)
    changes = trial.smallest_settings(config, ranks)
    settings = [f"{key}={trial.yaml_value(value)}" for key, value in changes.items()]
    small = recipe(name, *settings)
    model, real = small.model, config.model
    assert model.family == real.family
    # Of ids, where a family has any.
    assert getattr(model, "vocab_size", None) == getattr(real, "vocab_size", None)
    assert sum(model.count_parameters().values()) < 30e6
    assert small.batch_rows % ranks == 0
    assert small.train.steps == 20
    if isinstance(real, Config):
        check_transformer(model, real)
        assert trial.smallest_settings(small, ranks) == {}
    elif model.family == "mamba":
        assert (model.n_blocks, model.d_model) == (2 * real.blocks_per_layer, 64)
        for kept in ("d_state", "expand", "d_conv", "modalities", "splits", "tie_embeddings"):
            assert getattr(model, kept) == getattr(real, kept)
        assert trial.smallest_settings(small, ranks) == {}
    elif model.family in ("image_ar", "dit"):
        assert (model.n_layers, model.d_model) == (2, 64)
        for kept in ("classes", "label_dropout", "grid", "codebook_size", "ratios", "patch"):
            assert getattr(model, kept, None) == getattr(real, kept, None)
        assert trial.smallest_settings(small, ranks) == {}
    elif model.family == "mixture_of_transformers":
        assert (model.n_layers, model.d_model, model.base) == (2, 64, None)
        for kept in ("modalities", "split", "norm", "qk_norm", "special_ids", "image_attention"):
            assert getattr(model, kept) == getattr(real, kept)
        assert trial.smallest_settings(small, ranks) == {}
    elif model.family == "image_tokenizer":
        assert max(model.channels) < 64
        assert len(model.channels) == len(real.channels)
        for kept in ("kind", "size", "ratios", "every_ratio", "reconstruction"):
            assert getattr(model, kept) == getattr(real, kept)
        for part in ("crt", "adversarial"):
            assert (getattr(model, part) is None) == (getattr(real, part) is None)
        assert trial.smallest_settings(small, ranks) == {}
    else:
        # Every part of a BLT that it has is still there.
        for kept in ("formulation", "double_residual", "patch_vectors"):
            assert getattr(model, kept) == getattr(real, kept)
        assert max(model.stack(name).n_layers for name in ("encoder", "latent", "decoder")) <= 2
        cross = [[count > 0 for count in sizes.cross_layers] for sizes in (model, real)]
        assert cross[0] == cross[1]


def test_image_runs_keep_their_rows_and_have_no_built_in_codes() -> None:
    config = load_config("image-ar/b", [], RECIPES).config
    assert "data.sequence_length" not in trial.smallest_settings(config, 1)
    with pytest.raises(ConfigError, match="there are no built-in codes of images; encode some"):
        trial.smallest_settings(config, 1, use_builtin=True)


def check_transformer(model: Config, real: Config) -> None:
    assert (model.n_layers, model.d_model) == (min(2, real.n_layers), 64)
    assert model.n_heads // model.kv_heads == real.n_heads // real.kv_heads
    assert model.d_ff / model.d_model == pytest.approx(real.d_ff / real.d_model, rel=0.1)
    for kept in ("norm", "qk_norm", "tie_embeddings", "rope_theta", "z_loss", "rope_scaling"):
        assert getattr(model, kept) == getattr(real, kept)


def test_a_recipe_that_cannot_work_is_refused() -> None:
    assert isinstance(debug("olmo2/debug", "train.stps=3").exception, ConfigError)


# Checks that have something to find


@pytest.fixture(scope="module")
def finished(
    text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainingConfig]:
    folder = tmp_path_factory.mktemp("finished")
    assert debug("olmo2/debug", "--keep", folder, *text, *FEW).return_value == 0
    return folder / "whole", recipe(str(folder / "recipe.yaml"))


def records(**series: list[float]) -> list[dict[str, Any]]:
    rows = zip(*series.values(), strict=True)
    return [{"step": i + 1, **dict(zip(series, row, strict=True))} for i, row in enumerate(rows)]


def test_a_loss_that_rises_or_is_no_number_fails() -> None:
    assert trial._loss_check(records(loss=[3.0, 2.0, 2.0, 1.0])).is_good
    assert not trial._loss_check(records(loss=[1.0, 2.0, 2.0, 3.0])).is_good
    fine = records(loss=[1.0, 1.0], grad_norm=[1.0, 2.0])
    assert trial._finite_check(fine).found == "norms up to 2"
    bad = trial._finite_check(records(loss=[1.0, 1.0], grad_norm=[1.0, float("nan")]))
    assert (bad.is_good, bad.found) == (False, "first not at step 2")


def test_an_evaluation_without_a_number_fails() -> None:
    assert not trial._evaluation_check([{"loss": 1.0}]).is_good
    assert not trial._evaluation_check([{"loss": 1.0, "eval/loss": float("inf")}]).is_good


def test_a_parameter_without_gradient_fails(finished: tuple[Path, TrainingConfig]) -> None:
    run_dir, config = finished
    assert trial._gradient_check(run_dir, config).is_good
    path = step_folder(run_dir, config.train.steps)
    name = "optimizer/exp_avg_sq/model/blocks.1.mlp.up_proj.weight"
    manifest = json.loads((path / "manifest.json").read_text())
    chunk = manifest["tensors"][name]["chunks"][0]
    assert any(name in load_file(file) for file in path.glob("*.safetensors"))
    with open(path / chunk["file"], "r+b") as file:
        file.seek(chunk["offset"])
        file.write(bytes(chunk["bytes"]))
    found = trial._gradient_check(run_dir, config)
    assert (found.is_good, found.found) == (False, "none: model/blocks.1.mlp.up_proj.weight")


def test_a_resume_that_shows_fails(finished: tuple[Path, TrainingConfig]) -> None:
    run_dir, config = finished
    resumed = run_dir.parent / "resumed"
    assert trial._resume_check(run_dir, resumed, config).is_good
    file = resumed / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[6]["loss"] += 1e-7
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict = trial._resume_check(run_dir, resumed, config)
    assert not verdict.is_good
    assert verdict.found.startswith("loss: first at step 7")
