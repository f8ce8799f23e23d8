"""Recipes, chains and overrides: what comes out, where it came from, and what is said when it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weft.models.errors import ConfigError
from weft.trainer.configuration.load import (
    Loaded,
    config_hash,
    dump_config,
    load_config,
    load_run_config,
)

BASE = """\
model:
  vocab_size: 260
  n_layers: 2
  d_model: 64
  n_heads: 4
data:
  sources:
    - name: first
      path: /nowhere/first
      weight: 1.5
    - name: second
      path: /nowhere/second
      weight: 0.5
  sequence_length: 64
optimizer:
  lr: 1e-3
train:
  steps: 100
  batch_tokens: 1024
"""

Load = Callable[..., Loaded]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    (folder / "family").mkdir(parents=True)
    (folder / "family" / "base.yaml").write_text(BASE)
    return folder


@pytest.fixture
def load(recipes: Path) -> Load:
    return lambda recipe, *overrides: load_config(recipe, overrides, recipes)


def errors_of(load: Load, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value).splitlines()


def test_values_come_from_recipe_override_or_default(load: Load) -> None:
    loaded = load("family/base", "optimizer.lr=2e-4", "data.sources.1.weight=3")
    config, origins = loaded.config, loaded.origins
    assert (config.optimizer.lr, origins["optimizer.lr"]) == (2e-4, "override")
    assert (config.train.steps, origins["train.steps"]) == (100, "family/base.yaml:18")
    assert (config.optimizer.eps, origins["optimizer.eps"]) == (1e-8, "default")
    assert [source.weight for source in config.data.sources] == [1.5, 3.0]
    assert origins["data.sources.0.weight"] == "family/base.yaml:10"
    assert origins["data.sources.1.weight"] == "override"
    assert origins["data.sources.1.format"] == "default"
    assert (config.run.name, origins["run.name"]) == ("family-base", "recipe name")
    assert config.run_dir == Path("runs/family-base")
    assert config.batch_rows == 16


def test_every_value_has_an_origin(load: Load) -> None:
    loaded = load("family/base", "model.ngram.rows=100")
    for section, value in loaded.config.dump().items():
        for name, item in value.items():
            key = f"{section}.{name}"
            assert key in loaded.origins or any(k.startswith(f"{key}.") for k in loaded.origins), (
                item
            )
    assert loaded.origins["model.ngram.rows"] == "override"
    assert loaded.origins["model.ngram.sizes"] == "default"


def test_overrides_are_yaml(load: Load) -> None:
    config = load(
        "family/base",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.clip_grad_norm=",
        "checkpoint.every=null",
        "train.steps=1e2",
        "run.name=007",
        "data.sources=[{name: only, path: a=b}]",
    ).config
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.clip_grad_norm is None
    assert config.checkpoint.every is None
    assert config.train.steps == 100
    assert config.run.name == "007"
    assert [source.path for source in config.data.sources] == ["a=b"]


def test_an_item_of_a_default_list_can_be_overridden(load: Load) -> None:
    loaded = load("family/base", "optimizer.betas.1=0.99")
    assert loaded.config.optimizer.betas == (0.9, 0.99)
    assert loaded.origins["optimizer.betas"] == "override"


def test_later_overrides_win(load: Load) -> None:
    config = load(
        "family/base", "model.ngram.rows=5", "model.ngram=null", "model.ngram.rows=7"
    ).config
    assert config.model.ngram.rows == 7  # type: ignore[attr-defined]


def test_extends_merges_sections_and_replaces_lists(recipes: Path, load: Load) -> None:
    (recipes / "family" / "child.yaml").write_text(
        "extends: base\noptimizer:\n  weight_decay: 0.3\ndata:\n  sources:\n    - {name: third, path: /x}\n"
    )
    (recipes / "grandchild.yaml").write_text("extends: family/child\ntrain:\n  steps: 7\n")
    loaded = load("grandchild")
    config, origins = loaded.config, loaded.origins
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.train.steps) == (
        1e-3,
        0.3,
        7,
    )
    assert [source.name for source in config.data.sources] == ["third"]
    assert origins["optimizer.lr"] == "family/base.yaml:16"
    assert origins["optimizer.weight_decay"] == "family/child.yaml:3"
    assert origins["train.steps"] == "grandchild.yaml:3"
    assert origins["data.sources.0.name"] == "family/child.yaml:6"
    assert origins["data.sources.0.weight"] == "default"
    assert config.run.name == "grandchild"


def test_extends_finds_files_beside_the_recipe(recipes: Path, load: Load, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "mine.yaml").write_text(BASE)
    child = tmp_path / "deep" / "child.yaml"
    child.write_text("extends: ../mine.yaml\ntrain: {steps: 9}\n")
    loaded = load(str(child))
    assert loaded.config.train.steps == 9
    assert loaded.origins["model.d_model"].endswith("mine.yaml:4")


def test_circles_and_missing_parents_are_reported(recipes: Path, load: Load) -> None:
    (recipes / "a.yaml").write_text("extends: b\n")
    (recipes / "b.yaml").write_text("extends: a\n")
    assert errors_of(load, "a") == [
        "recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml"
    ]
    (recipes / "c.yaml").write_text("train: {steps: 1}\nextends: family/bas\n")
    (message,) = errors_of(load, "c")
    assert "'family/bas'" in message
    assert "did you mean family/base?" in message
    assert message.endswith("[c.yaml:2]")
    (recipes / "d.yaml").write_text("extends: [a, b]\n")
    assert errors_of(load, "d")[0].startswith("extends: expected the name or path of one recipe")


def test_unknown_recipes_name_the_nearest(load: Load, tmp_path: Path) -> None:
    assert "did you mean family/base?" in errors_of(load, "family/bose")[0]
    assert "family/base" in errors_of(load, "quite-another")[0]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(BASE)
    assert f"weft train --resume {tmp_path / 'run'}" in errors_of(load, str(tmp_path / "run"))[0]


def test_all_errors_come_at_once_each_with_origin_and_nearest_key(
    recipes: Path, load: Load
) -> None:
    (recipes / "bad.yaml").write_text(
        "extends: family/base\nmodle: {}\noptimizer:\n  bettas: [0.9, 0.9]\n  lr: -1\nmodel:\n  vocab_size: 10\n"
    )
    found = errors_of(
        load,
        "bad",
        "train.stps=5",
        "data.sources.0.weigth=2",
        "schedule.kind=cosin",
        "train.batch_tokens=1000",
        "checkpoint.every=0",
        "nonsense",
        "data.sources.2.weight=1",
        "model.ngram.row=5",
    )
    expected = [
        "'nonsense' is not an override; write key=value, such as train.steps=100",
        "data.sources.2: data.sources has items 0 to 1; there is no '2' [override]",
        "modle: no such key; did you mean model? [bad.yaml:2]",
        "model.ngram.row: no such key; did you mean model.ngram.rows? [override]",
        "data.sources.0.weigth: no such key; did you mean data.sources.0.weight? [override]",
        "optimizer.bettas: no such key; did you mean optimizer.betas? [bad.yaml:4]",
        "optimizer.lr: should be greater than 0, found -1 [bad.yaml:5]",
        "schedule.kind: should be 'cosine', 'linear', 'wsd' or 'constant', found cosin [override]",
        "train.stps: no such key; did you mean train.steps? [override]",
        "checkpoint.every: should be greater than 0, found 0 [override]",
        "train.batch_tokens: 1000 is not a multiple of data.sequence_length 64; the nearest is 1024 [override]",
        "model.vocab_size: 10 is less than the 260 ids of data.vocabulary=bytes; "
        "set model.vocab_size=260 [bad.yaml:7]",
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=true", "train.steps: expected integer > 0, found true [override]"),
        ("train.steps=many", "train.steps: should be an integer, found many [override]"),
        (
            "train.steps=1.5",
            "train.steps: should be an integer, found 1.5 [override]",
        ),
        ("optimizer.lr=.inf", "optimizer.lr: should be finite, found .inf [override]"),
        ("optimizer.lr=.nan", "optimizer.lr: should be finite, found .nan [override]"),
        ("optimizer.betas=0.9", "optimizer.betas: should be a list, found 0.9 [override]"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: required, but not given [override]"),
        ("parallel.compile=3", "parallel.compile: should be true or false"),
        ("train=3", "train: should be a section, with keys below it, found 3 [override]"),
        ("run=3", "run: should be a section, with keys below it, found 3 [override]"),
        ("train.steps.more=3", "train.steps is a value, not a section"),
        ("train.steps={a: 1}", "train.steps: should be an integer, found {a: 1} [override]"),
        ("data.sources=[{name: a}]", "data.sources.0.path: required, but not given [override]"),
        ("a..b=3", "'a..b=3' is not an override"),
        ("=3", "'=3' is not an override"),
        ("train.steps=[1", "train.steps: cannot read '[1' as a value"),
        ("model.family=transfomer", "did you mean transformer? [override]"),
        (
            "model.n_heads=3",
            "model: d_model 64 is not a multiple of n_heads 3 [family/base.yaml:4, override]",
        ),
        ("lr=3", "lr: no such key; did you mean optimizer.lr? [override]"),
        (
            "data.vocabulary=words",
            "data.vocabulary: 'words' is neither 'bytes' nor 'hf:PATH' [override]",
        ),
        ("extends=family/base", "extends: no such key"),
    ],
)
def test_one_wrong_override_is_one_line(load: Load, override: str, message: str) -> None:
    found = errors_of(load, "family/base", override)
    assert len(found) == 1
    assert message in found[0]


def test_a_section_left_empty_is_its_defaults(recipes: Path, load: Load) -> None:
    (recipes / "empty.yaml").write_text("extends: family/base\nlogging:\nrun:\n")
    assert load("empty").config.logging.every == load("family/base").config.logging.every


def test_dotted_keys_in_a_file_are_explained(recipes: Path, load: Load) -> None:
    (recipes / "dotted.yaml").write_text("extends: family/base\ntrain.steps: 5\n")
    assert errors_of(load, "dotted") == [
        "train.steps: write this as nested sections, one key a line [dotted.yaml:2]"
    ]


def test_a_dump_is_complete_and_loads_to_the_same(load: Load, tmp_path: Path) -> None:
    loaded = load("family/base", "run.name=1e-4", "model.ngram.sizes=[2, 3]", "optimizer.eps=1e-12")
    for text in (dump_config(loaded.config), dump_config(loaded.config, loaded.origins)):
        path = tmp_path / "dumped.yaml"
        path.write_text(text)
        again = load(str(path))
        assert again.config == loaded.config
        assert "default" not in again.origins.values()
        # Readers of YAML 1.1 get the same values.
        assert yaml.safe_load(text) == loaded.config.dump()


@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12
    ),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    steps=st.integers(1, 10**15),
)
def test_any_value_survives_a_dump(
    load: Load, tmp_path: Path, name: str, lr: float, steps: int
) -> None:
    loaded = load("family/base")
    changed = loaded.config.model_copy(
        update={
            "run": loaded.config.run.model_copy(update={"name": name}),
            "optimizer": loaded.config.optimizer.model_copy(update={"lr": lr}),
            "train": loaded.config.train.model_copy(update={"steps": steps}),
        }
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(changed), encoding="utf-8")
    assert load(str(path)).config == changed


def test_comments_of_a_dump_stand_in_one_column(load: Load) -> None:
    loaded = load("family/base")
    lines = dump_config(loaded.config, loaded.origins).splitlines()
    assert (
        "- name: first" in lines[next(i for i, line in enumerate(lines) if "sources:" in line) + 1]
    )
    columns = {line.index(" # ") for line in lines if " # " in line}
    assert len(columns) == 1


def test_a_run_folder_gives_its_configuration_back(load: Load, tmp_path: Path) -> None:
    started = load("family/base", "optimizer.lr=5e-4").config
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(started))
    loaded = load_run_config(folder, ["train.steps=500"])
    assert loaded.config.run_dir == folder
    assert loaded.config.train.steps == 500
    assert loaded.config.optimizer.lr == 5e-4
    assert loaded.origins["run.dir"] == "run folder"
    assert loaded.origins["train.steps"] == "override"
    assert loaded.origins["optimizer.lr"].startswith("config.yaml:")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.yaml"):
        load_run_config(tmp_path, [])


def test_the_hash_ignores_what_changes_no_result(load: Load) -> None:
    same = config_hash(load("family/base").config)
    for override in (
        "run.name=other",
        "run.dir=/x",
        "checkpoint.every=5",
        "logging.every=1",
        "data.prefetch_steps=9",
    ):
        assert config_hash(load("family/base", override).config) == same, override
    for override in (
        "run.seed=1",
        "optimizer.lr=2e-3",
        "data.sequence_length=32",
        "checkpoint.start_from=/x",
    ):
        assert config_hash(load("family/base", override).config) != same, override


def test_configurations_are_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("family/base").config.train.steps = 3  # type: ignore[misc]
