"""`weft generate` and `weft eval`: arguments, output, and errors of one line with exit code 2."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from weft.launch import cli
from weft.launch import generate as launch_generate
from weft.models import build_model
from weft.models.errors import CheckpointError
from weft.models.transformer.config import Config
from weft.trainer.data.vocabulary import ByteVocabulary
from weft.trainer.distributed import Topology
from weft.trainer.generation import generate

CONFIG = Config(vocab_size=260, n_layers=1, d_model=16, n_heads=2, d_ff=32, init_std=0.4)
REPORT = {
    "step": 30,
    "overrides": [],
    "sources": {
        "alpha": {
            "loss": 1.5,
            "perplexity": 4.4817,
            "bits_per_byte": 2.2,
            "tokens": 1234,
            "bytes": 1200,
        },
        "beta": {"loss": 900.0, "perplexity": "Infinity", "tokens": 10, "bytes": 0},
    },
    "total": {"loss": 1.6, "perplexity": 4.9, "bits_per_byte": 2.3, "tokens": 1244, "bytes": 1200},
    "baselines": {"gzip -9": 2.5, "xz -9": 2.25},
}


class OpenedRun:
    """An opened run whose network has never been trained."""

    def __init__(self, rank: int) -> None:
        network = build_model(CONFIG, seed=1)
        self.network = network
        self.topology = Topology(rank=rank)
        self.config = types.SimpleNamespace(data=types.SimpleNamespace(vocabulary="bytes"))

    def network_for_generation(self) -> Any:
        return self.network

    def __enter__(self) -> OpenedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, with the opening of runs and their evaluation replaced; `calls` and `rank` steer and record it."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text("{}")
    trained: Any = types.ModuleType("weft.trainer.trained")
    trained.calls, trained.rank, trained.error = [], 0, None

    def open_trained(
        folder: Path, step: int | None, overrides: tuple[str, ...], **settings: bool
    ) -> OpenedRun:
        trained.calls.append((folder, step, overrides))
        if trained.error:
            raise trained.error
        return OpenedRun(trained.rank)

    trained.open_trained = open_trained
    evaluation: Any = types.ModuleType("weft.trainer.run_evaluation")
    evaluation.evaluate_trained = lambda trained, overrides, with_baselines: {
        name: value for name, value in REPORT.items() if with_baselines or name != "baselines"
    }
    evaluation.report_path = lambda folder, step: folder / "eval" / f"step_{step:08d}.json"
    monkeypatch.setitem(sys.modules, "weft.trainer.trained", trained)
    monkeypatch.setitem(sys.modules, "weft.trainer.run_evaluation", evaluation)
    return tmp_path / "first"


def weft(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def opened() -> Any:
    return sys.modules["weft.trainer.trained"]


def expected(prompts: list[str], **settings: Any) -> list[Any]:
    return generate(build_model(CONFIG, seed=1), ByteVocabulary(), prompts, **settings)


def test_generate_prints_what_the_library_gives(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--prompt",
        "ab",
        "--prompt",
        "cd",
        "--num-samples",
        2,
        "--seed",
        5,
        "--max-new-tokens",
        9,
    ]
    assert weft(monkeypatch, "generate", run, *arguments, "--top-k", 20, "--json") == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = expected(
        ["ab", "ab", "cd", "cd"], seed=5, max_new_tokens=9, temperature=0.8, top_p=0.95, top_k=20
    )
    assert [sample["prompt"] for sample in samples] == ["ab", "ab", "cd", "cd"]
    assert [sample["token_ids"] for sample in samples] == [one.token_ids for one in wanted]
    assert samples[0]["token_ids"] != samples[1]["token_ids"]
    assert [sample["text"] for sample in samples] == [one.text for one in wanted]


def test_generate_reads_files_stops_and_steps(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = run / "prompt.txt"
    prompt.write_text("line one\nline two\n")
    greedy = expected([prompt.read_text()], max_new_tokens=6, ignore_eos=False)[0]
    stop = greedy.text[2:4]
    options = [
        "--prompt-file",
        prompt,
        "--temperature",
        0,
        "--max-new-tokens",
        6,
        "--stop",
        stop,
        "--step",
        40,
    ]
    assert weft(monkeypatch, "generate", run, *options, "run.device=cpu") == 0
    assert (
        capsys.readouterr().out == f"line one\nline two\n{greedy.text[: greedy.text.find(stop)]}\n"
    )
    assert opened().calls == [(run, 40, ("run.device=cpu",))]


def test_without_a_prompt_a_document_is_made_up(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "generate", run, "--temperature", 0, "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out == expected([""], max_new_tokens=4)[0].text + "\n"


def test_a_stream_is_what_is_printed_at_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "ab", "--max-new-tokens", 40, "--stop", "zz"]
    assert weft(monkeypatch, "generate", run, *options, "--no-stream") == 0
    printed = capsys.readouterr()
    assert weft(monkeypatch, "generate", run, *options, "--stream") == 0
    assert capsys.readouterr() == printed
    assert weft(monkeypatch, "generate", run, *options, "--stream", "--num-samples", 2) == 2
    assert "--stream prints one sample" in capsys.readouterr().err


def test_a_model_without_patches_shows_none(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "generate", run, "--show-patches") == 2
    assert capsys.readouterr().err == (
        "weft: error: --show-patches: this model has no patches; leave it out\n"
    )


def test_only_rank_0_prints(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened().rank = 1
    assert weft(monkeypatch, "generate", run, "--max-new-tokens", 2) == 0
    assert weft(monkeypatch, "eval", run) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top-p"),
        (["--top-p", "1.5"], "top-p"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--num-samples", "0"], "num-samples"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_options_are_answered_before_anything_is_loaded(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    word: str,
) -> None:
    assert weft(monkeypatch, "generate", run, *options) == 2
    assert word in capsys.readouterr().err
    assert opened().calls == []


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_what_is_no_run_and_a_missing_checkpoint_are_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert weft(monkeypatch, verb, run.parent / "fist") == 2
    error = capsys.readouterr().err
    assert error.startswith("weft: error: ")
    assert str(run) in error
    opened().error = CheckpointError("no checkpoint of step 7; there are 10, 20")
    assert weft(monkeypatch, verb, run, "--step", 7) == 2
    assert capsys.readouterr().err == "weft: error: no checkpoint of step 7; there are 10, 20\n"


def test_eval_prints_a_table_and_says_where_the_report_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "eval", run, "--baselines") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["alpha", "1.5000", "4.482", "2.2000", "1,234", "1,200"] in lines
    assert ["beta", "900.0000", "Infinity", "-", "10", "0"] in lines
    assert ["total", "1.6000", "4.900", "2.3000", "1,244", "1,200"] in lines
    assert any(line[:3] == ["gzip", "-9:", "2.5000"] for line in lines)
    assert lines[-1][-1].endswith("first/eval/step_00000030.json")


def test_eval_as_json(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "eval", run, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {name: value for name, value in REPORT.items() if name != "baselines"}


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_help_ends_with_examples(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, verb, "--help") == 0
    assert f"weft {verb} runs/quickstart" in capsys.readouterr().out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["--image"], (1.0, 1.0)),
        (["--image", "--temperature", 0.8], (0.8, 1.0)),
        (["--speech", "--top-p", 0.95], (1.0, 0.95)),
        (["--interleaved"], (0.8, 0.95)),
    ],
)
def test_codes_are_drawn_from_all_unless_something_else_is_typed(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: list[object],
    wanted: tuple[float, float],
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(launch_generate, "_is_interleaved", lambda *arguments: True)
    monkeypatch.setattr(
        "weft.launch.generate_interleaved.make_samples",
        lambda folder, step, overrides, request, out, **settings: made.append(request),
    )
    assert weft(monkeypatch, "generate", run, "--prompt", "three", *typed) == 0
    assert [(one.temperature, one.top_p) for one in made] == [wanted]
