"""The doctor on machines made ill: each fault is named, on the right node, and nothing waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from fake_ranks import on_ranks
from weft.models.errors import LaunchError
from weft.trainer.doctor import compute, examination, storage, system, together
from weft.trainer.doctor.context import Context
from weft.trainer.doctor.examination import Examination, examine
from weft.trainer.doctor.findings import Finding, exit_code, fail, merge, ok, unfit_hosts, warn
from weft.trainer.doctor.meeting import Meeting, NoAnswer
from weft.trainer.doctor.place import Place, expand_hosts, find_place

Change = Callable[[Context], Context | None]
REDUCED = {"seconds": 0.01, "bytes": 1 << 20, "backend": "gloo"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "QUICK_WRITE_BYTES", storage.CHUNK_BYTES)
    monkeypatch.setattr(compute, "QUICK_REPEATS", 1)
    monkeypatch.setattr(together, "VISIBLE_WITHIN_S", 0.3)
    monkeypatch.setattr(together, "_all_reduce", lambda context, meeting: REDUCED)
    # Threads of one process on two cores: their own speeds say nothing.
    monkeypatch.setattr(together, "SLOW", 100.0)


def examine_nodes(
    tmp_path: Path, nodes: int = 3, change: Change = lambda c: c, limit_s: float = 20.0
) -> Examination:
    """Rank 0's examination of ranks that are threads, each on a node of its own; `change` gives None for one that never comes."""
    store = dist.HashStore()
    names = tuple(f"n{i}" for i in range(nodes))

    def one(topology: Any) -> Examination | None:
        place = Place(topology.rank, nodes, 0, 1, names[topology.rank], names, "n0", None)
        context = change(Context(place, tmp_path, is_quick=True, limit_s=limit_s))
        return None if context is None else examine(context, lambda place, limit: store)

    results = on_ranks(nodes, one)
    for result in results:
        if isinstance(result, Exception):
            raise result
    codes = {result.exit_code for result in results if result is not None}
    assert len(codes) == 1, "all ranks end with the same code"
    return results[0]


def finding(found: Examination, check: str) -> Finding:
    (line,) = [line for line in found.lines if line.finding.check == check]
    return line.finding


def test_healthy_nodes(tmp_path: Path) -> None:
    found = examine_nodes(tmp_path)
    assert found.exit_code == 0, found.lines
    assert found.unfit_hosts == []
    assert finding(found, "ranks").found == "all 3 came, from 3 nodes"
    assert finding(found, "clocks").status == "ok"
    assert finding(found, "shared folder").found.endswith("3 nodes")
    assert "GB/s" in finding(found, "all-reduce").found
    assert "torch" in finding(found, "equal nodes").found
    assert list(tmp_path.iterdir()) == []


def test_one_process_needs_nobody(tmp_path: Path) -> None:
    found = examine(Context(Place(), tmp_path / "not" / "yet", is_quick=True))
    assert found.exit_code == 0, found.lines
    assert finding(found, "all-reduce").status == "skipped"
    assert finding(found, "matmul").status == "ok"


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    begin = time.monotonic()
    found = examine_nodes(tmp_path, change=lambda c: None if c.place.rank == 2 else c, limit_s=4.0)
    assert time.monotonic() - begin < 30
    assert "rank 2 (n2) did not come within 4 s" in finding(found, "ranks").found
    assert finding(found, "all-reduce").status == "skipped"
    assert (found.exit_code, found.unfit_hosts) == (4, ["n2"])


def test_a_check_that_never_ends_is_a_failure_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def stuck(context: Context) -> Finding:
        if context.place.rank == 1:
            release.wait(20)
        return ok("disk speed", "fine")

    monkeypatch.setattr(storage, "check_disk_speed", stuck)
    found = examine_nodes(tmp_path, limit_s=4.0)
    release.set()
    assert finding(found, "disk speed").found == "no answer within 2 s"
    assert (found.exit_code, found.unfit_hosts) == (4, ["n1"])


def test_a_hung_all_reduce_names_who_never_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def hang(context: Context, meeting: Meeting) -> dict[str, Any]:
        if context.place.rank != 1:
            meeting.say("all-reduce: inside")
        release.wait(20)
        return {}

    monkeypatch.setattr(together, "_all_reduce", hang)
    found = examine_nodes(tmp_path, limit_s=4.0)
    release.set()
    assert "rank 1 on n1: never entered it" in finding(found, "all-reduce").found
    assert (found.exit_code, found.unfit_hosts) == (4, ["n1"])


def test_a_wrong_sum_names_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(context: Context, meeting: Meeting) -> dict[str, Any]:
        meeting.say("all-reduce: inside")
        return {"error": "the sum is 5 and not 6"} if context.place.rank == 2 else REDUCED

    monkeypatch.setattr(together, "_all_reduce", reduce)
    found = examine_nodes(tmp_path)
    assert "rank 2 on n2: the sum is 5 and not 6" in finding(found, "all-reduce").found


@pytest.mark.parametrize(("skew", "status"), [(0.0, "ok"), (1.5, "warn"), (-60.0, "fail")])
def test_clock_skew(tmp_path: Path, skew: float, status: str) -> None:
    def drift(context: Context) -> Context:
        return replace(context, clock=lambda: time.time() + skew * (context.place.rank == 1))

    found = examine_nodes(tmp_path, nodes=2, change=drift)
    assert finding(found, "clocks").status == status
    if status != "ok":
        way = "ahead of" if skew > 0 else "behind"
        assert f"n1 is {abs(skew):.1f} s {way} n0" in finding(found, "clocks").found
    assert found.unfit_hosts == (["n1"] if status == "fail" else [])


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    def apart(context: Context) -> Context:
        folder = tmp_path / ("local" if context.place.rank == 1 else "shared")
        folder.mkdir(exist_ok=True)
        return replace(context, run_dir=folder)

    found = examine_nodes(tmp_path, change=apart)
    assert "not seen on n1" in finding(found, "shared folder").found
    assert (found.exit_code, found.unfit_hosts) == (4, ["n1"])
    # Where no other node sees it, no node is to blame.
    found = examine_nodes(tmp_path, nodes=2, change=apart)
    assert (found.exit_code, found.unfit_hosts) == (2, [])


def test_the_slow_rank_is_named_by_its_own_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "SLOW", 1.3)
    store = dist.HashStore()

    def one(topology: Any) -> list[Finding]:
        place = Place(topology.rank, 4, host=f"n{topology.rank}")
        seconds = 0.05 if topology.rank == 3 else 0.01
        return together.check_slowest(
            Context(place, tmp_path),
            Meeting(store, place, 10),
            {rank: f"n{rank}" for rank in range(4)},
            work=lambda context, device: seconds,
        )

    (found,) = on_ranks(4, one)[0]
    assert found.status in ("warn", "fail")
    assert "slowest rank 3 on n3 50.00 ms (5.00x); slow: rank 3" in found.found


def test_different_versions_name_the_odd_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def versions(context: Context) -> Finding:
        return ok("versions", "", torch="2.10.0" if context.place.rank == 1 else "2.13.0")

    monkeypatch.setattr(system, "check_versions", versions)
    found = examine_nodes(tmp_path)
    assert finding(found, "equal nodes").found == "torch: 2.13.0 on n0, n2; 2.10.0 on n1"
    assert (found.exit_code, found.unfit_hosts) == (4, ["n1"])


def test_a_check_that_breaks_is_a_line_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: Context) -> Finding:
        raise OSError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(system, "check_versions", broken)
    found = examine(Context(Place(), tmp_path, is_quick=True))
    assert "broke off: OSError: libcudart.so.12" in finding(found, "versions").found
    assert "\n" not in finding(found, "versions").found
    assert found.exit_code == 4


def test_a_rank_that_meets_nobody_still_tells_of_its_node(tmp_path: Path) -> None:
    def nobody(place: Place, limit_s: float) -> Any:
        raise NoAnswer("rank 1 on n1 found nobody at n0:29500 within 1 s")

    place = Place(1, 2, 0, 1, "n1", ("n0", "n1"), "n0", 29500)
    found = examine(Context(place, tmp_path, is_quick=True), nobody)
    assert "found nobody at n0:29500" in finding(found, "ranks").found
    assert finding(found, "disk speed").status == "ok"
    # Which node is at fault cannot be known from here.
    assert (found.exit_code, found.unfit_hosts) == (4, [])


def test_rank_0_that_falls_silent_ends_the_others() -> None:
    place = Place(1, 2, host="n1")
    meeting = Meeting(dist.HashStore(), place, 0.1)
    with pytest.raises(NoAnswer, match="waited"):
        meeting.gather("host", "n1", limit_s=-9.5)


def test_a_failure_on_all_nodes_is_the_configurations() -> None:
    reports = {rank: [fail("disk speed", "read only", "mend")] for rank in range(3)}
    host_of = {rank: f"n{rank}" for rank in range(3)}
    lines = merge(reports, host_of)
    assert (exit_code(lines), unfit_hosts(lines)) == (2, [])
    reports[0] = [ok("disk speed", "fine")]
    lines = merge(reports, host_of)
    assert (exit_code(lines), unfit_hosts(lines)) == (4, ["n1", "n2"])
    assert [line.finding.status for line in lines] == ["fail"]


def test_warnings_do_not_fail() -> None:
    assert exit_code(merge({0: [warn("limits", "few", "more")]}, {0: "n0"})) == 0


def test_every_failure_has_a_mend(tmp_path: Path) -> None:
    found = examine_nodes(tmp_path, change=lambda c: None if c.place.rank == 2 else c, limit_s=1.0)
    bad = [x.finding for x in found.lines if x.finding.status in ("warn", "fail")]
    assert bad
    assert all(f.mend for f in bad)


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "SLURMD_NODENAME": "gpu08",
}


@pytest.fixture
def place_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """The place found in an environment of these variables alone."""

    def find(**variables: str) -> Place:
        for name in {*TORCHRUN, *SRUN, "TORCHELASTIC_USE_AGENT_STORE"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_place()

    return find


def test_places(place_in: Callable[..., Place]) -> None:
    assert place_in().world_size == 1
    place = place_in(**TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="True")
    assert (place.rank, place.local_rank, place.address, place.port) == (3, 1, "a", 29500)
    assert place.is_held_by_agent
    place = place_in(**SRUN)
    assert (place.rank, place.local_world_size, place.host) == (5, 4, "gpu08")
    assert (place.address, place.port) == ("10.0.0.7", 20_000 + 123456 * 7 % 10_000)
    assert (place.node_of(3), place.node_of(4)) == ("gpu07", "gpu08")
    # The batch script has SLURM's names as well, but is one process.
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert place_in(**batch, SLURM_NTASKS="8").world_size == 1


def test_half_a_place_is_refused(place_in: Callable[..., Place]) -> None:
    with pytest.raises(LaunchError, match="RANK is 'x'"):
        place_in(**{**TORCHRUN, "RANK": "x"})
    with pytest.raises(LaunchError, match="no MASTER_ADDR"):
        place_in(**{k: v for k, v in TORCHRUN.items() if not k.startswith("MASTER")})


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("", ()),
        ("n1", ("n1",)),
        ("n[1-3,07],m", ("n1", "n2", "n3", "n07", "m")),
        ("a[1-2]-b[0-1]", ("a1-b0", "a1-b1", "a2-b0", "a2-b1")),
    ],
)
def test_lists_of_nodes(short: str, long: tuple[str, ...]) -> None:
    assert expand_hosts(short) == long


def test_every_check_is_there() -> None:
    tables = (
        examination.NODE_CHECKS,
        examination.PORT_CHECKS,
        examination.DEVICE_CHECKS,
        examination.COMPILER_CHECKS,
    )
    for name, path in (entry for table in tables for entry in table):
        module, _, function = path.partition(":")
        __import__(f"weft.trainer.doctor.{module}")
        assert callable(
            getattr(getattr(__import__("weft.trainer.doctor", fromlist=[module]), module), function)
        ), name
    assert all(callable(getattr(together, function)) for _, function in examination.JOINT_CHECKS)
