"""Scores against sums worked out by hand in float64 from each document alone, on one rank and on several."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import packed
from torch import nn
from weft.models import build_model, build_task
from weft.models.batch import PackedBatch
from weft.models.errors import DataError
from weft.models.task import LossOutput, Task
from weft.models.transformer.config import Config
from weft.trainer.baselines import compression_bits_per_byte, held_out_documents
from weft.trainer.data.config import DataConfig, HeldOutConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.distributed import Topology, initialise_distributed, shutdown_distributed
from weft.trainer.evaluation import Evaluation, evaluate
from weft.trainer.evaluation_config import EvalConfig

CONFIG = Config(
    vocab_size=260, n_layers=1, d_model=16, n_heads=2, d_ff=32, init_std=0.4, z_loss=1e-3
)
LENGTH = 24


class LocalEngine:
    """What evaluation asks of an engine, around a network in this process."""

    def __init__(self, network: nn.Module, task: Task, topology: Topology) -> None:
        self.networks, self.task, self.topology = {"model": network}, task, topology
        self.data_rank, self.data_ranks = topology.rank, topology.world_size
        self.batches: list[PackedBatch] = []

    def evaluate(self, batch: PackedBatch) -> LossOutput:
        self.batches.append(batch)
        with torch.no_grad():
            return self.task.losses(self.networks, batch)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class ThreadTopology(Topology):
    """Ranks as threads: exchanges meet at a barrier."""

    exchange: Callable[[int, Any], list[Any]]

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(part) for part in self.exchange(self.rank, json.dumps(value))]

    def sum_integers(self, values: Any) -> list[int]:
        return [sum(column) for column in zip(*self.gather_json(list(values)), strict=True)]


def run_threads(ranks: int, work: Callable[[Topology], Any]) -> list[Any]:
    barrier, slots, results = threading.Barrier(ranks, timeout=30), [None] * ranks, [None] * ranks

    def exchange(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    def run(rank: int) -> None:
        topology = ThreadTopology(rank=rank, world_size=ranks)
        object.__setattr__(topology, "exchange", exchange)
        try:
            results[rank] = work(topology)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("corpus")
    sources = []
    for name, count in (("alpha", 60), ("beta", 40)):
        (folder / name).mkdir()
        for i in range(count):
            text = f"{name} number {i}: " + "wörds and more " * (i % 5)
            (folder / name / f"{i:03d}.txt").write_text(text)
        sources.append(SourceConfig(name=name, path=str(folder / name)))
    config = DataConfig(
        sources=tuple(sources),
        sequence_length=LENGTH,
        held_out=HeldOutConfig(documents=4),
        cache_dir=str(folder / "cache"),
        prepare_workers=1,
    )
    return open_data(config)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_model(CONFIG, seed=1)


def scores(
    network: nn.Module, data: Dataset, config: EvalConfig, topology: Topology | None = None
) -> Evaluation:
    task = build_task(CONFIG)
    engine = LocalEngine(network, task, topology or Topology())
    found = evaluate(engine, task, data, config)  # type: ignore[arg-type]
    assert found is not None
    return found


def by_hand(network: nn.Module, data: Dataset, source: str) -> tuple[float, float, int, int, int]:
    """(sum of CE, sum of z^2, targets, bytes, ends): rows of the stream, one document piece at a time, in fp64."""
    wide = build_model(CONFIG, seed=1).double()
    stream: list[int] = []
    ends: set[int] = set()
    for ids in data.held_out(source):
        stream += [int(i) for i in ids]
        ends.add(len(stream) - 1)
    entropy = z = 0.0
    targets = raw = closing = 0
    for start in range(0, len(stream) - 1, LENGTH):
        row = stream[start : min(start + LENGTH, len(stream) - 1)]
        cuts = [
            0,
            *(e + 1 - start for e in sorted(ends) if start <= e < start + len(row) - 1),
            len(row),
        ]
        for low, high in itertools.pairwise(cuts):
            piece = torch.tensor(row[low:high])
            with torch.no_grad():
                logits = wide(packed(piece, [len(piece)], len(piece)), output="logits").double()
            for place in range(len(piece)):
                position = start + low + place
                if position in ends:
                    continue
                target = stream[position + 1]
                partition = float(torch.logsumexp(logits[place], 0))
                entropy += partition - float(logits[place, target])
                z += partition**2
                targets += 1
                raw += target >= 4
                closing += target < 4
    return entropy, z, targets, raw, closing


def test_scores_equal_the_sums_by_hand(network: nn.Module, data: Dataset) -> None:
    found = scores(network, data, EvalConfig(batch_tokens=3 * LENGTH))
    sums = {name: by_hand(network, data, name) for name in ("alpha", "beta")}
    sums["total"] = tuple(sum(column) for column in zip(*sums.values(), strict=True))  # type: ignore[assignment]
    for name, (entropy, z, targets, raw, closing) in sums.items():
        score = found.total if name == "total" else found.sources[name]
        assert score is not None
        assert (score.tokens, score.bytes, score.specials) == (targets, raw, closing)
        assert score.loss == pytest.approx(entropy / targets, rel=1e-6)
        assert score.perplexity == pytest.approx(math.exp(entropy / targets), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(entropy / math.log(2) / raw, rel=1e-6)
        with_specials = entropy / math.log(2) / (raw + closing)
        assert score.bits_per_byte_with_specials == pytest.approx(with_specials, rel=1e-6)
        assert score.others["z_loss"] == pytest.approx(z / targets, rel=1e-6)
    documents = held_out_documents(data)
    assert found.total is not None
    assert found.total.bytes == sum(len(text) for text in documents)
    assert found.total.specials == len(documents) == 8


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("max_tokens", [None, 3 * LENGTH])
def test_any_number_of_ranks_gives_the_very_same_numbers(
    network: nn.Module, data: Dataset, ranks: int, max_tokens: int | None
) -> None:
    config = EvalConfig(batch_tokens=2 * LENGTH, max_tokens=max_tokens)
    alone = scores(network, data, config)
    together = run_threads(ranks, lambda topology: scores(network, data, config, topology))
    assert together == [alone] * ranks
    if max_tokens:
        assert alone.sources["alpha"].tokens <= max_tokens


def evaluate_over_gloo(rank: int, port: int, config: DataConfig, out: str) -> None:
    """One process of two; leaves what it found in a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    topology = initialise_distributed("cpu")
    data = open_data(config, topology)
    found = scores(build_model(CONFIG, seed=1), data, EvalConfig(batch_tokens=2 * LENGTH), topology)
    Path(f"{out}.{rank}").write_text(json.dumps(found.as_dict()))
    shutdown_distributed()


def test_two_processes_give_the_very_same_numbers(
    network: nn.Module, data: Dataset, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = str(tmp_path / "found")
    torch.multiprocessing.spawn(evaluate_over_gloo, args=(port, data.config, out), nprocs=2)
    alone = scores(network, data, EvalConfig(batch_tokens=2 * LENGTH)).as_dict()
    for rank in range(2):
        assert json.loads(Path(f"{out}.{rank}").read_text()) == alone


def test_a_stop_on_one_rank_ends_it_on_all(network: nn.Module, data: Dataset) -> None:
    task = build_task(CONFIG)

    def work(topology: Topology) -> tuple[Any, int]:
        engine = LocalEngine(network, task, topology)
        asked = lambda: topology.rank == 1 and len(engine.batches) == 1  # noqa: E731
        found = evaluate(engine, task, data, EvalConfig(batch_tokens=LENGTH), should_stop=asked)  # type: ignore[arg-type]
        return found, len(engine.batches)

    assert run_threads(2, work) == [(None, 1), (None, 1)]


def test_metrics_are_flat_and_the_rest_is_json(network: nn.Module, data: Dataset) -> None:
    found = scores(network, data, EvalConfig())
    flat = found.as_metrics()
    assert found.total is not None
    assert flat["eval/loss"] == found.total.loss
    assert flat["eval/beta/bits_per_byte"] == found.sources["beta"].bits_per_byte
    assert flat["eval/alpha/z_loss"] == found.sources["alpha"].others["z_loss"]
    assert json.loads(json.dumps(found.as_dict()))["total"]["tokens"] == found.total.tokens


def test_without_held_out_documents_there_is_nothing_to_say(
    data: Dataset, network: nn.Module
) -> None:
    config = data.config.model_copy(update={"held_out": HeldOutConfig(documents=0)})
    found = scores(network, open_data(config), EvalConfig())
    assert found == Evaluation({}, None)
    assert found.as_metrics() == {}


def test_without_byte_lengths_bits_per_byte_are_left_out(
    network: nn.Module, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(data.vocabulary), "token_byte_lengths", lambda self: None)
    total = scores(network, data, EvalConfig()).total
    assert total is not None
    assert total.bits_per_byte is None
    assert "bits_per_byte" not in total.numbers()


def test_a_huge_loss_has_an_infinite_perplexity(data: Dataset) -> None:
    network = build_model(CONFIG, seed=1)
    with torch.no_grad():
        network.head.weight.mul_(1e5)
    total = scores(network, data, EvalConfig()).total
    assert total is not None
    assert total.perplexity == math.inf


def test_compressors_see_the_same_bytes(data: Dataset) -> None:
    documents = held_out_documents(data)
    found = compression_bits_per_byte(documents)
    raw = b"".join(documents)
    assert "wörds".encode() in raw
    assert found["gzip -9"] == pytest.approx(8 * len(gzip.compress(raw, 9)) / len(raw), rel=1e-9)
    assert 0 < found["xz -9"] < 16
    assert held_out_documents(data, "alpha") + held_out_documents(data, "beta") == documents
    with pytest.raises(DataError, match="no held-out bytes"):
        compression_bits_per_byte([])
