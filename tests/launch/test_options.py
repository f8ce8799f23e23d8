"""What commands share: telling recipes, runs and overrides apart, and finding runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from weft.launch.options import (
    load_recipe,
    load_recipe_or_run,
    load_run,
    print_table,
    run_folder,
    split_arguments,
)
from weft.models.errors import ConfigError
from weft.trainer.configuration.load import dump_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(folder: Path, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_recipe("olmo2/debug", overrides).config))
    return folder


def test_overrides_are_told_from_paths(here: Path) -> None:
    (here / "a=b.yaml").write_text("")
    arguments = ["x=1", "olmo2/debug", "data.path=a/b", "runs/lr=3", "a=b.yaml", "run.name="]
    others, overrides = split_arguments(arguments)
    assert others == ["olmo2/debug", "runs/lr=3", "a=b.yaml"]
    assert overrides == ["x=1", "data.path=a/b", "run.name="]


def test_runs_go_by_path_or_by_name(here: Path) -> None:
    make_run(here / "runs" / "first")
    make_run(here / "elsewhere" / "second")
    assert run_folder("runs/first") == Path("runs/first")
    assert run_folder("first") == Path("runs/first")
    assert run_folder("elsewhere/second") == Path("elsewhere/second")


def test_a_wrong_run_lists_the_nearest(here: Path) -> None:
    with pytest.raises(
        ConfigError, match="there is no folder runs/x; give the folder a run was started in"
    ):
        run_folder("runs/x")
    for name in ("first", "second", "third"):
        make_run(here / "runs" / name)
    with pytest.raises(ConfigError, match="there is no folder runs/secnd; runs here: runs/second"):
        run_folder("runs/secnd")
    (here / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.yaml in empty; runs here: .*runs/third"):
        run_folder("empty")


def test_a_run_wins_over_a_recipe_where_either_may_stand(here: Path) -> None:
    make_run(here / "run", "train.steps=11")
    assert load_recipe_or_run("run").config.train.steps == 11
    assert load_run("run", ["train.steps=12"]).config.train.steps == 12
    assert load_recipe_or_run("olmo2/debug", ["train.steps=13"]).config.train.steps == 13


def test_tables_are_not_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/long/path/" + "x" * 80
    print_table("Title", ["name", "count"], [[path, 5], ["b", 12345]], right=[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Title"
    assert any(path in line for line in lines)
    row = next(line for line in lines if path in line)
    other = next(line for line in lines if "12345" in line)
    assert row.rstrip().endswith("    5")
    assert row.index("5", len(path)) == other.index("12345") + 4
