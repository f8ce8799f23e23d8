"""`weft data` as it is typed: results, errors of one line with exit code 2, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def weft(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "weft", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    root = tmp_path / "my texts"
    root.mkdir()
    for i in range(30):
        (root / f"{i}.txt").write_text(f"This is text {i}. " * (i + 5))
    return root


def test_prepare_then_inspect(texts: Path, tmp_path: Path) -> None:
    done = weft("data", "prepare", str(texts), "--out", "out", "--held-out", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out: 30 documents" in done.stdout
    assert "held out 2 documents, left out none" in done.stdout
    assert "next: weft data inspect out" in done.stdout
    again = weft(
        "data",
        "prepare",
        str(texts),
        "--out",
        "out",
        "--held-out",
        "2",
        "--workers",
        "2",
        cwd=tmp_path,
    )
    assert (again.returncode, again.stdout) == (0, done.stdout)
    shown = weft(
        "data",
        "inspect",
        "out",
        "--sequence-length",
        "64",
        "--samples",
        "1",
        "--verify",
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    assert "30" in shown.stdout
    assert "sample 0 from out" in shown.stdout


def test_inspect_a_recipe(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {vocab_size: 260, n_layers: 1, d_model: 32, n_heads: 2, d_ff: 64}\n"
        "data:\n  sequence_length: 64\n  sources:\n"
        f"    - {{name: mine, path: '{texts}'}}\n"
    )
    shown = weft(
        "data",
        "inspect",
        "recipe.yaml",
        "data.held_out.documents=1",
        cwd=tmp_path,
        WEFT_CACHE=str(tmp_path / "c"),
    )
    assert shown.returncode == 0, shown.stderr
    assert "sample 2 from mine" in shown.stdout
    assert "1 (" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "nowhere", "--out", "out"],
            "weft: error: source 'nowhere': nowhere does not exist",
        ),
        (["prepare", "empty", "--out", "out"], "empty holds no text files with anything in them"),
        (
            ["prepare", "texts", "--out", "out", "--vocabulary", "hf:nowhere"],
            "no tokenizer at nowhere",
        ),
        (
            ["prepare", "texts", "--out", "out", "--vocabulary", "gpt2"],
            "unknown vocabulary 'gpt2'; use bytes or hf:PATH",
        ),
        (["prepare", "bad.jsonl", "--out", "out"], "bad.jsonl line 1 is not JSON"),
        (
            ["prepare", "texts", "--out", "empty/../texts"],
            "texts exists and is not a prepared dataset",
        ),
        (["inspect", "texts"], "texts"),
        (["prepare", "texts"], "Missing option '--out'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "bad.jsonl").write_text("{\n")
    before = sorted(tmp_path.rglob("*"))
    done = weft("data", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["config", "vocabulary", "prepare", "order", "sources"])
def test_preparing_needs_no_torch(name: str, tmp_path: Path) -> None:
    code = (
        f"import sys, weft.trainer.data.{name}, weft.launch.data; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
