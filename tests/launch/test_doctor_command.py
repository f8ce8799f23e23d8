"""`weft doctor` as a person types it, and as srun starts it on several nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port
from weft.launch.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def start_ranks(
    arguments: list[str], ranks: int, coming: list[int], port: int
) -> list[subprocess.Popen[str]]:
    """`srun weft doctor` of one task a node, with the tasks of `coming` only; nodes are called n0, n1, ..."""
    common = {
        **os.environ,
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{ranks})",
        "SLURM_STEP_NODELIST": f"n[0-{ranks - 1}]",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "weft", "doctor", *arguments],
            env={
                **common,
                "SLURM_PROCID": str(rank),
                "SLURM_NODEID": str(rank),
                "SLURM_LOCALID": "0",
                "SLURMD_NODENAME": f"n{rank}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in coming
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    done = []
    for process in processes:
        out, err = process.communicate(timeout=90)
        done.append((process.returncode, out, err))
    return done


def test_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["weft", "doctor", str(tmp_path), "--quick", "--exclude-file", str(tmp_path / "unfit")],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0, out
    assert (tmp_path / "unfit").read_text() == ""
    # One line a check; a mend belongs to the line above it.
    lines = out.splitlines()[2:-2]
    assert all(re.match(r"(ok|warn|FAIL|skipped) +\S|  +mend: ", line) for line in lines)
    assert re.search(r"^skipped gpus +no GPU$|^ok +gpus ", out, re.M)
    assert out.splitlines()[-1].startswith("fit to train")


def test_it_is_quick(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "weft", "doctor", str(tmp_path), "--quick", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    # Under 5 s where nothing else runs; this machine is shared.
    assert time.monotonic() - begin < 20
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 0
    assert {"check", "status", "found", "mend", "hosts"} <= found["checks"][0].keys()


def test_two_nodes_meet(tmp_path: Path) -> None:
    done = finish(start_ranks([str(tmp_path), "--quick"], 2, [0, 1], free_port()))
    assert [code for code, *_ in done] == [0, 0], done
    out = done[0][1]
    assert "2 ranks on 2 nodes" in out
    assert re.search(r"^ok +all-reduce +4 MiB over 2 ranks \(gloo\) right", out, re.M)
    assert re.search(r"^ok +shared folder .* 2 nodes$", out, re.M)
    assert done[1][1] == ""
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_never_comes_ends_in_time_and_is_left_out(tmp_path: Path) -> None:
    unfit = tmp_path / "unfit"
    arguments = [str(tmp_path), "--quick", "--limit", "4", "--exclude-file", str(unfit)]
    begin = time.monotonic()
    done = finish(start_ranks(arguments, 3, [0, 2], free_port()))
    assert time.monotonic() - begin < 60
    assert [code for code, *_ in done] == [4, 4], done
    assert "rank 1 (n1) did not come within 4 s; 2 of 3 are here" in done[0][1]
    assert unfit.read_text() == "n1\n"


def test_rank_0_that_never_comes(tmp_path: Path) -> None:
    ((code, out, err),) = finish(
        start_ranks([str(tmp_path), "--quick", "--limit", "2"], 2, [1], free_port())
    )
    assert code == 4
    assert re.search(
        r"^FAIL +ranks +rank 1 on n1 found nobody at 127.0.0.1:\d+ within 2 s", out, re.M
    )
    assert "Traceback" not in out + err


def test_a_wrong_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["weft", "doctor", "--exclude-file", "/not/there/file"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first command, run here: the same checks in the same order, whatever they find on this machine."""
    command, shown = re.findall(r"```console\n\$ weft (.+)\n([^`]+)```", PAGE.read_text())[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["weft", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0

    def names(text: str) -> list[str]:
        lines = re.findall(r"^(?:ok|warn|FAIL|skipped).*", text, re.M)
        return [line[8:22].strip() for line in lines]

    printed = capsys.readouterr().out
    assert names(printed) == names(shown)
    assert "matmul" in names(shown)


def test_the_page_names_every_check() -> None:
    from weft.trainer.doctor import examination

    page = PAGE.read_text()
    tables = (
        examination.NODE_CHECKS,
        examination.PORT_CHECKS,
        examination.DEVICE_CHECKS,
        examination.COMPILER_CHECKS,
        examination.JOINT_CHECKS,
    )
    names = [name for table in tables for name, _ in table] + ["ranks", "equal nodes", "answers"]
    assert not [name for name in names if f"| {name} |" not in page]
