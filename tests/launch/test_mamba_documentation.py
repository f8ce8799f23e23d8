"""The commands of docs/mamba.md work in their order as they stand there, with fewer steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from weft.launch.cli import cli
from weft.trainer.checkpoint.reading import read_tensor

PAGE = Path(__file__).parents[2] / "docs" / "mamba.md"
FEW = ["train.steps=3", "checkpoint.every=3", "schedule.warmup_steps=1", "run.threads=1"]


def test_the_page_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = tmp_path / "texts"
    sources.mkdir()
    for number in range(6):
        code = (f"def f{i}(x):\n    return x * {i * number} + {number}\n" for i in range(100))
        (sources / f"{number}.txt").write_text("\n".join(code))
    source = json.dumps([{"name": "code", "path": str(sources)}])
    text = [f"data.sources={source}", f"data.cache_dir={tmp_path / 'cache'}"]
    lines = re.findall(r"^\$ weft (.*)$", PAGE.read_text(), re.M)
    assert len(lines) == 6
    outputs = []
    for line in lines:
        words = shlex.split(line)
        extra = [*FEW, *text] if words[0] == "train" else []
        result = CliRunner().invoke(cli, [*words, *extra], standalone_mode=False)
        assert result.exception is None, f"{line}: {result.exception}\n{result.output}"
        outputs.append(result.output)
    assert "a folder each for image and text" in outputs[-1]
    assert 'from_pretrained("mixture-hf/image")' in outputs[-1]
    assert "82,112 parameters" in outputs[-2]
    name = "parameters/model/backbone.blocks.1.out_proj.weight"
    dense, image = (
        read_tensor(Path(run) / "checkpoints" / "step_00000003", stored)
        for run, stored in (("runs/mamba", name), ("runs/mixture", f"{name}.image"))
    )
    # No image was seen: what differs is decay alone.
    torch.testing.assert_close(image, dense, rtol=1e-2, atol=0)
