"""`weft quickstart`: what it says is there is there, and what it suggests can be typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image
from torch.distributed.run import get_args_parser
from weft.launch import cli, quickstart
from weft.trainer.checkpoint.reading import find_checkpoint

STEPS = 30
EVERY_MODEL = [
    "data.sequence_length=64",
    "data.held_out.documents=2",
    "run.threads=1",
    "run.device=cpu",
]
SMALL = [
    "model.encoder.d_model=32",
    "model.encoder.d_ff=64",
    "model.decoder.d_model=32",
    "model.decoder.d_ff=64",
    "model.latent.n_layers=1",
    "model.latent.d_model=64",
    "model.latent.d_ff=64",
    "model.ngram.rows=1024",
    "train.batch_tokens=512",
    "schedule.warmup_steps=5",
    "checkpoint.every=15",
    "entropy.train.steps=20",
    "entropy.train.batch_tokens=512",
    *EVERY_MODEL,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    """Standard output of the command, run as a newcomer would."""
    done = subprocess.run(
        [sys.executable, "-m", "weft", "quickstart", f"train.steps={STEPS}", *SMALL],
        cwd=folder,
        env={**os.environ, "WEFT_CACHE": str(folder / "cache")},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


def test_nothing_is_written_elsewhere(folder: Path, said: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "runs"]
    runs = sorted(p.name for p in (folder / "runs").iterdir())
    assert runs == ["quickstart", "quickstart-entropy"]


def test_the_files_it_names_exist(folder: Path, said: str) -> None:
    found = re.search(r"Everything is in (\S+)/:\n((?:  .*\n)+)", said)
    assert found is not None
    run = folder / found[1]
    named = [line.split()[0] for line in found[2].splitlines()]
    assert named == ["config.yaml", "metrics.jsonl", "checkpoints/", "plots/loss.png"]
    assert all((run / name).exists() for name in named)
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= STEPS
    path = find_checkpoint(run)
    assert path is not None
    assert path.name == f"step_{STEPS:08d}"


def test_the_plot_is_a_picture(folder: Path, said: str) -> None:
    with Image.open(folder / "runs" / "quickstart" / "plots" / "loss.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 2


def test_the_numbers_shown_are_those_of_the_report(folder: Path, said: str) -> None:
    report = json.loads(
        (folder / "runs" / "quickstart" / "eval" / f"step_{STEPS:08d}.json").read_text()
    )
    rows = {
        found[1].strip(): float(found[2])
        for found in re.finditer(r"^ (.+?) +(\d+\.\d{3}) .*$", said, re.MULTILINE)
    }
    ours = report["total"]["bits_per_byte"]
    assert rows == {
        "blt/quickstart": round(ours, 3),
        **{name: round(value, 3) for name, value in report["baselines"].items()},
    }
    assert set(report["baselines"]) == {"gzip -9", "xz -9"}
    assert f"{report['total']['bytes']:,} held-out bytes" in said
    # Thirty steps of a tiny model beat no compressor, but they beat guessing among 256 bytes.
    assert max(report["baselines"].values()) < ours < 8
    assert "beats" not in said


def test_the_time_of_the_entropy_model_is_told(folder: Path, said: str) -> None:
    found = re.search(
        r"^Patches of ([\d.]+) bytes on average. The entropy model was trained in (\d+) s and took (\d+)% of",
        said,
        re.MULTILINE,
    )
    assert found is not None
    lines = (folder / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if '"patch_size"' in line]
    per_byte = sum(1 / record["patch_size"] for record in records) / len(records)
    assert float(found[1]) == round(1 / per_byte, 1)
    shares = [record["entropy_model_share"] for record in records]
    assert int(found[3]) == round(100 * sum(shares) / len(shares))


def test_the_sample_continues_the_prompt(said: str) -> None:
    shown = said.partition("drawing the curves\n\n")[2].rpartition(" held-out bytes")[0]
    shown = shown.rpartition("\n")[0].rstrip("\n")
    text = "\n".join(line.removeprefix("    ") for line in shown.splitlines())
    assert text.replace("|", "").startswith(quickstart.PROMPT)
    assert len(text) > len(quickstart.PROMPT) + 20
    assert "|" in text


def suggestions(said: str) -> list[str]:
    lines = said.partition("\nTry next:\n")[2].splitlines()
    return [line.strip() for line in lines if re.match("  [^ ]", line)]


def weft_arguments(line: str) -> list[str]:
    """What follows `weft`, also behind torchrun, whose own options must be its own."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        place = words.index("-m")
        parsed = get_args_parser().parse_args(words[1:])
        assert (parsed.module, parsed.training_script) == (True, "weft")
        words = words[place + 1 :]
    assert words[0] == "weft", line
    return words[1:]


def parse(arguments: list[str]) -> None:
    """Everything click does short of running the command.

    Raises:
        click.UsageError: there is no such command, option or value.
    """
    context, command, name = click.Context(cli.cli, info_name="weft"), cli.cli, "weft"
    while isinstance(command, click.Group):
        found, command, arguments = command.resolve_command(context, arguments)
        assert found is not None
        assert command is not None
        name, context = found, click.Context(command, info_name=found, parent=context)
    command.make_context(name, list(arguments), parent=context.parent)


def test_what_to_try_next_can_be_typed(
    folder: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    lines = suggestions(said)
    assert len(lines) == 9
    for line in lines:
        arguments = weft_arguments(line)
        parse(arguments)
        if arguments[0] == "train":
            # Its keys and values are looked at too.
            command = cli.cli.get_command(click.Context(cli.cli), "train")
            assert command is not None
            result = CliRunner().invoke(command, [*arguments[1:], "--print-config"])
            assert result.exit_code == 0, f"{line}: {result.output}"
    for wrong in (
        ["tran"],
        ["plan", "olmo2/7b", "--gups", "64"],
        ["debug", "seam", "x", "--stepz", "2"],
    ):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_the_next_one_takes_the_next_free_folder_and_compares(
    folder: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WEFT_CACHE", str(folder / "cache"))
    monkeypatch.setattr(quickstart, "BYTES_RECIPE", "olmo2/debug")
    runs = folder / "runs"
    before = sorted((str(p), p.stat().st_mtime_ns) for p in runs.rglob("*"))
    (runs / "quickstart-2-entropy").mkdir()
    settings = ["train.steps=12", *SMALL]
    result = CliRunner().invoke(quickstart.command, ["--compare", *settings], standalone_mode=False)
    assert result.exception is None, result.output
    assert result.return_value == 0
    assert "Everything is in runs/quickstart-3/:" in result.output
    for name in ("quickstart-3", "quickstart-3-entropy", "quickstart-3-bytes"):
        assert find_checkpoint(runs / name) is not None
    assert list((runs / "quickstart-2-entropy").iterdir()) == []
    after = sorted((str(p), p.stat().st_mtime_ns) for p in runs.rglob("*"))
    assert [item for item in after if "/quickstart-" not in item[0] and item[0] != str(runs)] == [
        item for item in before if "/quickstart-" not in item[0] and item[0] != str(runs)
    ]
    assert "weft train --resume runs/quickstart-3 " in result.output
    assert re.search(r"^ olmo2/debug +\d+\.\d{3} +\d+ +[\d.e+]+ $", result.output, re.MULTILINE)
    with Image.open(runs / "quickstart-3" / "plots" / "compare.png") as picture:
        assert picture.format == "PNG"


def test_only_what_is_beaten_is_said_to_be(
    folder: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        "blt/quickstart": {"bits_per_byte": 1.0, "bytes": 10},
        "olmo2/quickstart": {"bits_per_byte": 0.9, "bytes": 10},
    }
    folders = dict.fromkeys(scores, folder / "runs" / "quickstart")
    quickstart._print_scores(scores, {"gzip -9": 2.0, "xz -9": 0.8}, folders)
    assert "blt/quickstart beats gzip -9.\n" in capsys.readouterr().out


def test_a_folder_of_ones_own_can_be_typed_too(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("my runs") / "it's"
    quickstart._print_folders(run, run / "plots" / "loss.png", 60.0)
    said = capsys.readouterr().out
    named = [weft_arguments(line) for line in suggestions(said)]
    assert ["train", "--resume", str(run), "train.steps=4000"] in named
    assert named[1][:2] == ["generate", str(run)]
    assert ["compare", str(run), f"{run}-bytes", "--plot", "compare.png"] in named
