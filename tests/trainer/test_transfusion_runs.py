"""Runs on text and continuous images, in both families: resumed and replayed to the bit, every loss by its own count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import resume, run_new, same_run
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_tensor
from weft.trainer.replay.replay import ReplayOptions, replay_step

IMAGE = {"channels": 1, "size": 8, "patch": 2, "time_width": 16, "prediction": "v"}
SHARED = {"vocab_size": 264, "d_model": 16, "modalities": ["text", "image"], "image": IMAGE}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {**SHARED, "family": "mamba", "n_layers": 1, "d_state": 4},
    "mixture_of_transformers": {
        **SHARED,
        "family": "mixture_of_transformers",
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 24,
    },
}
CHANGES: dict[str, Any] = {
    "data__sequence_length": 128,
    "data__sources": [
        {"name": "tales", "path": "builtin:digits-captions:images=60", "weight": 0.8},
        {"name": "sums", "path": "builtin:python-stdlib", "weight": 0.2},
    ],
    "data__interleaved": {"image": {"codec": "pixels", "size": 8, "channels": 1, "patch_size": 2}},
    "data__held_out": {"documents": 4},
    "train__steps": 5,
    "train__batch_tokens": 512,
    "train__micro_batch_tokens": 256,
    "schedule__horizon_steps": 5,
    "checkpoint__every": 3,
    "optimizer__ema_decay": 0.9,
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and its run."""
    changes = {**CHANGES, "model": FAMILIES[request.param]}
    return request.param, run_new(tmp_path_factory.mktemp(request.param), **changes)


def test_a_stopped_run_goes_on_as_if_it_had_not(case: tuple[str, Path], tmp_path: Path) -> None:
    family, run = case
    other = run_new(tmp_path, "train.steps=2", **CHANGES, model=FAMILIES[family])
    assert resume(other, "train.steps=5") == 0
    same_run(run, other)


@pytest.mark.parametrize("stream", [False, True])
def test_every_loss_of_a_step_is_replayed(case: tuple[str, Path], stream: bool) -> None:
    report = replay_step(case[1], ReplayOptions(step=4, stream=stream))
    found = {c.name: (c.recorded, c.replayed) for c in report.comparisons}
    losses = {"loss", "denoising", "text_loss", "caption_loss", "denoising_0", "denoising_3"}
    assert losses <= set(found)
    for name in losses:
        was, now = found[name]
        assert was == now, name
    assert len(report.samples) == 4
    assert sum(item.targets for item in report.samples) == found.get("target_tokens", (0,))[0]


def test_a_step_without_images_leaves_what_is_for_images_alone(tmp_path: Path) -> None:
    texts = [{"name": "tales", "path": "builtin:python-stdlib"}]
    changes = {**CHANGES, "data__sources": texts, "optimizer__weight_decay": 0.5}
    for family, model in FAMILIES.items():
        run = run_new(tmp_path / family, **changes, model=model)
        moved = {}
        for name in ("stem.input.weight", "head.weight", *OWN[family]):
            first, last = (
                read_tensor(step_folder(run, step), f"parameters/model/{name}") for step in (3, 5)
            )
            moved[name] = not torch.equal(first, last)
        text, image = OWN[family]
        assert moved == {"stem.input.weight": False, "head.weight": True, text: True, image: False}


OWN = {
    "mamba": tuple(f"backbone.blocks.0.in_proj.weight.{m}" for m in ("text", "image")),
    "mixture_of_transformers": tuple(
        f"backbone.blocks.0.mlp.up_proj.weight.{m}" for m in ("text", "image")
    ),
}
