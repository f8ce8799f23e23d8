"""`weft submit` against a stand-in of sbatch: what is checked, written, handed in, and taken back when it is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from tiny_run import write_recipe
from weft.launch import cli, local_job
from weft.launch.slurm.snapshot import find_code
from weft.launch.slurm.sweep import combinations
from weft.models.errors import ConfigError
from weft.trainer.attempts import AttemptLog
from weft.trainer.configuration.load import load_run_config
from weft.trainer.run_lock import RunLock

Weft = Callable[..., tuple[int, str, str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("WEFT_CLUSTER", raising=False)
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Weft:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weft", *arguments])
        code = cli._run()
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def write_profile(folder: Path, text: str, name: str = "default") -> Path:
    path = folder / "config" / "weft" / "clusters" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} if folder.exists() else set()


# One run


def test_a_submission_leaves_everything_in_the_run_folder(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    code, out, _ = weft(
        "submit", "olmo2/debug", "--nodes", "2", "--ranks-per-node", "2",
        "--set", "optimizer.lr=1e-3", "run.dir=my runs/a",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines() == [
        "submitted job 101: 2 x 2 ranks in 'my runs/a'",
        "follow it: weft logs 'my runs/a' -f",
    ]
    run = tmp_path / "my runs" / "a"
    assert load_run_config(run, []).config.optimizer.lr == 1e-3
    script = (run / "slurm" / "101.sbatch").read_text()
    assert slurm.script.read_text() == script
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in script
    job = json.loads((run / "slurm" / "job.json").read_text())
    assert (job["job_id"], job["array_task_id"], job["cluster"]) == ("101", None, None)
    assert job["script"] == str(run / "slurm" / "101.sbatch")
    assert Path(job["code"]).parent == run / "slurm" / "code"
    assert slurm.calls == ["sbatch --parsable"]


def test_the_code_of_the_job_is_a_package_of_its_own(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    weft("submit", "olmo2/debug", "run.dir=a")
    (code,) = (tmp_path / "a" / "slurm" / "code").iterdir()
    assert {p.name for p in (code / "weft").iterdir()} == {
        "__init__.py", "__main__.py", "kernels", "launch", "models", "trainer",
    }  # fmt: skip
    assert not list(code.rglob("__pycache__"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import weft.launch.cli as c, weft.kernels as k; print(c.__file__, k.__file__)",
        ],
        env={**os.environ, "PYTHONPATH": f"{code}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert [path.startswith(str(code)) for path in done.stdout.split()] == [True, True], done.stderr
    source = json.loads((code / "source.json").read_text())
    assert source["snapshot"] == code.name
    assert (code / "changes.diff").exists() == source["changed"]
    assert (code / "weft" / "launch" / "slurm" / "job.sbatch.j2").is_file()
    assert (code / "weft" / "launch" / "recipes" / "olmo2" / "debug.yaml").is_file()


def test_an_installed_package_is_named_not_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("weft.launch.slurm.snapshot._is_installed", lambda folder: True)
    code = find_code()
    assert code.write(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_script_and_touches_nothing(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    before = files_below(tmp_path)
    code, out, err = weft("submit", "olmo2/debug", "--dry-run", "--time", "1:00:00")
    assert (code, err) == (0, "")
    assert out.startswith("#!/bin/bash\n")
    assert "#SBATCH --time=1:00:00\n" in out
    assert files_below(tmp_path) == before
    assert slurm.calls == []


def test_sbatch_refuses_and_nothing_is_left(slurm: FakeSlurm, weft: Weft, tmp_path: Path) -> None:
    slurm.answer(
        "sbatch",
        error="sbatch: error: invalid partition specified: foo\nsbatch: error: Batch job submission failed: Invalid partition name specified\n",
        code=1,
    )
    code, out, err = weft("submit", "olmo2/debug", "--partition", "foo")
    assert (code, out) == (2, "")
    assert err == (
        "weft: error: sbatch refused the job: invalid partition specified: foo; Batch job submission failed: "
        "Invalid partition name specified; nothing was submitted\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_refused_resubmission_leaves_the_run_as_it_was(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    weft("submit", "olmo2/debug", "run.dir=a")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    slurm.answer("sbatch", error="sbatch: error: no\n", code=1)
    assert weft("submit", "a", "train.steps=77")[0] == 2
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


def test_without_sbatch_there_is_another_way(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.remove(monkeypatch)
    code, _, err = weft("submit", "olmo2/debug")
    assert code == 2
    assert "no sbatch" in err
    assert "--local" in err
    assert "--dry-run" in err
    assert not (tmp_path / "runs").exists()


def test_the_ranks_are_part_of_the_check(slurm: FakeSlurm, weft: Weft, tmp_path: Path) -> None:
    code, _, err = weft("submit", "olmo2/debug", "--nodes", "3")
    assert code == 2
    assert "16 samples of 128 tokens do not divide over 3 ranks" in err
    code, _, err = weft("submit", "olmo2/debug", "train.stps=3")
    assert (code, "train.steps" in err) == (2, True)
    assert slurm.calls == []
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_a_run_is_refused_and_a_run_goes_on(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    weft("submit", "olmo2/debug", "run.dir=a", "train.steps=40")
    (tmp_path / "a" / "checkpoints").mkdir()
    (tmp_path / "a" / "checkpoints" / "latest").write_text("step_00000040\n")
    (tmp_path / "a" / "STOP").touch()
    code, _, err = weft("submit", "olmo2/debug", "run.dir=a")
    assert (code, "already holds a run" in err) == (2, True)
    assert "weft submit a" in err
    code, _, err = weft("submit", "a")
    assert (code, "is finished" in err) == (2, True)
    slurm.answer("sbatch", "102;cluster")
    code, out, _ = weft("submit", "a", "train.steps=80", "--nodes", "2")
    assert (code, "submitted job 102" in out) == (0, True)
    assert load_run_config(tmp_path / "a", []).config.train.steps == 80
    assert not (tmp_path / "a" / "STOP").exists()
    assert (tmp_path / "a" / "slurm" / "101.sbatch").is_file()


def test_a_run_in_the_queue_or_at_work_is_not_submitted_twice(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    weft("submit", "olmo2/debug", "run.dir=a")
    slurm.answer("squeue", "101|PENDING|Priority")
    code, _, err = weft("submit", "a")
    assert (code, "is job 101 already (pending)" in err) == (2, True)
    slurm.answer("squeue", "101|CANCELLED|None")
    lock = RunLock(tmp_path / "a")
    lock.acquire(1)
    code, _, err = weft("submit", "a")
    assert (code, "is being run by" in err) == (2, True)
    lock.release()
    assert weft("submit", "a")[0] == 0


def test_a_folder_that_cannot_be_made_is_one_line(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, _, err = weft("submit", "olmo2/debug", "run.dir=file/run")
    assert code == 2
    assert "cannot be written" in err
    assert slurm.calls_of("sbatch") == []


def test_what_the_shell_says_does_not_outdo_what_was_typed(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.program("sbatch", f"env > {tmp_path}/env; echo 5")
    for name in (
        "SBATCH_PARTITION",
        "SBATCH_ACCOUNT",
        "SBATCH_TIMELIMIT",
        "SLURM_NTASKS",
        "SLURM_CONF",
    ):
        monkeypatch.setenv(name, "1")
    weft("submit", "olmo2/debug", "--partition", "a", "--time", "5")
    found = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {"SBATCH_ACCOUNT", "SLURM_CONF"} <= found
    assert found.isdisjoint({"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_NTASKS"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "olmo2/1b", "--nodes", "4", "--gpus-per-node", "8", "--dry-run"],
        ["submit", "olmo2/debug", "--sweep", "optimizer.lr=1e-4,3e-4", "--seeds", "4", "--dry-run"],
    ],
)
def test_it_answers_without_torch_within_a_second(slurm: FakeSlurm, arguments: list[str]) -> None:
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['weft', *{arguments!r}]\n"
        "from weft.launch.cli import main\n"
        "main()\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"
    # Processor time, because other tests share the machine's clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


# Profiles


def test_options_go_over_the_profile_and_the_profile_over_defaults(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    path = write_profile(tmp_path, "partition: gpu\nnodes: 4\nmem: 0\nenvironment:\n  A: 1\n")
    write_profile(tmp_path, "partition: other\n", "b")
    code, out, _ = weft("submit", "--print-cluster", "--nodes", "2")
    assert code == 0
    lines = {line.partition(":")[0]: line for line in out.splitlines()}
    assert lines["partition"].split() == ["partition:", "gpu", "#", f"{path}:1"]
    assert lines["nodes"].split() == ["nodes:", "2", "#", "--nodes"]
    assert lines["qos"].split() == ["qos:", "null", "#", "default"]
    assert "partition: other" in weft("submit", "--print-cluster", "--cluster", "b")[1]


def test_the_profile_of_the_environment(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(tmp_path, "partition: other\n", "b")
    monkeypatch.setenv("WEFT_CLUSTER", "b")
    assert "partition: other" in weft("submit", "--print-cluster")[1]
    weft("submit", "olmo2/debug", "run.dir=a")
    assert json.loads((tmp_path / "a/slurm/job.json").read_text())["cluster"] == "b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partiton: gpu", "cluster.partiton: no such key; did you mean cluster.partition? [{path}:1]"),
        ("qos: a\nnodes: none", "cluster.nodes: should be an integer, found none [{path}:2]"),
        ("sbatch: [--signal=USR1]", "--signal is set by weft submit itself"),
        ("sbatch: [exclusive]", "'exclusive' is no option"),
        ("environment: {a-b: 1}", "cannot be the name of a variable"),
        ("setup: [\"a\\nb\"]", "should be one line"),
        ("gpus_per_node: 4\nranks_per_node: 2", "with GPUs each has one rank"),
        ("- a", "expected sections"),
    ],
)  # fmt: skip
def test_errors_of_a_profile_name_file_and_key(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path, text: str, expected: str
) -> None:
    path = write_profile(tmp_path, text)
    code, _, err = weft("submit", "olmo2/debug")
    assert code == 2
    assert expected.format(path=path) in err
    assert len(err.splitlines()) == 1


def test_a_profile_that_is_not_there_names_those_that_are(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    write_profile(tmp_path, "", "a100")
    code, _, err = weft("submit", "olmo2/debug", "--cluster", "h100")
    assert code == 2
    assert "--cluster h100: there is no" in err
    assert err.rstrip().endswith(": a100")


def test_nodes_to_leave_out(slurm: FakeSlurm, weft: Weft, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("n7  # ECC\n\nn8\nn7\n")
    out = weft(
        "submit", "olmo2/debug", "--dry-run", "--exclude", "n1", "--exclude-file", "bad.txt"
    )[1]
    assert "#SBATCH --exclude=n1,n7,n8\n" in out


# Sweeps


def test_a_sweep_is_one_array_of_runs_with_readable_folders(
    slurm: FakeSlurm, weft: Weft, tmp_path: Path
) -> None:
    code, out, _ = weft(
        "submit", "olmo2/debug", "run.dir=s", "--sweep", "optimizer.lr=1e-4,3e-4",
        "--seeds", "2", "--array", "%2", "run.seed=5",
    )  # fmt: skip
    assert (code, len(slurm.calls_of("sbatch"))) == (0, 1)
    assert "submitted job array 101: 4 runs of 1 x 1 ranks in s" in out
    script = (tmp_path / "s" / "slurm" / "101.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    names = ["lr=1e-4_seed=5", "lr=1e-4_seed=6", "lr=3e-4_seed=5", "lr=3e-4_seed=6"]
    for task, name in enumerate(names):
        run = tmp_path / "s" / name
        config = load_run_config(run, []).config
        assert (config.optimizer.lr, config.run.seed) == ([1e-4, 3e-4][task // 2], 5 + task % 2)
        assert config.run.name == f"olmo2-debug-{name}"
        job = json.loads((run / "slurm" / "job.json").read_text())
        assert (job["job_id"], job["array_task_id"]) == ("101", task)
        assert f"  {run}\n" in script
    assert len(list((tmp_path / "s" / "slurm" / "code").iterdir())) == 1


def test_a_dry_run_of_a_sweep_shows_what_will_run_beside_the_script(
    slurm: FakeSlurm, weft: Weft
) -> None:
    code, out, err = weft("submit", "olmo2/debug", "--sweep", "optimizer.lr=1e-4,3e-4", "--dry-run")
    assert code == 0
    assert out.startswith("#!/bin/bash\n")
    assert "2 runs, array 0-1" in err
    assert "runs/olmo2-debug/lr=3e-4" in err


def test_one_wrong_combination_stops_all(slurm: FakeSlurm, weft: Weft, tmp_path: Path) -> None:
    code, _, err = weft("submit", "olmo2/debug", "--sweep", "optimizer.lr=1e-4,-1")
    assert code == 2
    assert "lr=-1: optimizer.lr: should be greater than 0" in err
    assert slurm.calls == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--array", "0-3"], "give --sweep or --seeds too"),
        (["--sweep", "optimizer.lr="], "expected KEY=VALUE"),
        (["--sweep", "optimizer.lr=1,1"], "is there twice"),
        (["--sweep", "run.seed=1,2", "--seeds", "2"], "swept twice"),
        (["--sweep", "optimizer.lr=1,2", "--seeds", "9000"], "more than 10000"),
    ],
)
def test_sweeps_that_cannot_be(
    slurm: FakeSlurm, weft: Weft, arguments: list[str], expected: str
) -> None:
    code, _, err = weft("submit", "olmo2/debug", *arguments)
    assert (code, expected in err) == (2, True), err


def test_values_keep_their_commas_and_names_tell_keys_apart() -> None:
    found = combinations(["a.x=[1, 2],[3]", "b.x=p/q"], None, 0)
    assert [c.overrides for c in found] == [("a.x=[1, 2]", "b.x=p/q"), ("a.x=[3]", "b.x=p/q")]
    assert [c.name for c in found] == ["a.x=1-2_b.x=p-q", "a.x=3_b.x=p-q"]
    with pytest.raises(ConfigError, match="share the folder"):
        combinations(["a=x/y,x:y"], None, 0)


def test_a_sweep_of_a_run_is_refused(slurm: FakeSlurm, weft: Weft) -> None:
    weft("submit", "olmo2/debug", "run.dir=a")
    code, _, err = weft("submit", "a", "--seeds", "2")
    assert (code, "give a RECIPE" in err) == (2, True)


# Here


class Ranks:
    """Stands in for LocalRanks: each start ends with the next of some codes."""

    codes: list[int]
    starts: list[list[str]]
    opens = True

    def __init__(self, arguments: list[str], ranks: int, prefix: Path, *, logs: list[Path]) -> None:
        Ranks.starts.append(arguments)
        self.processes: list[subprocess.Popen[bytes]] = []
        for log in logs:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("hello\n")
        if Ranks.opens:
            # As a run that saved something new each time.
            number = len(Ranks.starts)
            history = AttemptLog(Path(arguments[-1]), number)
            history.write("start")
            history.write("opened", step=number, train_seconds=0.0)
            history.write("saved", step=number + 1, seconds=0.0)

    def is_running(self) -> bool:
        return False

    def wait(self) -> list[int]:
        return [Ranks.codes.pop(0), 0]


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [([0], 0, 1), ([-9, 0], 0, 2), ([2], 2, 1), ([75], 75, 1), ([76, 76, 0], 0, 3), ([1, 1], 5, 2)],
)
def test_a_job_of_this_machine_is_judged_like_any(
    slurm: FakeSlurm,
    weft: Weft,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    ends: int,
    starts: int,
) -> None:
    monkeypatch.setattr(local_job, "LocalRanks", Ranks)
    Ranks.codes, Ranks.starts, Ranks.opens = list(codes), [], codes != [1, 1]
    code, out, _ = weft("submit", "olmo2/debug", "--local", "run.dir=a")
    assert (code, len(Ranks.starts)) == (ends, starts)
    assert out == "hello\n" * starts
    assert Ranks.starts[0] == ["train", "--resume", str(Path("a").absolute())]


def test_this_machine_is_one_node(slurm: FakeSlurm, weft: Weft, tmp_path: Path) -> None:
    code, _, err = weft("submit", "olmo2/debug", "--local", "--nodes", "2")
    assert (code, "leave --nodes out" in err) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_a_real_run_here_with_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, train__steps=4)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "weft", "submit", str(recipe), "--local",
         "logging.progress=lines"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout
    logs = sorted((tmp_path / "run" / "logs").glob("local*_0/rank_*.log"))
    assert [log.name for log in logs] == ["rank_00000.log"]
