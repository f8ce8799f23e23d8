"""`weft convert` as a person types it: what it prints, its exit code, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weft.launch.cli import main
from weft.launch.convert import parse_size
from weft.models.errors import ConfigError
from weft.models.transformer.config import Config
from weft.models.transformer.hugging_face import (
    parameter_shapes,
    to_hugging_face_config,
    to_hugging_face_name,
)


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["weft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    return run


def write_model(folder: Path, **change: Any) -> dict[str, torch.Tensor]:
    config = Config(vocab_size=260, n_layers=2, d_model=32, n_heads=4, d_ff=48)
    settings = to_hugging_face_config(
        config, max_positions=128, eos_id=2, bos_id=1, pad_id=3, dtype="float32"
    )
    tensors = {
        to_hugging_face_name(n, config): torch.randn(s) for n, s in parameter_shapes(config).items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_there_and_back(weft: Any, tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "hf")
    code, out, _ = weft(
        "convert", "import", tmp_path / "hf", tmp_path / "run", "data.sequence_length=64"
    )
    assert code == 0
    assert "checkpoints/step_00000000" in out
    assert "samples of 64 positions" in out
    code, out, _ = weft(
        "convert", "export", tmp_path / "run", tmp_path / "back", "--max-shard-size", "40KB"
    )
    assert code == 0
    assert "step_00000000 as fp32" in out
    shards = [load_file(path) for path in sorted((tmp_path / "back").glob("model-*.safetensors"))]
    assert len(shards) > 1
    back = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"attention_bias": True}, (), "attention_bias=True; only False can be imported"),
        (
            {"model_type": "gpt2"},
            (),
            "model_type 'gpt2'; only blt, llama, llava, llava_next, mamba and olmo2 can be imported",
        ),
        ({"hidden_size": 64}, (), "config.json's model has"),
        ({}, ("data.sequnce_length=64",), "did you mean data.sequence_length?"),
        ({}, ("--tokenizer", "nowhere"), "there is no tokenizer.json in nowhere"),
    ],
)
def test_bad_imports_are_one_line_and_leave_nothing(
    weft: Any, tmp_path: Path, change: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    write_model(tmp_path / "hf", **change)
    code, out, err = weft("convert", "import", tmp_path / "hf", tmp_path / "run", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("weft: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_exports_are_one_line_and_leave_nothing(weft: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    weft("convert", "import", tmp_path / "hf", tmp_path / "run")
    target = tmp_path / "back"
    for arguments, message in (
        ((tmp_path / "absent", target), "is not a run"),
        ((tmp_path / "run", target, "--step", 7), "no checkpoint of step 7; it has 0"),
        ((tmp_path / "run", target, "--max-shard-size", "big"), "is not a size"),
        ((tmp_path / "run", tmp_path / "hf"), "already exists"),
    ):
        code, out, err = weft("convert", "export", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_pickled_weights_are_refused(weft: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    code, _, err = weft("convert", "import", tmp_path / "hf", tmp_path / "run")
    assert code == 2
    assert "only pickled weights (pytorch_model.bin)" in err
    assert not (tmp_path / "run").exists()


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500 mb": 5 * 10**8, "1.5GiB": 3 * 2**29, "77": 77}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "5 parsecs", "-1GB", "0"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(text)
