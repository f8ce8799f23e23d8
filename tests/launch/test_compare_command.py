"""`weft compare` and `weft eval --noise` on real runs: tables, files, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_recipe
from weft.launch import cli
from weft.launch import compare as launch_compare
from weft.launch import evaluate as launch_evaluate
from weft.trainer.compare import AXES
from weft.trainer.configuration.load import load_config
from weft.trainer.noise import KINDS
from weft.trainer.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `small` and `wide`."""
    folder = tmp_path_factory.mktemp("compare")
    for name, changes in (("small", {}), ("wide", {"model__d_model": 32, "model__d_ff": 48})):
        recipe = write_recipe(
            folder, train__steps=20, eval__at_end=True, run__dir=str(folder / name), **changes
        )
        train(load_config(str(recipe), [], folder).config)
    return folder


def weft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["weft", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


def test_two_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, report = runs / "plot.png", runs / "compare.json"
    code, out, err = weft(
        monkeypatch,
        capsys,
        *("compare", str(runs / "small"), str(runs / "wide")),
        *("--plot", str(picture), "--json", str(report)),
    )
    assert code == 0, err
    for words in ("FLOPs a byte", "What they reached", "FLOPs to match", "3,232", "6,464"):
        assert words in out
    assert "note:" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(report.read_text())
    last = json.loads((runs / "small" / "metrics.jsonl").read_text().splitlines()[-2])
    assert found["runs"][0]["tokens"] == last["tokens"]
    assert found["runs"][0]["costs"]["table_parameters"] == 3232
    assert len(found["matches"]) == 2


def test_held_out_scores_against_inference(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(runs / "small"), str(runs / "wide"), "--metric", "eval/loss"]
    code, out, err = weft(
        monkeypatch, capsys, *words, "--against", "inference-flops", "--json", "-"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["frontier"]
    evaluation = json.loads((runs / "wide" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["runs"][1]["final"] == evaluation["eval/loss"]
    _, table, _ = weft(monkeypatch, capsys, *words, "--against", "inference-flops")
    assert "frontier" in table
    assert "to match" not in table


def test_noise_of_a_run(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = weft(monkeypatch, capsys, "eval", str(runs / "small"), "--noise", "all")
    assert code == 0, err
    for kind in ("drop", "repeat", "upper", "random-case", "antspeak"):
        assert out.count(f" {kind} ") == 3
    assert "step_00000020_noise.json" in out
    words = ("--noise", "drop", "--noise-level", "0.5", "--noise-seed", "3", "--json")
    code, out, _ = weft(monkeypatch, capsys, "eval", str(runs / "small"), *words)
    found = json.loads(out)["noise"]
    assert code == 0
    assert (found["drop"]["level"], found["drop"]["seed"]) == (0.5, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "small"], "two or more different ones"),
        (["compare", "small", "nothing"], "is not a run"),
        (["compare", "small", "wide", "--metric", "eval/los"], "no finite eval/los"),
        (["compare", "small", "wide", "--plot", "small/config.yaml/a.png"], "cannot be written"),
        (["compare", "small", "wide", "--json", "none/a.json"], "cannot be written"),
        (["eval", "small", "--noise", "all", "--noise-level", "0.5"], "takes no level"),
        (["eval", "small", "--noise-level", "0.5"], "needs --noise"),
        (["eval", "small", "--noise", "drop", "--baselines"], "leave out --noise"),
    ],
)
def test_mistakes_are_one_line(
    runs: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    code, _, err = weft(monkeypatch, capsys, *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_the_command_offers_what_there_is() -> None:
    # Written twice, so that --help does not wait for NumPy.
    assert launch_compare.AXES == AXES
    assert set(launch_evaluate.NOISES) == {"all", *KINDS}


def test_nothing_of_it_imports_torch() -> None:
    lines = (
        "import sys, weft.launch.compare, weft.trainer.compare, weft.trainer.metrics.compare_plot",
        "import weft.trainer.noise",
        "sys.exit('torch' in sys.modules)",
    )
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], check=False)
    assert done.returncode == 0


def test_runs_against_a_baseline(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, wide, picture = str(runs / "small"), str(runs / "wide"), runs / "match.png"
    metrics = ("--metric", "loss", "--metric", "eval/loss")
    code, out, err = weft(
        monkeypatch,
        capsys,
        *("compare", small, wide, "--baseline", small, *metrics, "--plot", str(picture)),
    )
    assert code == 0, err
    for words in ("FLOPs to match small", "final of small", "by slope", "note: no control"):
        assert words in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = weft(monkeypatch, capsys, "compare", small, wide, *metrics)
    assert code == 2
    assert err.startswith("weft: error: 2 metrics without --baseline;")
    code, _, err = weft(
        monkeypatch, capsys, "compare", small, wide, "--baseline", small, "--smooth", "3"
    )
    assert code == 2
    assert "takes no --smooth" in err
