"""Checkpoints: what is saved is what is loaded, on any number of ranks, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import FakeTopology, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors import safe_open
from weft.models.errors import CheckpointError
from weft.trainer.checkpoint import manager as manager_module
from weft.trainer.checkpoint import writing
from weft.trainer.checkpoint.config import CheckpointConfig
from weft.trainer.checkpoint.manager import CheckpointManager
from weft.trainer.checkpoint.reading import (
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    read_tensor,
    verify_checkpoint,
)
from weft.trainer.checkpoint.writing import write_checkpoint
from weft.trainer.distributed import Topology
from weft.trainer.engines.protocol import TensorShard

TENSORS = {
    "parameters/model/a": torch.randn(7, 5),
    "parameters/model/half": torch.randn(4, 3).bfloat16(),
    "optimizer/exp_avg/model/a": torch.randn(7, 5).double(),
    "optimizer/count": torch.tensor(3),
    "parameters/model/none": torch.zeros(0, 4),
}


def shards_of(
    tensors: dict[str, torch.Tensor], rank: int = 0, cuts: dict[str, list[int]] | None = None
) -> list[TensorShard]:
    """This rank's range of each tensor; `cuts[name]` are the borders of all ranks' ranges."""
    found = []
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        low, high = (0, flat.numel()) if cuts is None else cuts[name][rank : rank + 2]
        whole = high - low == flat.numel()
        part = tensor.clone() if whole else flat[low:high].clone()
        found.append(
            TensorShard(name, tuple(tensor.shape), low, part, cuts is not None or rank == 0)
        )
    return found


def empty_like(shards: list[TensorShard]) -> list[TensorShard]:
    return [
        TensorShard(s.name, s.shape, s.start, torch.full_like(s.tensor, 99), s.is_writer)
        for s in shards
    ]


def save_one(
    run: Path, step: int, scale: float = 1.0, topology: Any = None, **settings: Any
) -> CheckpointManager:
    manager = CheckpointManager(
        run, CheckpointConfig(**{"keep": 10, **settings}), topology or Topology()
    )
    tensors = {n: t * scale if t.is_floating_point() else t for n, t in TENSORS.items()}
    manager.save(step, shards_of(tensors), {"step": step}, {"rng": "x"}, blocking=True)
    return manager


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path, asynchronous: bool) -> None:
    manager = CheckpointManager(tmp_path, CheckpointConfig(asynchronous=asynchronous), Topology())
    shards = shards_of(TENSORS)
    manager.save(5, shards, {"step": 5, "note": "kept"}, {"rng": [1, 2]})
    # A background save must hold the values of the moment it was asked for.
    for shard in shards:
        shard.tensor.zero_()
    manager.wait()
    path = manager.find_latest()
    assert path is not None
    assert path.name == "step_00000005"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005\n"
    into = empty_like(shards)
    loaded = manager.load(path, into, complete=True)
    assert (loaded.step, loaded.state, loaded.rank_state) == (
        5,
        {"step": 5, "note": "kept"},
        {"rng": [1, 2]},
    )
    for shard in into:
        assert torch.equal(shard.tensor, TENSORS[shard.name])
    with safe_open(next(path.glob("*.safetensors")), "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(opened.get_tensor(name), TENSORS[name])


def cut_points(draw: Any, numel: int, ranks: int) -> list[int]:
    inner = sorted(draw(st.integers(0, numel)) for _ in range(ranks - 1))
    return [0, *inner, numel]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_split_loads_into_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    run = tmp_path_factory.mktemp("run")
    writers, readers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    out, into = (
        {n: cut_points(data.draw, t.numel(), w) for n, t in TENSORS.items()}
        for w in (writers, readers)
    )

    def write(topology: FakeTopology) -> None:
        manager = CheckpointManager(run, CheckpointConfig(), topology)
        manager.save(1, shards_of(TENSORS, topology.rank, out), {}, {}, blocking=True)

    def read(topology: FakeTopology) -> None:
        manager = CheckpointManager(run, CheckpointConfig(), topology)
        wanted = shards_of(TENSORS, topology.rank, into)
        filled = empty_like(wanted)
        manager.load(manager.find_latest(), filled, complete=True)
        for a, b in zip(filled, wanted, strict=True):
            assert torch.equal(a.tensor.view(-1), b.tensor.view(-1)), a.name

    for result in [*on_ranks(writers, write), *on_ranks(readers, read)]:
        assert result is None, result
    assert read_manifest(run / "checkpoints" / "step_00000001").world_size == writers
    assert torch.equal(
        read_tensor(run / "checkpoints" / "step_00000001", "parameters/model/a"),
        TENSORS["parameters/model/a"],
    )


def save_on_rank(topology: Topology, run: str) -> list[Any]:
    cuts = {n: [0, t.numel() // 2, t.numel()] for n, t in fixed_tensors().items()}
    manager = CheckpointManager(Path(run), CheckpointConfig(), topology)
    manager.save(3, shards_of(fixed_tensors(), topology.rank, cuts), {}, {"rank": topology.rank})
    manager.wait()
    return [str(manager.find_latest()), topology.gather_json(topology.rank)]


def fixed_tensors() -> dict[str, torch.Tensor]:
    return {"parameters/model/a": torch.arange(24.0).view(6, 4), "optimizer/x": torch.arange(5)}


def test_two_real_ranks_save_what_one_loads(tmp_path: Path) -> None:
    results = run_ranks(2, "test_checkpoint:save_on_rank", str(tmp_path))
    assert results[0] == results[1]
    assert results[0][1] == [0, 1]
    manager = CheckpointManager(tmp_path, CheckpointConfig(), Topology())
    into = empty_like(shards_of(fixed_tensors()))
    manager.load(manager.find_latest(), into)
    for shard in into:
        assert torch.equal(shard.tensor, fixed_tensors()[shard.name])


def damage_truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 3)


def damage_flip(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 4
    file.write_bytes(raw)


def damage_remove(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-40])


def damage_hole(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    data["tensors"]["parameters/model/a"]["chunks"] = []
    (path / "manifest.json").write_text(json.dumps(data))


def damage_pickle(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(pickle.dumps(_Bomb()))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/weft-test-bomb",))


DAMAGES = {
    damage_truncate: "bytes instead of",
    damage_flip: "does not match its checksum",
    damage_remove: "is missing",
    damage_manifest: "damaged",
    damage_hole: "parameters/model/a",
    damage_pickle: "bytes instead of",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save_one(tmp_path, 1)
    manager = save_one(tmp_path, 2, scale=2.0)
    bad = tmp_path / "checkpoints" / "step_00000002"
    damage(bad)
    (problem,) = verify_checkpoint(bad)
    assert DAMAGES[damage] in problem
    fresh = CheckpointManager(tmp_path, CheckpointConfig(), Topology())
    found = fresh.find_latest()
    assert found is not None
    assert found.name == "step_00000001"
    assert "step_00000002 is damaged" in caplog.text
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: .*step_00000001"):
        fresh.load(bad, empty_like(shards_of(TENSORS)))
    assert find_checkpoint(tmp_path) == found
    assert not Path("/tmp/weft-test-bomb").exists()
    # A damaged or partial folder of the same step does not stand in the way of the next save.
    manager.save(2, shards_of(TENSORS), {}, {}, blocking=True)
    assert verify_checkpoint(bad) == []


KILLS = {
    "between data and report": "write_json",
    "before the manifest": "build_manifest",
    "between manifest and rename": "os.rename",
    "between rename and pointer": "move_latest",
    "in the retention": "CheckpointManager._remove_old",
}

CHILD = """
import os, signal, sys
sys.path[:0] = {path!r}
import test_checkpoint as t
from pathlib import Path

t.save_one(Path({run!r}), 1, keep=1)
*holders, name = {target!r}.split(".")
place = t.manager_module
for holder in holders:
    place = getattr(place, holder)
setattr(place, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
t.save_one(Path({run!r}), 2, scale=2.0, keep=1)
"""


@pytest.mark.parametrize("instant", KILLS)
def test_kill_9_in_a_save_leaves_a_sound_checkpoint(tmp_path: Path, instant: str) -> None:
    here = Path(__file__).parent
    code = CHILD.format(
        path=[str(here), str(here.parent)], run=str(tmp_path), target=KILLS[instant]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    is_committed = instant in ("between rename and pointer", "in the retention")
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1), Topology())
    found = manager.find_latest()
    assert found is not None
    assert found.name == ("step_00000002" if is_committed else "step_00000001")
    manager.save(3, shards_of(TENSORS), {}, {}, blocking=True)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000003"]


def test_no_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_one(tmp_path, 1)
    monkeypatch.setattr(manager_module, "free_bytes", lambda path: 100)
    with pytest.raises(CheckpointError, match=r"MB free, step 2 needs"):
        save_one(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000001",
    ]


def test_a_disk_that_fills_up_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_one(tmp_path, 1)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manager_module, "write_pieces", full)
    manager = CheckpointManager(tmp_path, CheckpointConfig(), Topology())
    manager.save(2, shards_of(TENSORS), {}, {})
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
        manager.wait()
    assert manager.failed_saves == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000001",
    ]
    monkeypatch.undo()
    manager.save(3, shards_of(TENSORS), {}, {}, blocking=True)
    assert manager.failed_saves == 0


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        save_one(disk, 1)
        (disk / "ballast").write_bytes(b"x" * (900 << 10))
        manager = CheckpointManager(disk, CheckpointConfig(), Topology())
        with pytest.raises(CheckpointError, match="free"):
            manager.save(
                2, shards_of({"parameters/big": torch.zeros(60_000)}), {}, {}, blocking=True
            )
        found = manager.find_latest()
        assert found is not None
        assert found.name == "step_00000001"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_retention_keeps_the_newest_the_permanent_and_the_one_resumed_from(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=2, permanent_every=4), Topology())
    manager.load(manager.find_latest(), empty_like(shards_of(TENSORS)))
    for step in range(2, 8):
        manager.save(
            step,
            shards_of(TENSORS),
            {},
            {},
            kind="permanent" if step == 3 else "periodic",
            blocking=True,
        )
    assert [i.step for i in list_checkpoints(tmp_path)] == [1, 3, 4, 6, 7]
    damage_truncate(tmp_path / "checkpoints" / "step_00000007")
    manager.save(9, shards_of(TENSORS), {}, {}, blocking=True)
    # The damaged one does not count, so two sound ones are left beside it.
    assert [i.step for i in list_checkpoints(tmp_path) if i.problem is None] == [1, 3, 4, 6, 9]


def test_retention_keeps_the_best_by_held_out_loss(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1, keep_best=2), Topology())
    losses = [3.0, 1.5, None, 1.5, float("nan"), 2.0, 1.2, 4.0]
    left = []
    for step, loss in enumerate(losses, 1):
        manager.save(step, shards_of(TENSORS), {"score": loss}, {}, blocking=True)
        left.append([i.step for i in list_checkpoints(tmp_path)])
    # Worked out by hand: the newest, and the two lowest numbers so far; of equal ones the older.
    assert left == [[1], [1, 2], [1, 2, 3], [2, 4], [2, 4, 5], [2, 4, 6], [2, 7], [2, 7, 8]]


def test_a_rank_that_never_reports_is_named(tmp_path: Path) -> None:
    def work(topology: FakeTopology) -> None:
        manager = CheckpointManager(tmp_path, CheckpointConfig(timeout_s=0.3), topology)
        if topology.rank == 1:
            manager._write = lambda *a: None  # type: ignore[method-assign]
        manager.save(1, shards_of(TENSORS, topology.rank), {}, {})
        manager.wait()

    for result in on_ranks(2, work):
        assert isinstance(result, CheckpointError)
        assert "from rank 1 within checkpoint.timeout_s=0.3" in str(result)
    assert list_checkpoints(tmp_path) == []


def test_a_failure_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    def work(topology: FakeTopology) -> None:
        manager = CheckpointManager(tmp_path, CheckpointConfig(), topology)
        shards = shards_of(TENSORS, topology.rank)
        if topology.rank == 1:
            shards = [
                TensorShard("optimizer/odd", (2,), 0, torch.zeros(2, dtype=torch.complex64), True)
            ]
        manager.save(1, shards, {}, {})
        manager.wait()

    results = on_ranks(2, work)
    assert all(isinstance(r, CheckpointError) for r in results), results
    assert "complex64" in str(results[0])
    assert str(results[0]) == str(results[1]) or "rank 1" in str(results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters/model/new": torch.zeros(2)}, "holds no parameters/model/new"),
        ({"parameters/model/a": torch.zeros(7, 6)}, r"has shape \[7, 5\], this run's is \[7, 6\]"),
        ({"parameters/model/a": torch.zeros(7, 5).half()}, "is F32, this run's is torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    manager = save_one(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step_00000001"
    with pytest.raises(CheckpointError, match=message):
        manager.load(path, shards_of({**TENSORS, **change}))
    some = {n: t for n, t in TENSORS.items() if n.startswith("parameters/")}
    manager.load(path, shards_of(some))
    with pytest.raises(CheckpointError, match="has no place for"):
        manager.load(path, shards_of(some), complete=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    manager = CheckpointManager(tmp_path, CheckpointConfig(), Topology())
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        manager.save(1, shards_of(TENSORS), {}, {})


def test_large_saves_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "FILE_BYTES", 100)
    path = tmp_path / "checkpoints" / "step_00000000"
    write_checkpoint(path, TENSORS, {"imported": True})
    assert len(list(path.glob("*.safetensors"))) > 1
    assert verify_checkpoint(path) == []
    for name, tensor in TENSORS.items():
        assert torch.equal(read_tensor(path, name), tensor)
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(path, TENSORS, {})
