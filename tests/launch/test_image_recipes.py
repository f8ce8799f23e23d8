"""Recipes of generators over encoded images: published sizes and settings, and what is not published is not told."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from weft.launch.options import RECIPES, load_recipe
from weft.launch.plan import command as plan
from weft.models import build_task
from weft.models.errors import ConfigError

AR = {
    "b": 110_888_448,
    "l": 342_910_976,
    "xl": 774_699_520,
    "xl-131k": 1_068_300_800,
    "xxl": 1_410_972_672,
    "3b": 3_096_659_200,
}
# With positions for 256 tokens, as published, in millions.
DIT = {"s-2": 33, "b-2": 130, "l-2": 458, "xl-2": 675}


@pytest.mark.parametrize("name", AR)
def test_autoregressive_recipes_have_the_published_settings(name: str) -> None:
    config = load_recipe(f"image-ar/{name}").config
    model, optimizer = config.model, config.optimizer
    assert sum(model.count_parameters().values()) == AR[name]
    assert f"{AR[name]:,}" in (RECIPES / "image-ar" / f"{name}.yaml").read_text()
    assert config.batch_rows == 256
    assert config.data.sequence_length == model.image_tokens == 256
    assert config.train.steps == 300 * 1_281_167 // 256
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.05)
    assert (optimizer.clip_grad_norm, config.schedule.kind) == (1.0, "constant")
    assert (model.label_dropout, model.dropout, model.class_rotation) == (0.1, 0.1, "zero")


@pytest.mark.parametrize("name", DIT)
def test_diffusion_recipes_have_the_published_settings(name: str) -> None:
    config = load_recipe(f"dit/{name}").config
    model, optimizer = config.model, config.optimizer
    total = sum(model.count_parameters().values())
    assert (total + 256 * model.d_model) / 1e6 == pytest.approx(DIT[name], abs=0.6)
    assert f"{total:,}" in (RECIPES / "dit" / f"{name}.yaml").read_text()
    assert model.mean_image_tokens == 256
    assert model.ratios[0].std[0] == pytest.approx(1 / 0.18215, rel=1e-5)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (optimizer.clip_grad_norm, optimizer.ema_decay) == (None, 0.9999)
    assert (config.train.batch_tokens, config.train.steps) == (256, 400_000)


@pytest.mark.parametrize(("name", "size"), [("cat-ref-xl-2", 512), ("cat-ref-s-2", 256)])
def test_the_adaptive_recipes_save_what_is_reported(name: str, size: int) -> None:
    model = load_recipe(f"dit/{name}").config.model
    text = (RECIPES / "dit" / f"{name}.yaml").read_text()
    assert f"{sum(model.count_parameters().values()):,}" in text
    assert "reference design" in text
    assert model.image_size == size
    assert model.mean_image_tokens / model.image_tokens(16) == pytest.approx(0.82)
    with pytest.raises(ConfigError, match=r"model.ratios.0: the mean and std"):
        model.require_statistics()


def test_a_recipe_s_task_can_be_built() -> None:
    for name in ("image-ar/b", "dit/s-2", "dit/cat-ref-s-2"):
        config = load_recipe(name).config.model
        assert build_task(config).flops_per_token(256) == config.flops_per_token(256)


@pytest.mark.parametrize("recipe", ["image-ar/xl", "dit/xl-2"])
def test_plans_answer(recipe: str) -> None:
    done = CliRunner().invoke(plan, [recipe, "--gpus", "8"])
    assert done.exit_code == 0, done.output
    assert "fits:" in done.output
