"""metrics.jsonl over restarts: cut, repaired, strict; spike scores rebuilt; the sinks' one curve."""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weft.models.errors import LaunchError
from weft.trainer.distributed import Topology
from weft.trainer.metrics.config import LoggingConfig, WandbConfig
from weft.trainer.metrics.recorder import MetricsRecorder
from weft.trainer.metrics.records import RecordFile, encode_record, read_metrics
from weft.trainer.metrics.sinks import has_wandb_key
from weft.trainer.metrics.spikes import SpikeScore

PLAIN = LoggingConfig()


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def strict_lines(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_record_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    recorder = MetricsRecorder(tmp_path, PLAIN)
    recorder.log(1, {"loss": 0.1 + 0.2, "step": 99})
    assert strict_lines(tmp_path)[0]["step"] == 1
    assert read_metrics(tmp_path)[0]["loss"] == 0.1 + 0.2
    recorder.close()


def test_non_finite_values_stay_strict_json_and_come_back(tmp_path: Path) -> None:
    with MetricsRecorder(tmp_path, PLAIN) as recorder:
        recorder.log(
            1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "n": np.float32(0.5)}
        )
    (line,) = strict_lines(tmp_path)
    assert (line["loss"], line["grad_norm"], line["lr"], line["n"]) == (
        "NaN",
        "Infinity",
        "-Infinity",
        0.5,
    )
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf
    assert record["lr"] == -math.inf


def test_resume_drops_what_is_past_the_step_and_the_torn_line(tmp_path: Path) -> None:
    with MetricsRecorder(tmp_path, PLAIN) as recorder:
        for step in range(1, 6):
            recorder.log(step, {"loss": float(step)})
        recorder.log(3, {"eval/loss": 7.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "loss": 2.')
    with MetricsRecorder(tmp_path, PLAIN, resume_step=3) as recorder:
        recorder.log(4, {"loss": 40.0})
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3, 3, 4]
    merged = read_metrics(tmp_path)
    assert [record["step"] for record in merged] == [1, 2, 3, 4]
    assert merged[2]["eval/loss"] == 7.0
    assert merged[3]["loss"] == 40.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_only_lacks_its_newline_is_torn_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "tokens": 12}')
    with MetricsRecorder(tmp_path, PLAIN, resume_step=5) as recorder:
        recorder.log(6, {"loss": 1.0})
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 6]


def test_a_failed_rewrite_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsRecorder(tmp_path, PLAIN) as recorder:
        for step in range(1, 4):
            recorder.log(step, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        MetricsRecorder(tmp_path, PLAIN, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_only_rank_0_touches_the_folder(tmp_path: Path) -> None:
    with MetricsRecorder(tmp_path / "run", PLAIN, Topology(rank=1, world_size=2)) as recorder:
        assert recorder.log(1, {"loss": 1.0}) == {"step": 1, "loss": 1.0}
    assert not (tmp_path / "run").exists()


def test_a_full_disk_loses_records_but_never_half_of_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = RecordFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    real = file._file

    class Short:
        """Writes the first half, then reports a full disk."""

        def write(self, line: bytes) -> int:
            real.write(line[: len(line) // 2])
            raise OSError(errno.ENOSPC, "no space left")

    file._file = Short()  # type: ignore[assignment]
    file.append({"step": 2})
    file._file = real
    file.append({"step": 3})
    file.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    assert "no space left" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == encode_record({"step": 1}) + encode_record(
        {"step": 3}
    )


def spikes_by_definition(values: np.ndarray) -> int:
    found = 0
    for i in range(128, len(values)):
        past = values[max(0, i - 1000) : i]
        found += abs(values[i] - past.mean()) >= 7 * past.std(ddof=1)
    return found


def spiky(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = 3 + rng.standard_normal(2500)
    values[[50, 300, 301, 1400, 2100]] += [100, 9, -60, 30, 12]
    return values[:count]


def test_spike_score_equals_its_definition() -> None:
    values = spiky(2500)
    score = SpikeScore()
    for value in values:
        score.add(float(value))
    assert score.spikes == spikes_by_definition(values) >= 3
    assert score.score == score.spikes / 2500


def test_non_finite_values_are_spikes_and_do_not_poison_the_window() -> None:
    score = SpikeScore(minimum=4)
    flags = [score.add(v) for v in (1.0, 1.1, 0.9, 1.0, math.nan, math.inf, 1.05, 50.0)]
    assert flags == [False] * 4 + [True, True, False, True]


def test_spike_scores_go_on_over_a_restart_as_if_there_was_none(tmp_path: Path) -> None:
    values = spiky(1600).tolist()
    with MetricsRecorder(tmp_path / "whole", PLAIN) as recorder:
        for step, value in enumerate(values, 1):
            recorder.log(step, {"loss": value, "grad_norm": value / 2})
    with MetricsRecorder(tmp_path / "cut", PLAIN) as recorder:
        for step, value in enumerate(values[:1450], 1):
            recorder.log(step, {"loss": value, "grad_norm": value / 2})
    with MetricsRecorder(tmp_path / "cut", PLAIN, resume_step=1200) as recorder:
        for step, value in enumerate(values[1200:], 1201):
            recorder.log(step, {"loss": value, "grad_norm": value / 2})
    whole, cut = (read_metrics(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut
    assert whole[-1]["loss_spikes"] >= 2
    assert whole[-1]["grad_norm_spike_score"] == whole[-1]["grad_norm_spikes"] / 1600


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_names_its_extra_and_keeps_old_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 5, "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = LoggingConfig(
        wandb=WandbConfig(enabled=name == "wandb"), tensorboard=name == "tensorboard"
    )
    with pytest.raises(LaunchError, match=rf"weft\[{name}\]"):
        MetricsRecorder(tmp_path, config)
    assert read_metrics(tmp_path)[0]["step"] == 5


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard=True)
    with MetricsRecorder(tmp_path, config) as recorder:
        for step in range(1, 6):
            recorder.log(step, {"loss": float(step)})
    with MetricsRecorder(tmp_path, config, resume_step=3) as recorder:
        for step in range(4, 7):
            recorder.log(step, {"loss": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]


@pytest.mark.slow
def test_wandb_offline_keeps_its_id_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    config = LoggingConfig(wandb=WandbConfig(enabled=True))
    ids = []
    for resume_step in (0, 2):
        with MetricsRecorder(tmp_path, config, resume_step=resume_step) as recorder:
            for step in range(resume_step + 1, resume_step + 4):
                recorder.log(step, {"loss": 1.0})
            ids.append(recorder._sinks[0].id)  # type: ignore[attr-defined]
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}*"))
    assert len(runs) == 2


class FakeWandb:
    """Stands in for the wandb module; says that the server already has steps below 40."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.arguments: dict[str, Any] = {}

    def init(self, **arguments: Any) -> Any:
        self.arguments = arguments
        log = self.steps

        class Run:
            id, step = arguments["id"], 40

            def log(self, values: dict[str, Any], step: int) -> None:
                log.append(step)

            def finish(self, exit_code: int) -> None:
                pass

        return Run()

    @staticmethod
    def Settings(**_: Any) -> None:
        return None


def test_wandb_is_not_sent_steps_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(wandb=WandbConfig(enabled=True, mode="online", entity="team"))
    with MetricsRecorder(tmp_path, config, resume_step=37, settings={"a": 1}) as recorder:
        for step in range(38, 43):
            recorder.log(step, {"loss": 1.0})
    assert fake.steps == [40, 41, 42]
    assert fake.arguments["resume"] == "allow"
    assert (fake.arguments["mode"], fake.arguments["entity"]) == ("online", "team")
    assert fake.arguments["config"] == {"a": 1}


def test_a_wandb_key_is_found_where_wandb_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert has_wandb_key()
