"""What is drawn for images, their losses and counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from image_batches import latent_batch
from test_dit_network import MIXED, random_model
from weft.models import build_model, build_task
from weft.models.batch import TIMESTEPS, PackedBatch
from weft.models.class_labels import LABEL_DROPPED
from weft.models.diffusion import Diffusion
from weft.models.dit.config import Config, RatioConfig
from weft.models.errors import ConfigError, DataError

PLACES = {8: [1, 4], 16: [0, 2, 5], 32: [3, 6, 7, 8]}
SIDES = {8: 8, 16: 4, 32: 2}


def batch_of(rows: list[int] | None = None, seed: int = 0) -> PackedBatch:
    """Nine images, or some of them, with the keys they have among the nine."""
    generator = torch.Generator().manual_seed(seed)
    moments = {
        r: torch.randn(len(p), 6, SIDES[r], SIDES[r], generator=generator)
        for r, p in PLACES.items()
    }
    labels = torch.arange(9) % 5
    if rows is None:
        return latent_batch(moments, PLACES, labels)
    part = latent_batch(
        {r: m[[i for i, row in enumerate(PLACES[r]) if row in rows]] for r, m in moments.items()},
        {r: [rows.index(row) for row in p if row in rows] for r, p in PLACES.items()},
        labels[rows],
    )
    part.side["image_keys"] = torch.tensor([[row, 0] for row in rows])
    return part


def of_no_prediction(batch: PackedBatch) -> float:
    """Sum over images of the mean square of their noise."""
    noise = [batch.side[f"noise_{ratio}"] for ratio in PLACES]
    return sum(float(n.square().flatten(1).mean(1).sum()) for n in noise)


def objective(task: Any, model: Any, batch: PackedBatch, counts: dict[str, int]) -> torch.Tensor:
    terms = task.losses({"model": model}, batch).terms.values()
    return sum((t.weight * t.total / counts[t.count] for t in terms), torch.zeros(()))


def test_what_is_drawn_follows_the_image_and_not_the_batch() -> None:
    task = build_task(Config(**MIXED))
    whole = task.draw(batch_of(), 5)
    rows = [7, 2, 1]
    part = task.draw(batch_of(rows), 5)
    for name in (TIMESTEPS, LABEL_DROPPED):
        assert torch.equal(part.side[name], whole.side[name][rows])
    for kind in ("noise", "posterior"):
        assert torch.equal(part.side[f"{kind}_32"][0], whole.side[f"{kind}_32"][2])
        assert torch.equal(part.side[f"{kind}_8"][0], whole.side[f"{kind}_8"][0])
    assert not torch.equal(task.draw(batch_of(), 6).side["noise_8"], whole.side["noise_8"])
    assert not torch.equal(whole.side["noise_8"], whole.side["posterior_8"])
    levels = torch.cat([task.draw(batch_of(), seed).side[TIMESTEPS] for seed in range(60)])
    assert levels.min() < 30
    assert levels.max() > 970


def test_every_image_counts_once() -> None:
    """The objective is the mean over images of the mean over an image's values, by hand."""
    config = Config(**MIXED)
    task, model = build_task(config), random_model(config)
    batch = task.draw(batch_of(), 0)
    errors, bits = torch.zeros(9), torch.zeros(9)
    diffusion = Diffusion(1000, "linear")
    with torch.no_grad():
        for place, item in enumerate(config.ratios):
            for i, row in enumerate(PLACES[item.ratio]):
                moments = batch.side[f"moments_{item.ratio}"][i]
                z = moments[:3] + (moments[3:] / 2).exp() * batch.side[f"posterior_{item.ratio}"][i]
                z = ((z - item.mean[0]) / item.std[0])[None]
                noise = batch.side[f"noise_{item.ratio}"][i : i + 1]
                t = batch.side[TIMESTEPS][row : row + 1]
                noised = diffusion.noised(z, noise, t)
                out = model([noised], t, batch.tokens[row : row + 1], [place])[0]
                errors[row] = (out[:, :3] - noise).square().mean()
                bits[row] = diffusion.variational_bits(z, noised, t, out[:, :3], out[:, 3:])[0]
        output = task.losses({"model": model}, batch)
    counts = task.counts(batch)
    assert counts == {"tokens": 9, "images": 9, "images_8": 2, "images_16": 3, "images_32": 4}
    torch.testing.assert_close(output.terms["denoising"].total, errors.sum())
    torch.testing.assert_close(output.terms["variational"].total, bits.sum())
    assert {term.count for term in output.terms.values()} == {"images"}
    for ratio, rows in PLACES.items():
        metric = output.metrics[f"denoising_{ratio}"]
        torch.testing.assert_close(metric.total, errors[rows].sum())
        assert metric.count == f"images_{ratio}"
    assert output.metrics["image_tokens"].total.item() == 2 * 64 + 3 * 16 + 4 * 4
    macs = 2 * config.forward_macs(64) + 3 * config.forward_macs(16) + 4 * config.forward_macs(4)
    assert output.metrics["image_gmacs"].total.item() == pytest.approx(macs / 1e9)


def test_parts_of_a_batch_add_up_to_it_though_one_lacks_ratios() -> None:
    """As on ranks whose mixes differ: sums over parts, divided by the global count."""
    config = Config(**MIXED)
    task = build_task(config)
    gradients = []
    for parts in ([None], [[1, 4, 3], [0, 2, 5, 6, 7, 8]]):
        model = random_model(config)
        total = 0.0
        for rows in parts:
            loss = objective(task, model, task.draw(batch_of(rows), 0), {"images": 9})
            loss.backward()
            total += loss.item()
        gradients.append((total, {n: p.grad for n, p in model.named_parameters()}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for name, grad in gradients[0][1].items():
        wanted = gradients[1][1][name]
        assert (grad - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_the_first_error_is_that_of_no_prediction() -> None:
    config = Config(**MIXED, learned_variance=False)
    task = build_task(config)
    batch = task.draw(batch_of(), 0)
    output = task.losses({"model": build_model(config)}, batch)
    assert set(output.terms) == {"denoising"}
    assert output.terms["denoising"].total.item() == pytest.approx(of_no_prediction(batch))


def test_labels_are_hidden_in_training_alone() -> None:
    config = Config(**MIXED)
    task, model = build_task(config), random_model(config)
    batch = task.draw(batch_of(), 0)
    hidden = torch.ones(9, dtype=torch.bool)
    batch.side[LABEL_DROPPED] = hidden
    trained = task.losses({"model": model}, batch).terms["denoising"].total
    batch.side[LABEL_DROPPED] = ~hidden
    open_ = task.losses({"model": model}, batch).terms["denoising"].total
    assert trained.item() != pytest.approx(open_.item(), rel=1e-4)
    batch.side[LABEL_DROPPED] = hidden
    with torch.no_grad():
        evaluated = task.losses({"model": model}, batch).terms["denoising"].total
    torch.testing.assert_close(evaluated, open_.detach())


def test_images_of_a_rank_that_has_none_of_its_own_count_for_nothing() -> None:
    config = Config(**MIXED)
    task, model = build_task(config), random_model(config)
    batch = replace(task.draw(batch_of(), 0), target_count=0)
    assert not any(task.counts(batch).values())
    output = task.losses({"model": model}, batch)
    assert not any(term.total.item() for term in {**output.terms, **output.metrics}.values())
    assert set(output.metrics) == {
        *(f"denoising_{ratio}" for ratio in PLACES),
        "image_tokens",
        "image_gmacs",
    }


def test_a_few_steps_learn_the_noise() -> None:
    config = Config(**{**MIXED, "d_model": 64})
    task, model = build_task(config), build_model(config, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses = []
    for step in range(80):
        batch = task.draw(batch_of(seed=0), step)
        batch.side.update({n: v * 0.1 for n, v in batch.side.items() if n.startswith("moments")})
        output = task.losses({"model": model}, batch)
        losses.append(output.terms["denoising"].total.item() / of_no_prediction(batch))
        objective(task, model, batch, {"images": 9}).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(1)
    assert sum(losses[-10:]) / 10 < 0.8


def test_a_shift_gives_finer_images_more_noise() -> None:
    task = build_task(Config(**MIXED, t_shift=True))
    ratios = [(d.alphas_bar[500] / (1 - d.alphas_bar[500])).sqrt().item() for d in task.diffusions]
    assert [r / ratios[1] for r in ratios] == pytest.approx([0.5, 1, 2])


def test_what_the_model_cannot_take_is_one_line() -> None:
    task = build_task(Config(**MIXED))
    batch = batch_of()
    batch.tokens[2] = 7
    with pytest.raises(DataError, match="class 7 and the model knows 0 to 4"):
        task.draw(batch, 0)
    ratios = (RatioConfig(ratio=8, mean=(0.0,), std=(1.0,)), RatioConfig(ratio=16))
    with pytest.raises(
        ConfigError, match=r"model.ratios.1: the mean and std of latents at ratio 16"
    ):
        build_task(Config(**{**MIXED, "ratios": ratios})).draw(batch_of(), 0)
    ratios = (RatioConfig(ratio=8, mean=(0.0,), std=(1.0,)),)
    with pytest.raises(DataError, match="moments_16 and the model knows ratios 8"):
        build_task(Config(**{**MIXED, "ratios": ratios})).draw(batch_of(), 0)
    with pytest.raises(DataError, match="3 channels and the model takes 4"):
        build_task(Config(**{**MIXED, "channels": 4})).draw(batch_of(), 0)
    batch = batch_of()
    del batch.side["moments_8"]
    with pytest.raises(DataError, match="9 images of the batch have 7 latents"):
        task.draw(batch, 0)
    with pytest.raises(DataError, match=r"pass it through Task\.draw first"):
        task.losses({"model": random_model(Config(**MIXED))}, batch_of())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": [{"ratio": 8}, {"ratio": 8}]}, "name one twice"),
        ({"ratios": [{"ratio": 24}]}, "not a multiple of ratio 24 times patch 1"),
        ({"ratios": [{"ratio": 8, "mean": [0.0, 1.0]}]}, "2 values of mean; give 1 or channels=3"),
        ({"ratios": [{"ratio": 8, "std": [0.0]}]}, "holds no standard deviations"),
        ({"d_model": 30, "n_heads": 2}, "not a multiple of 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{**MIXED, **settings})


def test_every_parameter_has_one_group() -> None:
    config = Config(**MIXED)
    task, networks = build_task(config), {"model": build_model(config)}
    groups = {group.name: group for group in task.parameter_groups(networks)}
    names = [name for group in groups.values() for name in group.parameters]
    assert sorted(names) == sorted(f"model/{n}" for n, _ in networks["model"].named_parameters())
    assert {"model/classes.weight", "model/ratios.weight", "model/patches.bias"} <= set(
        groups["no_decay"].parameters
    )
    assert "model/blocks.0.modulation.weight" in groups["decay"].parameters
    assert len(task.blocks(networks)) == 2


def test_the_debug_size_keeps_what_is_the_data_s() -> None:
    small = Config(ratios=MIXED["ratios"], channels=16).debug_size()
    assert (small.n_layers, small.d_model, small.head_width) == (2, 64, 16)
    assert (small.channels, small.classes, len(small.ratios)) == (16, 1000, 3)
    assert math.isclose(small.flops_per_token(1), build_task(small).flops_per_token(1))
