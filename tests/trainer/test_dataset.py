"""Opening data: prepared on first use by one rank, split, fingerprinted, and refused when it is not right."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_data_prepare import prepare, write_texts
from weft.models.errors import DataError
from weft.trainer.data import dataset as module
from weft.trainer.data.config import DataConfig, HeldOutConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data


def config(tmp_path: Path, *paths: Path | str, **rest: Any) -> DataConfig:
    sources = tuple(SourceConfig(name=f"s{i}", path=str(path)) for i, path in enumerate(paths))
    settings = {"sequence_length": 64, "cache_dir": str(tmp_path / "cache"), **rest}
    return DataConfig(sources=sources, **settings)


class FakeRank:
    """A rank among threads: broadcasts go through one shared slot."""

    def __init__(self, rank: int, world_size: int, shared: dict[str, Any]) -> None:
        self.rank, self.world_size, self._shared = rank, world_size, shared
        self.broadcasts = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast_json(self, value: Any) -> Any:
        self.broadcasts += 1
        if self.is_main:
            self._shared["value"] = json.dumps(value)
        self._shared["barrier"].wait(timeout=20)
        received = json.loads(self._shared["value"])
        self._shared["barrier"].wait(timeout=20)
        return received


def open_on_ranks(settings: DataConfig, ranks: int = 3) -> tuple[list[Any], list[FakeRank]]:
    """What each rank got: a dataset, or its error."""
    shared = {"barrier": threading.Barrier(ranks)}
    fakes = [FakeRank(rank, ranks, shared) for rank in range(ranks)]

    def one(rank: FakeRank) -> Dataset | DataError:
        try:
            return open_data(settings, rank)  # type: ignore[arg-type]
        except DataError as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, fakes)), fakes


def test_training_and_held_out_documents_are_all_there_and_apart(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=50, size=400)
    data = open_data(config(tmp_path, root, held_out=HeldOutConfig(documents=5)))
    source = data.source("s0")
    held_out = [data.vocabulary.decode_bytes(ids) for ids in data.held_out("s0")]
    texts = [path.read_bytes() for path in sorted(root.iterdir())]
    assert len(held_out) == 5
    assert set(held_out) <= set(texts)
    assert source.held_out_bytes == sum(map(len, held_out))
    assert source.train.tokens + source.held_out.tokens == sum(len(text) + 2 for text in texts)
    assert source.sequences == (source.train.tokens - 1) // 64
    assert sorted(source.document_lengths().tolist()) == sorted(len(text) + 2 for text in texts)


def test_the_cache_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, write_texts(tmp_path / "in"))
    first = open_data(settings)
    monkeypatch.setattr("weft.trainer.data.prepare.write_unit", None)
    assert open_data(settings).fingerprint == first.fingerprint
    assert [path.name.split("-")[0] for path in (tmp_path / "cache" / "data").iterdir()] == ["s0"]


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "elsewhere"))
    data = open_data(config(tmp_path, write_texts(tmp_path / "in"), cache_dir=None))
    assert data.sources[0].folder.parent == tmp_path / "elsewhere" / "data"


def test_ranks_wait_for_one_that_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = module.prepare_source

    def slow(*rest: Any, **more: Any) -> Any:
        calls.append(threading.current_thread().name)
        threading.Event().wait(0.3)
        return inner(*rest, **more)

    monkeypatch.setattr(module, "prepare_source", slow)
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    found, ranks = open_on_ranks(config(tmp_path, write_texts(tmp_path / "in")))
    assert len(calls) == 1
    assert all(item.fingerprint == found[0].fingerprint for item in found)
    assert {rank.broadcasts for rank in ranks} == {ranks[0].broadcasts}
    assert ranks[0].broadcasts >= 3, "the others are told that work goes on"


def test_errors_of_the_first_rank_reach_all(tmp_path: Path) -> None:
    found, _ = open_on_ranks(config(tmp_path, tmp_path / "gone"))
    assert len(found) == 3
    assert {str(error) for error in found} == {str(found[0])}
    assert "gone does not exist" in str(found[0])


def test_a_prepared_dataset_is_used_as_it_is(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in")
    manifest = prepare(root, tmp_path / "out", held_out=2)
    data = open_data(config(tmp_path, tmp_path / "out"))
    assert data.sources[0].manifest == manifest
    assert not (tmp_path / "cache").exists()


def test_refusals(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=12, size=400)
    with pytest.raises(DataError, match=r"data\.sources is empty; name at least one"):
        open_data(config(tmp_path))
    with pytest.raises(
        DataError, match=r"too few samples: source 's0' has \d+ ids .*one sample takes 100000"
    ):
        open_data(config(tmp_path, root, sequence_length=100_000))
    with pytest.raises(DataError, match="no source 'other'; there is s0"):
        open_data(config(tmp_path, root)).source("other")
    from test_vocabulary import train_tokenizer

    prepare(root, tmp_path / "out", vocabulary=f"hf:{train_tokenizer(tmp_path / 'tokenizer')}")
    with pytest.raises(
        DataError, match=r"was prepared with vocabulary kind hf.* and the recipe's is kind bytes"
    ):
        open_data(config(tmp_path, tmp_path / "out"))


def test_a_long_run_is_refused_where_passes_are_limited(tmp_path: Path) -> None:
    settings = config(tmp_path, write_texts(tmp_path / "in"))
    limited = settings.sources[0].model_copy(update={"max_epochs": 2.0})
    data = open_data(settings.model_copy(update={"sources": (limited,)}))
    data.check_samples(2 * data.sources[0].sequences)
    with pytest.raises(
        DataError, match=r"too few samples.*lower train\.steps, raise max_epochs, or add data"
    ):
        data.check_samples(2 * data.sources[0].sequences + 1)


def test_fingerprints_name_what_changed(tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "a"), write_texts(tmp_path / "b", seed=1)
    settings = config(tmp_path, first, second)
    saved = json.loads(json.dumps(open_data(settings).fingerprint))
    open_data(settings).check_fingerprint(saved)

    def changed(other: DataConfig) -> str:
        with pytest.raises(DataError) as caught:
            open_data(other).check_fingerprint(saved)
        return str(caught.value)

    assert "sequence length was 64 and is 32" in changed(
        settings.model_copy(update={"sequence_length": 32})
    )
    fewer = changed(settings.model_copy(update={"sources": settings.sources[:1]}))
    assert "source 's1' is gone" in fewer
    assert "source 's0'" not in fewer
    weighted = tuple(source.model_copy(update={"weight": 2.0}) for source in settings.sources)
    assert "the weight of source 's0' was None and is 2.0" in changed(
        settings.model_copy(update={"sources": weighted})
    )
    swapped = settings.model_copy(update={"sources": settings.sources[::-1]})
    assert "the order of the sources was s0, s1 and is s1, s0" in changed(swapped)
    (first / "000.txt").write_text("edited")
    message = changed(settings)
    assert "source 's0' has other content" in message
    assert "source 's1'" not in message
    assert "data.allow_changed=true" in message
    open_data(settings.model_copy(update={"allow_changed": True})).check_fingerprint(saved)


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="two sources are called 'a'"):
        DataConfig(sources=(SourceConfig(name="a", path="x"), SourceConfig(name="a", path="y")))
    with pytest.raises(ValidationError, match="some sources have a weight and 'b' has none"):
        DataConfig(
            sources=(SourceConfig(name="a", path="x", weight=1), SourceConfig(name="b", path="y"))
        )
    with pytest.raises(ValidationError, match="neither 'bytes' nor 'hf:PATH'"):
        DataConfig(vocabulary="gpt2")
