"""Image tokenizers as a task: which loss trains what, the regulariser's options, ratios, the adaptive weight, measures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import ADVERSARY, CAUSAL, NESTED, SMALL, pictures, small
from torch import nn
from weft.models import build_task
from weft.models.batch import IMAGES, PIXELS, PackedBatch
from weft.models.errors import DataError
from weft.models.image_tokenizer.config import Config, CRTConfig
from weft.models.image_tokenizer.measures import (
    LatentStatistics,
    code_measures,
    measured_gain,
    psnr,
)
from weft.models.image_tokenizer.pixel_losses import adaptive_weight, attach_gradient, measure
from weft.models.image_tokenizer.predictor import Predictor, causal_loss
from weft.models.image_tokenizer.task import POSTERIOR_NOISE, ImageTokenizerTask
from weft.models.initialise import initialise_module
from weft.models.task import LossOutput

FULL = {"crt": CAUSAL, "adversarial": {**ADVERSARY, "adaptive": False}}
PARTS = ("predictor", "encoder", "codebook", "decoder", "discriminator")


def built(config: Config, step: int = 1) -> tuple[ImageTokenizerTask, dict[str, nn.Module]]:
    task = build_task(config)
    assert isinstance(task, ImageTokenizerTask)
    networks = task.build_networks()
    for name, network in networks.items():
        initialise_module(network, name, task, 0)
    task.begin_step(step)
    return task, networks


def part_of(name: str) -> str:
    network, _, own = name.partition("/")
    if network != "model":
        return network
    if "quantizer" in own:
        return "codebook"
    return "encoder" if own.startswith(("encoder", "quant_conv")) else "decoder"


def trained_by(networks: dict[str, nn.Module], total: torch.Tensor) -> set[str]:
    """Parts that a loss gives a gradient."""
    named = {f"{n}/{k}": p for n, m in networks.items() for k, p in m.named_parameters()}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
    gradients = zip(named, found, strict=True)
    return {part_of(name) for name, g in gradients if g is not None and bool(g.any())}


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("crt", {"predictor", "encoder"}),
        ("codebook", {"codebook"}),
        ("commitment", {"encoder"}),
        ("reconstruction", {"encoder", "decoder"}),
        ("adversarial", {"encoder", "decoder"}),
    ],
)
def test_each_loss_trains_its_own_parts(term: str, parts: set[str]) -> None:
    task, networks = built(small(**FULL, reconstruction={"perceptual": "random_features"}))
    output = task.losses(networks, pictures(range(4)))
    assert trained_by(networks, output.terms[term].total) == parts


def test_the_discriminator_is_trained_by_its_own_phase_alone() -> None:
    task, networks = built(small(**FULL))
    batch = pictures(range(4))
    first = task.losses(networks, batch)
    again = replace(batch, side={**batch.side, **first.carried})
    second = task.losses(networks, again, "discriminator")
    assert trained_by(networks, second.terms["hinge"].total) == {"discriminator"}
    assert task.phases(1) == ("train", "discriminator")
    late, _ = built(small(adversarial={**ADVERSARY, "start_step": 5}))
    assert [late.phases(step) for step in (4, 5)] == [("train",), ("train", "discriminator")]


def gradient_of_latents(loss: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss.sum(), latents, retain_graph=True)
    return found


class LastLatent(nn.Module):
    """Expects each latent to be twice the one before it, the first to be zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros_like(x[:, :1]), 2 * x[:, :-1]), 1)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # x = 1, 3: errors 0 - 1 and 2 - 3, half of the sum of squares; slopes of target -e, of input 2 e.
        ({}, [1.0 - 2.0, 1.0]),
        ({"target_stopgrad": True}, [-2.0, 0.0]),
        ({"input_stopgrad": True}, [1.0, 1.0]),
    ],
)
def test_the_encoder_feels_lambda_times_the_loss_by_inputs_and_targets(
    options: dict[str, Any], wanted: list[float]
) -> None:
    latents = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2).requires_grad_()
    for weight in (1.0, 4.0):
        loss = causal_loss(LastLatent(), latents, encoder_weight=weight, **options)
        assert loss.item() == 1.0
        found = gradient_of_latents(loss, latents).flatten().tolist()
        assert found == [weight * slope for slope in wanted]


def test_reductions_of_the_causal_loss() -> None:
    latents = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).T.view(1, 2, 1, 2)
    found = {}
    for reduction in ("mean_all", "sum_dim", "norm"):
        zero = lambda x: torch.zeros_like(x)  # noqa: E731
        loss = causal_loss(zero, latents, encoder_weight=1.0, reduction=reduction)  # type: ignore[arg-type]
        found[reduction] = loss.item()
    assert found == pytest.approx({"mean_all": 6.25, "sum_dim": 12.5, "norm": 2.5}, rel=1e-5)


def test_the_predictor_learns_from_the_unscaled_loss_while_the_encoder_feels_nothing() -> None:
    gradients = []
    for step in (1, 6, 11, 50):
        task, networks = built(small(crt={**CAUSAL, "weight": 4.0, "ramp_steps": 10}), step)
        task.losses(networks, pictures(range(4))).terms["crt"].total.backward()
        encoder = networks["model"].get_parameter("encoder.input.weight").grad
        predictor = networks["predictor"].get_parameter("input.weight").grad
        assert predictor is not None
        gradients.append((torch.zeros(1) if encoder is None else encoder, predictor))
    assert not gradients[0][0].any()
    torch.testing.assert_close(2 * gradients[1][0], gradients[2][0])
    assert torch.equal(gradients[2][0], gradients[3][0])
    assert all(torch.equal(gradients[0][1], predictor) for _, predictor in gradients)
    assert [CRTConfig(ramp_steps=4).weight_at(step) for step in (1, 2, 5, 9)] == [0, 1, 4, 4]


def test_lambda_zero_is_the_baseline_to_the_bit() -> None:
    """The predictor's own start values, gradient and norm touch nothing of the tokenizer."""
    found = []
    for crt in (None, {**CAUSAL, "weight": 0.0}):
        task, networks = built(small(crt=crt))
        output = task.losses(networks, pictures(range(4)))
        sum(t.total * t.weight for t in output.terms.values()).backward()  # type: ignore[union-attr]
        found.append({n: (p.detach(), p.grad) for n, p in networks["model"].named_parameters()})
    for name, (weight, gradient) in found[0].items():
        assert torch.equal(weight, found[1][name][0])
        assert torch.equal(gradient, found[1][name][1]), name


def test_the_predictor_is_causal() -> None:
    predictor = Predictor(CRTConfig(**CAUSAL), 4, 9)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 9, 4)
    before = predictor(x)
    for place in range(9):
        changed = x.clone()
        changed[:, place] += 1.0
        moved = (predictor(changed) != before).any(2)[0]
        assert not moved[: place + 1].any()
        assert place == 8 or moved[place + 1 :].all()


def test_raw_latents_and_what_is_told_of_them() -> None:
    task, networks = built(small(crt={**CAUSAL, "space": "raw"}))
    output = task.losses(networks, pictures(range(4)))
    told = task.summarise(output.vectors)
    model: Any = networks["model"]
    x = pictures(range(4)).side[PIXELS].float() / 127.5 - 1
    z = model.encode(x, [4])[0]
    torch.testing.assert_close(
        told["latent_variance"], z.movedim(1, -1).flatten(0, -2).var(0, correction=0).mean()
    )
    length = output.metrics["latent_length"].total / 4
    torch.testing.assert_close(length, z.norm(dim=1).mean())
    record = {"step": 1.0, "crt": 0.5, "latent_variance": 0.25}
    assert task.review(record, 4) == {"crt_weight": 4.0, "crt_unexplained": 2.0}


def test_use_of_codes_is_that_of_all_counts_together() -> None:
    first, second = torch.tensor([4, 0, 0, 0]), torch.tensor([0, 4, 0, 0])
    whole = code_measures(first + second)
    assert whole["codes_used"] == 2
    assert whole["code_perplexity"].item() == pytest.approx(2.0)
    assert whole["code_entropy"].item() == pytest.approx(np.log(2))
    assert code_measures(first)["code_perplexity"] == 1.0


# Losses of pictures


def test_attached_gradients_are_those_of_the_loss_itself() -> None:
    task, networks = built(small(reconstruction={"perceptual": "random_features"}))
    batch = pictures(range(2))
    x = batch.side[PIXELS].float() / 127.5 - 1
    weight = networks["model"].get_parameter("decoder.output.weight")
    (found,) = torch.autograd.grad(
        task.losses(networks, batch).terms["reconstruction"].total, weight
    )
    made = networks["model"](x, [2]).pixels
    (wanted,) = torch.autograd.grad(task._reconstruction(x, made)[0].sum(), weight)
    torch.testing.assert_close(found, wanted)


def test_the_adaptive_weight_is_autograds() -> None:
    torch.manual_seed(0)
    features, conv = torch.randn(3, 8, 16, 16), nn.Conv2d(8, 3, 3, padding=1)
    made = conv(features)[:, :, :15, :14]
    losses = [lambda y: (y.abs().sum((1, 2, 3)),), lambda y: (-(y**3).mean((1, 2, 3)),)]
    slopes = [measure(loss, made)[0] for loss in losses]
    gradients = [
        torch.autograd.grad(loss(made)[0].mean(), conv.weight, retain_graph=True)[0]
        for loss in losses
    ]
    wanted = gradients[0].norm() / (gradients[1].norm() + 1e-4)
    torch.testing.assert_close(adaptive_weight(features, 3, *slopes), wanted)
    value = attach_gradient(made, torch.tensor(2.0), slopes[0])
    assert value == 2.0
    (through,) = torch.autograd.grad(3 * value, conv.weight)
    torch.testing.assert_close(through, 9 * gradients[0], rtol=1e-4, atol=1e-3)
    silent = adaptive_weight(features, 3, slopes[0], torch.zeros_like(made))
    assert silent == 1e4


def test_sums_weigh_the_perceptual_distance_by_every_element() -> None:
    changes = {"error": "l1", "perceptual": "gradient", "perceptual_weight": 0.5}
    x, y = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    mean, whole = (
        built(small(reconstruction={**changes, "reduction": r}))[0]._reconstruction(x, y)
        for r in ("mean", "sum")
    )
    torch.testing.assert_close(mean[1], (x - y).abs().mean((1, 2, 3)))
    torch.testing.assert_close(mean[0], mean[1] + 0.5 * mean[2])
    torch.testing.assert_close(whole[0], 3 * 16 * 16 * mean[0])


def test_divergence_of_known_posteriors() -> None:
    config = small(NESTED, latent={"ratio_weights": {8: 2.0}})
    task, networks = built(config)
    batch = task.draw(pictures(range(3), ratios=[2, 0, 2]), 0)
    output = task.losses(networks, batch)
    model: Any = networks["model"]
    x = batch.side[PIXELS][[1, 0, 2]].float() / 127.5 - 1
    found = model(x, [1, 0, 2])
    wanted = 0.0
    for mean, logvar, weight in zip(found.means, found.logvars, (1, 1, 2), strict=True):
        normal = torch.distributions.Normal(mean, (logvar / 2).exp())
        unit = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
        wanted += weight * float(torch.distributions.kl_divergence(normal, unit).detach().sum())
    assert output.terms["kl"].total.item() == pytest.approx(wanted, rel=1e-4)
    each = built(small(NESTED, latent={"kl_norm": "per_element"}))[0].losses(networks, batch)
    parts = [
        v.square() + lv.exp() - 1 - lv for v, lv in zip(found.means, found.logvars, strict=True)
    ]
    means = sum(float((p / 2).detach().mean((1, 2, 3)).sum()) for p in parts)
    assert each.terms["kl"].total.item() == pytest.approx(means, rel=1e-4)


# Ratios and what is drawn


def losses_of(task: ImageTokenizerTask, networks: Any, batch: PackedBatch) -> LossOutput:
    return task.losses(networks, task.draw(batch, 3))


def test_a_picture_has_its_losses_whatever_is_beside_it() -> None:
    task, networks = built(small(NESTED, adversarial=ADVERSARY))
    both = losses_of(task, networks, pictures([5, 9, 2], ratios=[2, 0, 1]))
    for sample, ratio in ((5, 2), (9, 0), (2, 1)):
        alone = losses_of(task, networks, pictures([sample], ratios=[ratio]))
        name = f"psnr_{(2, 4, 8)[ratio]}"
        torch.testing.assert_close(
            alone.metrics[name].total, both.metrics[name].total, rtol=1e-4, atol=1e-4
        )
    parts = sum(both.metrics[f"psnr_{ratio}"].total for ratio in (2, 4, 8))
    torch.testing.assert_close(parts, both.metrics["psnr"].total)


def test_noise_is_drawn_from_the_key_of_the_image_alone() -> None:
    task, _ = built(small(NESTED))
    whole = task.draw(pictures(range(4), ratios=[2, 0, 2, 1]), 7).side[POSTERIOR_NOISE]
    sizes = [4 * 64, 4 * 16, 4 * 4, 4 * 4]
    by_image = dict(zip((1, 3, 0, 2), whole.split(sizes), strict=True))
    for sample, ratio in ((0, 2), (1, 0), (2, 2), (3, 1)):
        alone = task.draw(pictures([sample], ratios=[ratio]), 7).side[POSTERIOR_NOISE]
        assert torch.equal(alone, by_image[sample])
    other = task.draw(pictures([1], ratios=[0]), 8).side[POSTERIOR_NOISE]
    assert not torch.equal(other, by_image[1])
    every, networks = built(small(NESTED, every_ratio=True))
    batch = every.draw(pictures(range(2)), 7)
    counts = every.counts(batch)
    assert (counts[IMAGES], counts["images_from_4"], counts["images_8"]) == (6, 4, 2)
    assert len(batch.side[POSTERIOR_NOISE]) == 2 * 4 * (64 + 16 + 4)
    assert every.losses(networks, batch).metrics["psnr_8"].total > 0


def test_data_that_do_not_fit_the_model() -> None:
    task, networks = built(small(NESTED))
    with pytest.raises(DataError, match="2 pictures and ratios for 0: the data say no ratio"):
        task.draw(pictures(range(2)), 0)
    plain, networks = built(small())
    with pytest.raises(DataError, match=r"32 x 32 pixels and model\.size is 16; set model\.size"):
        plain.losses(networks, pictures(range(2), size=32))
    with pytest.raises(DataError, match=r"4 channels and model\.in_channels is 3"):
        plain.losses(networks, pictures(range(2), channels=4))
    with pytest.raises(DataError, match=r"bring no pictures; set data\.images"):
        plain.losses(networks, replace(pictures(range(2)), side={}))
    plain.losses(networks, pictures(range(2), channels=1))


def test_rows_that_only_fill_a_round_count_for_nothing() -> None:
    for config in (small(crt=CAUSAL), small(NESTED)):
        task, networks = built(config)
        empty = replace(pictures([1, 2], ratios=[0, 0]), target_count=0, host_counts={IMAGES: 0})
        drawn = task.draw(empty, 0)
        assert not any(task.counts(drawn).values())
        with torch.no_grad():
            output = task.losses(networks, drawn)
        assert all(term.total == 0 for term in {**output.terms, **output.metrics}.values())


# Measures


def test_gain_is_the_difference_of_errors_at_both_ends() -> None:
    config = small(NESTED)
    _, networks = built(config)
    pixels = pictures(range(3)).side[PIXELS]
    x = pixels.float() / 127.5 - 1
    with torch.no_grad():
        errors = [
            (x - networks["model"](x, sizes).pixels.clamp(-1, 1)).square().mean((1, 2, 3))
            for sizes in ([0, 0, 3], [3, 0, 0])
        ]
    torch.testing.assert_close(
        measured_gain(networks["model"], config, pixels), errors[0] - errors[1]
    )
    assert psnr(torch.tensor(0.04)).item() == pytest.approx(20.0)


def test_latent_statistics_are_those_of_samples() -> None:
    config = small(NESTED)
    _, networks = built(config)
    model: Any = networks["model"]
    pixels = pictures(range(6)).side[PIXELS]
    whole, parts = LatentStatistics(config), [LatentStatistics(config) for _ in range(2)]
    whole.add(model, pixels, 4)
    for part, rows in zip(parts, (pixels[:2], pixels[2:]), strict=True):
        part.add(model, rows, 4)
    parts[0].merge(parts[1])
    assert parts[0].result()[4]["std"] == pytest.approx(whole.result()[4]["std"], rel=1e-5)
    found = whole.result()
    assert list(found) == [4]
    with torch.no_grad():
        moments = model.encode(pixels.float() / 127.5 - 1, [0, 6, 0])[1]
        mean, logvar = moments.chunk(2, 1)
        samples = mean + (logvar / 2).exp() * torch.randn(4000, *mean.shape)
    assert found[4]["mean"] == pytest.approx(float(samples.mean()), abs=0.02)
    assert found[4]["std"] == pytest.approx(float(samples.std()), rel=0.02)
    assert found[4]["images"] == 6
    assert len(found[4]["channel_std"]) == 4


def test_small_forms_keep_what_the_data_fix() -> None:
    config = Config(size=64, crt={}, adversarial={}, quantizer={"codes": 16384})
    smaller = config.debug_size()
    assert (smaller.size, smaller.all_ratios, smaller.kind) == (64, (16,), "vq")
    assert sum(smaller.count_parameters().values()) < 1e6
    assert SMALL["size"] == 16
