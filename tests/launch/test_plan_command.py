"""`weft plan` as a person types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from weft.launch.cli import main


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["weft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    return run


def test_tables(weft: Any) -> None:
    code, out, _ = weft("plan", "olmo2/7b", "--gpus", 256, "--mfu", 0.45)
    assert code == 0
    for part in (
        "7,298,617,344",
        "4.777e+10",
        "fsdp on 256 GPUs",
        "fits:",
        "at 45% of 989.5 TFLOP/s",
    ):
        assert part in out
    assert "Assumed:" in out


def test_what_does_not_fit_says_what_would(weft: Any) -> None:
    code, out, _ = weft("plan", "olmo2/7b", "--gpus", 64, "--gpu-memory", 50)
    assert code == 0
    assert "does not fit" in out
    lines = out.split("layouts that fit, fastest first:\n")[1].split("\n\n")[0].splitlines()
    assert lines
    for line in lines:
        overrides = line.partition("sent: ")[2].split()
        _, again, _ = weft("plan", "olmo2/7b", "--gpu-memory", 50, "--gpus", 64, *overrides)
        assert "\nfits: " in again
    _, out, _ = weft("plan", "olmo2/7b", "--gpus", 8, "--gpu-memory", 50)
    way = out.split("it fits with: ")[1].splitlines()[0].split()
    _, again, _ = weft("plan", "olmo2/7b", "--gpu-memory", 50, *way)
    assert "\nfits: " in again
    _, out, _ = weft("plan", "olmo2/7b", "--gpus", 8, "--gpu-memory", 3)
    assert "it fits with: more memory a GPU" in out


def test_links_disks_and_deepspeed(weft: Any) -> None:
    _, out, _ = weft("plan", "olmo2/7b", "--gpus", 256, "--disk", 8, "--link", 25)
    assert "save: 10.9 seconds in the background at 8 GB/s" in out
    assert "sent by a GPU a step: 84 GB (weights 54.9 GB, gradients 29.1 GB)" in out
    _, out, _ = weft("plan", "olmo2/7b", "--gpus", 64, "--zero", 3, "--offload", "optimizer")
    assert "DeepSpeed ZeRO-3 on 64 GPUs" in out
    assert "host memory: 1.82 GB a GPU" in out


def test_json_follows_overrides(weft: Any) -> None:
    _, out, _ = weft("plan", "olmo2/debug", "--json", "model.n_layers=4", "train.steps=7")
    data = json.loads(out)
    assert data["tokens"] == 7 * 2048
    _, out, _ = weft("plan", "olmo2/debug", "--json")
    assert data["parameters"]["blocks"] == 2 * json.loads(out)["parameters"]["blocks"]


def test_errors_are_one_line(weft: Any) -> None:
    for arguments, message in (
        (("olmo2/8b",), "there is no recipe 'olmo2/8b'"),
        (("olmo2/7b", "--gpus", 3), "do not divide over 3 ranks"),
        (("olmo2/7b", "model.d_mdel=1"), "did you mean model.d_model?"),
        (("olmo2/7b", "--mfu", 1.5), "--mfu"),
        (("olmo2/7b", "--offload", "all", "--zero", 2), "all needs --zero 3"),
        (("olmo2/7b", "--offload", "optimizer"), "needs --zero"),
    ):
        code, out, err = weft("plan", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err


def test_docs_show_what_is_printed(weft: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    blocks = re.findall(r"```console\n\$ weft (.+)\n([^`]+)```", page)
    assert len(blocks) == 2
    for command, shown in blocks:
        _, out, _ = weft(*command.split())
        assert [line.rstrip() for line in out.rstrip().splitlines()] == shown.splitlines()
