"""Model folders: what is read, what is refused, and that an output is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weft.models.errors import CheckpointError, ConfigError
from weft.trainer.hugging_face_folder import (
    copy_tokenizer,
    open_tensors,
    read_stored,
    special_ids,
    staged_folder,
    write_shards,
)

TENSORS = {
    "a": torch.randn(4, 3),
    "b": torch.randn(5).to(torch.bfloat16),
    "c": torch.randn(2, 2, dtype=torch.float64),
}


def save_sharded(folder: Path) -> None:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    placed = {name: f"{name}.safetensors" for name in TENSORS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("layout", ["single", "other name", "sharded", "no index"])
def test_reads_every_layout(tmp_path: Path, layout: str) -> None:
    if layout in ("single", "other name"):
        file = "model.safetensors" if layout == "single" else "weights.safetensors"
        save_file(TENSORS, tmp_path / file)
    else:
        save_sharded(tmp_path)
    if layout == "no index":
        (tmp_path / "model.safetensors.index.json").unlink()
    found = open_tensors(tmp_path)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": "F32",
        "b": "BF16",
        "c": "F64",
    }
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(read_stored(found[name]), tensor)


def test_shards_are_written_in_order_and_read_one_file_at_a_time(tmp_path: Path) -> None:
    source = {name: torch.randn(10) for name in "fedcba"}
    told: list[int] = []
    files = write_shards(
        tmp_path,
        dict.fromkeys(source, (10,)),
        source.__getitem__,
        dtype=torch.bfloat16,
        max_shard_bytes=45,
        progress=told.append,
    )
    assert [file.name for file in files] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 45 for file in files)
    assert told == [20] * 6
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 60, "total_size": 120}
    assert index["weight_map"]["f"] == files[0].name
    found = open_tensors(tmp_path)
    assert all(torch.equal(read_stored(found[n]), source[n].bfloat16()) for n in source)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_shards(
        tmp_path,
        {"a": (3,)},
        lambda name: torch.ones(3),
        dtype=torch.float32,
        max_shard_bytes=10**9,
        progress=lambda count: None,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


class Executed(Exception):
    """Raised by a pickle that should not have been opened."""


def explode() -> None:
    raise Executed


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[()]]:
        return explode, ()


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"only pickled weights \(pytorch_model.bin\).*never opened"
    ):
        open_tensors(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        open_tensors(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no safetensors"):
        open_tensors(tmp_path)
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a in .* is I8"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped header"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[:-8]
    elif damage == "empty":
        data = bytearray()
    else:
        data[8] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged") as raised:
        open_tensors(tmp_path)
    assert "\n" not in str(raised.value)


def test_index_faults_are_named(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is not in"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "c.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"places b in c\.safetensors"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_tensors(tmp_path)
    index.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        open_tensors(tmp_path)


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="a is in"):
        open_tensors(tmp_path)


def test_special_ids_and_tokenizer_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tokenizer = {
        "model": {"vocab": {"a": 0, "<bos>": 1}},
        "added_tokens": [{"content": "<eos>", "id": 7}],
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert special_ids(source) == {"bos": None, "eos": None, "pad": None}
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert special_ids(source) == {"bos": 1, "eos": 7, "pad": None}
    (source / "model.safetensors").write_text("weights")
    copy_tokenizer(source, target)
    assert sorted(p.name for p in target.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def stage(out: Path, text: str, error: Exception | None = None, **settings: object) -> None:
    """Put a file into a staged folder, then fail if there is something to fail with."""
    with staged_folder(out, **{"overwrite": False, "marker": "m", **settings}) as staging:
        (staging / "m").write_text(text)
        if error is not None:
            raise error


def test_a_failed_output_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        stage(tmp_path / "out", "1", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"cannot write .*out.*No space left"):
        stage(tmp_path / "out", "1", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_replaced_only_when_asked_and_only_if_it_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage(out, "1")
    with pytest.raises(ConfigError, match="--overwrite"):
        stage(out, "2")
    with pytest.raises(ZeroDivisionError):
        stage(out, "2", ZeroDivisionError(), overwrite=True)
    assert (out / "m").read_text() == "1"
    stage(out, "2", overwrite=True)
    assert (out / "m").read_text() == "2"
    with pytest.raises(ConfigError, match="no other"):
        stage(out, "3", overwrite=True, marker="other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
