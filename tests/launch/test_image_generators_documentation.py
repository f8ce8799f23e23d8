"""The snippets and the message of docs/image-generators.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from weft.launch.options import load_recipe
from weft.models import build_model
from weft.models.dit.config import Config as DiTConfig
from weft.models.dit.config import RatioConfig
from weft.models.errors import ConfigError
from weft.models.image_ar.config import Config as ImageARConfig

PAGE = (Path(__file__).parents[2] / "docs" / "image-generators.md").read_text()
SIZE: dict[str, Any] = {"n_layers": 1, "d_model": 16, "n_heads": 1}


def test_the_snippets_run() -> None:
    codes, latents = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    ar = ImageARConfig(codebook_size=8, grid=2, d_ff=16, **SIZE)
    names: dict[str, Any] = {"network": build_model(ar)}
    exec(codes, names)
    assert tuple(names["codes"].shape) == (8, 4)
    ratios = tuple(RatioConfig(ratio=r, mean=(0.0,), std=(1.0,)) for r in (8, 16))
    config = DiTConfig(image_size=32, ratios=ratios, **SIZE)
    names |= {"network": build_model(config), "config": config}
    exec(latents.replace("steps=250", "steps=3"), names)
    assert [32 // image.shape[1] for image in names["latents"]] == names["ratios"]


def test_the_message_is_the_one_that_is_given() -> None:
    with pytest.raises(ConfigError) as problem:
        load_recipe("dit/cat-ref-xl-2").config.model.require_statistics()
    assert f"```\n{problem.value}\n```" in PAGE
