"""The commands of docs/lmfusion.md, as the page has them; and ids that do not go with a base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from weft.launch.options import load_recipe
from weft.models.errors import ConfigError
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_manifest, read_tensor
from weft.trainer.train import train

PAGE = (Path(__file__).parents[2] / "docs/lmfusion.md").read_text()


def recipe_of_page(folder: Path) -> str:
    (text,) = re.findall(r"^```yaml\n# lmfusion\.yaml\n(.*?)^```", PAGE, re.M | re.S)
    path = folder / "lmfusion.yaml"
    path.write_text(text)
    return str(path)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    (base,) = re.findall(r"^weft train (olmo2/debug .*)$", PAGE, re.M)
    name, *overrides = base.split()
    assert train(load_recipe(name, [*overrides, cache]).config) == 0
    found = load_recipe(
        recipe_of_page(tmp_path), [cache, "train.steps=8", "logging.every=1"]
    ).config
    assert train(found) == 0
    step = step_folder(found.run_dir, 8)
    assert not [n for n in read_manifest(step).tensors if n.endswith(".text")]
    name = "blocks.0.mlp.up_proj.weight"
    moved = read_tensor(step, f"parameters/model/backbone.{name}.image")
    assert not torch.equal(
        moved, read_tensor(step_folder(tmp_path / "runs/base", 20), f"parameters/model/{name}")
    )


def test_special_ids_are_those_of_the_data(tmp_path: Path) -> None:
    recipe = recipe_of_page(tmp_path)
    content = yaml.safe_load(Path(recipe).read_text())
    content["model"]["special_ids"] = [260]
    content["model"]["base"] = {"source": "nowhere", "architecture": {"vocab_size": 260}}
    Path(recipe).write_text(yaml.safe_dump(content))
    with pytest.raises(
        ConfigError, match=r"model\.special_ids: \[260\].*set model\.special_ids='\[260, 261\]'"
    ):
        load_recipe(recipe)
