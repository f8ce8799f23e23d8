"""A run and its patcher: architecture borrowed, level found once, stored patches checked, overflow never silent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from pydantic import Field
from ranks import run_ranks
from test_data_prepare import write_texts
from test_resume import run_new
from tiny_run import tensors, write_recipe
from weft.launch.cli import cli
from weft.models.batch import NEXT_STARTS_PATCH
from weft.models.blt.patching import make_patches
from weft.models.blt.patching_config import PatchingConfig
from weft.models.errors import CheckpointError, ConfigError, DataError, TrainingError, WeftError
from weft.models.section import Section
from weft.models.transformer.config import Config
from weft.trainer import train as train_module
from weft.trainer.configuration.borrowed import fill_borrowed
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.configuration.recipes import Layers
from weft.trainer.configuration.schema import TrainingConfig
from weft.trainer.data.config import DataConfig, SourceConfig
from weft.trainer.data.dataset import open_data
from weft.trainer.data.loader import PackedLoader
from weft.trainer.data.shards import read_manifest
from weft.trainer.distributed import Topology
from weft.trainer.metrics.patches import add_part_shares, add_patch_values
from weft.trainer.metrics.records import read_metrics
from weft.trainer.patching import (
    check_data_patches,
    open_patch_maker,
    sample_batches,
    settle_patching,
)
from weft.trainer.train import train

LENGTH = 32


class Patched(Section):
    """A model that has patches, as far as the trainer's floor needs one."""

    patching: PatchingConfig = Field(..., description="where patches start")


@pytest.fixture(scope="module")
def entropy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(
        tmp_path_factory.mktemp("entropy"),
        "train.steps=6",
        "schedule.horizon_steps=30",
        "model.ngram=null",
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts", files=6, size=1200)


def weft(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=True)


def patched(run: Path, data: Path, **patching: Any) -> TrainingConfig:
    """The tiny run's configuration with a patched model on prepared data."""
    config = load_run_config(run, ()).config
    layers = Layers({"model": {"patching": {"entropy_model": str(run), **patching}}})
    fill_borrowed(layers, Patched)
    source = SourceConfig(name="texts", path=str(data))
    return config.model_copy(
        update={
            "model": Patched.model_validate(layers.data["model"]),
            "data": DataConfig(sources=(source,), sequence_length=LENGTH, cache_dir=str(data.parent / "cache")),
        }
    )  # fmt: skip


@pytest.fixture
def alone() -> Topology:
    return Topology()


@pytest.fixture(scope="module")
def stored(entropy_run: Path, texts: Path) -> Path:
    out = texts.parent / "stored"
    done = weft("data", "prepare", texts, "--out", out, "--held-out", "1", "--patches-from", entropy_run,
                "--patch-size", "4", "--sequence-length", LENGTH)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert re.search(
        r"patches: scheme entropy, threshold \d\.\d+, .*sequence length 32", done.output
    )
    return out


def test_the_architecture_comes_from_the_run_that_is_named(entropy_run: Path, texts: Path) -> None:
    config = patched(entropy_run, texts, threshold=1.0)
    assert config.model.patching.entropy == load_run_config(entropy_run, ()).config.model
    layers = Layers({"model": {"patching": {"entropy_model": str(texts)}}})
    with pytest.raises(
        ConfigError, match=r"model\.patching\.entropy_model: .*texts is not a run folder"
    ):
        fill_borrowed(layers, Patched)
    # What is given stays: a resumed run does not look elsewhere.
    own = Config(vocab_size=260).model_dump()
    layers = Layers({"model": {"patching": {"entropy_model": str(texts), "entropy": own}}})
    fill_borrowed(layers, Patched)
    assert layers.data["model"]["patching"]["entropy"] == own


def test_the_level_is_found_once(entropy_run: Path, texts: Path, alone: Topology) -> None:
    config = patched(entropy_run, texts, patch_size=4.0)
    data = open_data(config.data)
    settled = settle_patching(config, data, alone)
    threshold = settled.model.patching.threshold
    assert threshold is not None
    assert settle_patching(config, data, alone) == settled
    # A run that goes on has its level: nothing is looked for, the size is what it was.
    assert settle_patching(settled, data, alone, is_new=False) is settled
    batches = list(sample_batches(data, config.run.seed, "cpu"))
    maker = open_patch_maker(settled.model.patching)
    starts = sum(int(make_patches(b, maker.config, maker.network, 4096).count) for b in batches)
    assert sum(len(b.tokens) for b in batches) / starts == pytest.approx(4.0, rel=0.05)


def test_a_size_that_the_data_do_not_give_is_refused(
    entropy_run: Path, texts: Path, stored: Path, alone: Topology
) -> None:
    config = patched(entropy_run, texts, patch_size=4.0, threshold=0.0)
    with pytest.raises(
        ConfigError,
        match=r"data give 1\.\d+ bytes a patch, more than 20 % off the 4 wanted; set model\.patching\.threshold=null",
    ):
        settle_patching(config, open_data(config.data), alone)
    config = patched(entropy_run, stored, patch_size=9.0, stored=True)
    with pytest.raises(
        ConfigError, match=r"off the 9 wanted; set model\.patching\.patch_size=[34]"
    ):
        settle_patching(config, open_data(config.data), alone)


def test_stored_patches_are_the_runs_own_or_refused(
    entropy_run: Path, texts: Path, stored: Path, alone: Topology, tmp_path: Path
) -> None:
    config = patched(entropy_run, stored, patch_size=4.0, stored=True)
    data = open_data(config.data)
    settled = settle_patching(config, data, alone)
    assert data.patches is not None
    assert settled.model.patching.threshold == data.patches["threshold"]
    check_data_patches(settled, data, alone)
    other = patched(entropy_run, stored, threshold=1.25, max_length=8)
    with pytest.raises(
        DataError, match=r"another patcher's \(threshold \d.*, not 1\.25; max length none, not 8\)"
    ):
        check_data_patches(other, data, alone)
    none = patched(entropy_run, texts, threshold=1.0, stored=True)
    with pytest.raises(DataError, match="stored is true but the data have no stored patches"):
        check_data_patches(none, open_data(none.data), alone)
    retrained = run_new(tmp_path, "train.steps=4", "schedule.horizon_steps=30", "model.ngram=null")
    moved = settled.model.patching.model_copy(update={"entropy_model": str(retrained)})
    swapped = settled.model_copy(update={"model": Patched(patching=moved)})
    with pytest.raises(DataError, match=r"another patcher's \(weights \w{12}, not \w{12}\)"):
        check_data_patches(swapped, data, alone)
    moved = moved.model_copy(update={"entropy_model": str(texts)})
    with pytest.raises(
        CheckpointError, match="holds no complete checkpoint; train an entropy model first"
    ):
        check_data_patches(
            settled.model_copy(update={"model": Patched(patching=moved)}), data, alone
        )


def test_what_is_stored_is_what_patching_on_the_fly_gives(entropy_run: Path, stored: Path) -> None:
    config = patched(entropy_run, stored, patch_size=4.0, stored=True)
    data = open_data(config.data)
    assert data.patches is not None
    rule = config.model.patching.model_copy(
        update={"threshold": data.patches["threshold"], "stored": False}
    )
    maker = open_patch_maker(rule)
    batch = PackedLoader(data, seed=5, batch_rows=8).assemble(0).micro_batches[0]
    made = make_patches(batch, rule, maker.network, 400)
    read = make_patches(batch, rule.model_copy(update={"stored": True}), None, 400)
    assert all(torch.equal(x, y) for x, y in zip(made, read, strict=True))
    assert batch.side[NEXT_STARTS_PATCH].any()


BLT = {
    "family": "blt",
    "window": 16,
    "ngram": {"sizes": [3], "rows": 101},
    "encoder": {"d_model": 16, "n_heads": 2, "d_ff": 24},
    "latent": {"n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 24},
    "decoder": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24},
}


@pytest.fixture(scope="module")
def blt(entropy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLT recipe on two sources whose patches are stored, beside them."""
    folder = tmp_path_factory.mktemp("blt")
    write_recipe(folder)
    sources, level = [], ["--patch-size", "4"]
    for name in ("tales", "sums"):
        out = folder / f"{name}-stored"
        words = [
            "--held-out",
            "1",
            "--patches-from",
            entropy_run,
            *level,
            "--sequence-length",
            "32",
        ]
        done = weft("data", "prepare", folder / name, "--out", out, *words)
        assert done.exit_code == 0, done.output
        threshold = (read_manifest(out).patches or {})["threshold"]
        level = ["--threshold", str(threshold)]
        sources.append({"name": name, "path": str(out)})
    patching = {"entropy_model": str(entropy_run), "threshold": threshold}
    return write_recipe(
        folder, model={**BLT, "patching": patching}, data__sources=sources, train__steps=4, train__micro_batch_tokens=256
    )  # fmt: skip


def run_blt(recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    config = load_config(str(recipe), [f"run.dir={folder}", *overrides], recipe.parent).config
    assert train(config) == 0
    return read_metrics(folder)


def test_a_blt_run_is_the_same_on_stored_patches(blt: Path, tmp_path: Path) -> None:
    made = run_blt(blt, tmp_path / "made", "eval.at_end=true")
    read = run_blt(blt, tmp_path / "read", "model.patching.stored=true", "eval.at_end=true")
    kept = ("loss", "grad_norm", "patches", "patch_size", "data_digest", "eval/loss")
    for name in kept:
        values = [record[name] for record in made if name in record]
        assert values
        assert values == [record[name] for record in read if name in record], name
    assert 1.5 < made[0]["patch_size"] < 16
    assert made[0]["patch_overflow"] == 0
    assert made[0]["patches_per_s"] > 0
    assert 0 < made[0]["entropy_model_share"] < 1
    assert "entropy_model_share" not in read[0]
    # The entropy model stays where it is: no checkpoint holds it.
    assert set(tensors(tmp_path / "made", 4)) == set(tensors(tmp_path / "read", 4))
    with pytest.raises(
        DataError, match=r"stored patches are another patcher's \(threshold \d\.\d+, not 1\.0\)"
    ):
        run_blt(blt, tmp_path / "other", "model.patching.threshold=1.0")


def train_ranks(topology: Topology, recipe: str, folder: str) -> float:
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    settings = [f"run.dir={folder}", "model.patching.stored=true", "train.micro_batch_tokens=64"]
    return float(train(load_config(recipe, settings, Path(recipe).parent).config))


def test_ranks_with_as_many_patches_train_on_the_same_steps(blt: Path, tmp_path: Path) -> None:
    alone = run_blt(blt, tmp_path / "alone", "model.patching.stored=true")
    assert run_ranks(2, "test_patching:train_ranks", str(blt), str(tmp_path / "two")) == [0, 0]
    two = read_metrics(tmp_path / "two")
    for one, both in zip(alone, two, strict=True):
        assert one["data_digest"] == both["data_digest"]
        assert one["patches"] == both["patches"]
        assert one["loss"] == pytest.approx(both["loss"], rel=1e-5)
        assert 1 <= both["patch_balance"] < 1.25
        assert both["patch_spread"] < 0.25


def test_a_run_finds_its_level_and_writes_it_down(blt: Path, tmp_path: Path) -> None:
    sources = yaml.safe_load(blt.read_text())["data"]["sources"]
    for source in sources:
        source["path"] = source["path"].removesuffix("-stored")
    run = tmp_path / "run"
    found = run_blt(
        blt,
        run,
        "model.patching.threshold=null",
        "model.patching.patch_size=3",
        f"data.sources={json.dumps(sources)}",
    )
    assert found[-1]["patch_size"] == pytest.approx(3, rel=0.25)
    settled = load_run_config(run, ()).config.model.patching  # type: ignore[attr-defined]
    assert settled.threshold is not None
    assert train(load_run_config(run, ["train.steps=6"]).config, resume=True) == 0
    assert load_run_config(run, ()).config.model.patching == settled  # type: ignore[attr-defined]


def test_overflow_ends_a_run_or_is_merged(blt: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"step 1: there is room for 24 of its \d+ patches; raise"
    ):
        run_blt(blt, tmp_path / "error", "model.patching.max_patches=3")
    merged = run_blt(
        blt, tmp_path / "merged", "model.patching.max_patches=3", "model.patching.overflow=merge"
    )
    assert all(record["patch_overflow"] > 0 for record in merged)
    assert all(record["patches"] == 24 + record["patch_overflow"] for record in merged)


def test_data_patches_shows_lengths_curve_and_borders(
    entropy_run: Path, texts: Path, tmp_path: Path
) -> None:
    words = [
        "data",
        "patches",
        texts,
        "--entropy-model",
        entropy_run,
        "--patch-size",
        "4",
        "--sequence-length",
        "256",
    ]
    shown = weft(*words, "--plot", tmp_path / "plots" / "patches.png", "--text", "120")
    assert shown.exit_code == 0, shown.output
    assert "Patch lengths" in shown.output
    assert "Mean patch size by threshold" in shown.output
    assert shown.output.count("|") > 8
    assert (tmp_path / "plots" / "patches.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(weft(*words, "--json", "--text", "120").output)
    assert found["summary"]["mean"] == pytest.approx(4, rel=0.05)
    assert found["identity"]["threshold"] > 0
    sizes = [size for _, size in found["curve"]]
    assert sizes == sorted(sizes)
    assert all(patch.isascii() for patch in found["text"])
    spaces = json.loads(weft("data", "patches", texts, "--scheme", "space", "--json").output)
    assert all(len(word.split()) == 1 for word in spaces["text"][2:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "patches", "TEXTS"], "scheme entropy needs threshold or patch_size"),
        (["data", "patches", "TEXTS", "--threshold", "1"], "scheme entropy needs entropy_model"),
        (["data", "patches", "TEXTS", "--threshold", "1", "--entropy-model", "TEXTS"], "is not a run folder"),
        (["data", "patches", "TEXTS", "--threshold", "nan", "--entropy-model", "RUN"], "threshold is nan"),
        (["data", "patches", "TEXTS", "--scheme", "space", "--rise", "1"], "scheme space has no use for it"),
        (["data", "prepare", "TEXTS", "--out", "OUT", "--threshold", "1"], "needs an entropy model; name its run"),
        (
            ["data", "prepare", "TEXTS", "--out", "OUT", "--scheme", "space", "--vocabulary", "hf:x"],
            "patches are of bytes, not of --vocabulary hf:x",
        ),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(
    words: list[str], message: str, entropy_run: Path, texts: Path, tmp_path: Path
) -> None:
    places = {"TEXTS": texts, "RUN": entropy_run, "OUT": tmp_path / "out"}
    result = weft(*(places.get(word, word) for word in words))
    assert result.exit_code != 0
    assert isinstance(result.exception, WeftError | SystemExit)
    assert message in (result.output + str(result.exception)).replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_an_entropy_model_of_another_vocabulary(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "run": {"name": "x"},
                "model": {"vocab_size": 512, "n_layers": 1, "d_model": 16, "n_heads": 2},
            }
        )
    )
    result = weft("data", "patches", texts, "--entropy-model", tmp_path, "--threshold", "1")
    assert (
        "has a vocabulary of 512 ids, expected the 260 of bytes"
        in str(result.exception) + result.output
    )


def test_numbers_of_a_step() -> None:
    record: dict[str, Any] = {"step_s": 0.5, "tokens_per_s": 256.0, "patches": 32}
    record["patches_squared"] = (20**2 + 12**2) / 128
    add_part_shares([record], {"entropy_model": 0.1})
    add_patch_values(record, 128, 2)
    assert record == {
        "step_s": 0.5,
        "tokens_per_s": 256.0,
        "patches": 32,
        "patches_per_s": 64.0,
        "patch_spread": pytest.approx(0.25),
        "entropy_model_share": pytest.approx(0.2),
    }
    plain: dict[str, Any] = {"step_s": 1.0}
    add_patch_values(plain, 128, 1)
    assert plain == {"step_s": 1.0}


def test_a_recipe_that_overrides_nothing_is_as_it_was(tmp_path: Path) -> None:
    layers = Layers({"model": {"vocab_size": 260}})
    fill_borrowed(layers, Config)
    assert layers.data == {"model": {"vocab_size": 260}}
    assert write_recipe(tmp_path).is_file()
