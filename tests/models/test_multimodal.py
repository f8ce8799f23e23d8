"""What models of text, images and speech share: sorting, stems, noise, losses by modality."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from weft.kernels import Routing
from weft.models.batch import (
    AFTER_IMAGE,
    CAPTION_TARGETS,
    IGNORED,
    IMAGE_FIRST,
    IMAGE_KEYS,
    IMAGE_SPANS,
    IMAGES,
    LATENTS,
    NOISE,
    TARGET_MODALITY,
    TIMESTEPS,
    PackedBatch,
)
from weft.models.errors import DataError
from weft.models.initialise import initialise_module
from weft.models.multimodal.network import Backbone, route_batch
from weft.models.multimodal.routed import RoutedLinear, RoutedRMSNorm
from weft.models.multimodal.settings import ImageConfig, MultimodalConfig, UNetConfig
from weft.models.multimodal.stem import build_stem, patchify, unpatchify
from weft.models.multimodal.task import MultimodalTask
from weft.models.task import InitSpec

V, D = 50, 16
BOI, EOI = 48, 49
SMALL_UNET = UNetConfig(outer_width=8, inner_width=16, blocks=1, groups=4, head_width=8)


class Rows(Backbone):
    """A backbone that treats each position alone, so that every loss can be computed apart."""

    def __init__(self, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([RoutedLinear(D, D, modalities, bias=True)])
        self.norm = RoutedRMSNorm(D, 1e-6, modalities)

    def context(self, batch: PackedBatch, routing: Routing) -> None:
        return None

    def forward(self, x: Tensor, routing: Routing, context: Any) -> Tensor:
        return self.norm(x + self.blocks[0](x, routing), routing)


class RowsTask(MultimodalTask):
    def build_backbone(self) -> Backbone:
        return Rows(self.config.modalities)

    def backbone_init(self, name: str) -> InitSpec:
        return InitSpec("constant", value=1.0) if "norm" in name else InitSpec(std=0.3)

    def parameter_groups(self, networks: Any) -> Any:
        raise NotImplementedError

    def flops_per_token(self, sequence_length: int) -> float:
        raise NotImplementedError


def image_config(**changes: Any) -> ImageConfig:
    return ImageConfig(**{"channels": 2, "size": 4, "patch": 2, "time_width": 8, **changes})


def config(image: ImageConfig | None = None, **changes: Any) -> MultimodalConfig:
    modalities = ("text", "image") if image else ("text", "image", "speech")
    values = {"vocab_size": V, "d_model": D, "modalities": modalities, "image": image, **changes}
    return MultimodalConfig(**values)


def network(task: MultimodalTask, seed: int = 3) -> nn.Module:
    with torch.device("meta"):
        model = task.build_model()
    model.to_empty(device="cpu")
    initialise_module(model, "model", task, seed)
    if task.config.image is not None:
        # The way out starts at zero, which would hide what comes before it.
        nn.init.normal_(model.stem.output.weight, std=0.1)
    return model


def transfusion_batch(first_sample: int = 5, images: int = 2) -> PackedBatch:
    """Caption and image, then image and caption, four positions an image."""
    caption = [1, 7, 8, BOI, *[BOI] * 4, EOI]
    image_first = [1, BOI, *[BOI] * 4, EOI, 9, 10]
    documents = [caption, image_first][:images] or [[1, 7, 8, 9]]
    tokens, targets, modality, after, spans, positions = [], [], [], [], [], []
    for document in documents:
        inside = [i for i in range(len(document)) if document[i] == BOI][1:]
        begin = len(tokens)
        following = [*document[1:], 2]
        for i, token in enumerate(document):
            tokens.append(token)
            is_silent = token == BOI
            targets.append(IGNORED if is_silent else following[i])
            modality.append(int(i in inside))
            after.append(bool(inside) and i > inside[-1])
            positions.append(i)
        if inside:
            spans.append((begin + inside[0], begin + inside[-1] + 1))
    total = len(tokens)
    counted = [i for i in range(total) if targets[i] != IGNORED]
    generator = torch.Generator().manual_seed(11)
    counts = {
        "text_positions": total - sum(modality),
        "image_positions": sum(modality),
        "text_targets": len(counted),
        "image_targets": 0,
        CAPTION_TARGETS: sum(after[i] for i in counted),
        IMAGES: len(spans),
    }
    side = {
        TARGET_MODALITY: torch.zeros(total, dtype=torch.uint8),
        AFTER_IMAGE: torch.tensor(after),
        IMAGE_SPANS: torch.tensor(spans, dtype=torch.int32).reshape(-1, 2),
        LATENTS: torch.randn(len(spans), 2, 4, 4, generator=generator),
        IMAGE_FIRST: torch.tensor([False, True][: len(spans)]),
        IMAGE_KEYS: torch.tensor([(first_sample, i) for i in range(len(spans))]).reshape(-1, 2),
    }
    ends = torch.tensor([len(d) for d in documents]).cumsum(0)
    return PackedBatch(
        tokens=torch.tensor(tokens),
        targets=torch.tensor(targets),
        position_ids=torch.tensor(positions),
        cu_seqlens=torch.cat((torch.zeros(1), ends)).int(),
        max_seqlen=max(len(d) for d in documents),
        row_length=total,
        sample_ids=(first_sample,),
        source_ids=(0,),
        target_count=len(counted),
        modality=torch.tensor(modality, dtype=torch.uint8),
        host_counts=counts,
        side=side,
    )


def code_batch() -> PackedBatch:
    """Text, image codes and speech codes, mixed at random, next id everywhere."""
    generator = torch.Generator().manual_seed(2)
    total = 40
    tokens = torch.randint(V, (total,), generator=generator)
    modality = torch.randint(3, (total,), generator=generator).to(torch.uint8)
    targets, kinds = tokens.roll(-1), modality.roll(-1)
    targets[[9, 39]], kinds[[9, 39]] = IGNORED, 0
    after = torch.arange(total) >= 15
    counted = targets != IGNORED
    counts = {f"{m}_positions": int((modality == i).sum()) for i, m in enumerate(MODALITY_NAMES)}
    counts |= {
        f"{m}_targets": int((counted & (kinds == i)).sum()) for i, m in enumerate(MODALITY_NAMES)
    }
    counts |= {CAPTION_TARGETS: int((counted & (kinds == 0) & after).sum()), IMAGES: 1}
    return PackedBatch(
        tokens=tokens,
        targets=targets,
        position_ids=torch.arange(total),
        cu_seqlens=torch.tensor([0, 10, total], dtype=torch.int32),
        max_seqlen=30,
        row_length=total,
        sample_ids=(0,),
        source_ids=(0,),
        target_count=int(counted.sum()),
        modality=modality,
        host_counts=counts,
        side={TARGET_MODALITY: kinds, AFTER_IMAGE: after},
    )


MODALITY_NAMES = ("text", "image", "speech")


def test_losses_of_codes_are_sums_over_each_modality_of_the_target() -> None:
    batch, task = code_batch(), RowsTask(config())
    model = network(task)
    found = task.losses({"model": model}, batch)
    loss = cross_entropy(model(batch, "logits"), batch.targets, reduction="none", ignore_index=-100)
    counted = batch.targets != IGNORED
    kinds, after = batch.side[TARGET_MODALITY], batch.side[AFTER_IMAGE]
    wanted = {f"{m}_loss": loss[counted & (kinds == i)] for i, m in enumerate(MODALITY_NAMES)}
    wanted["caption_loss"] = loss[counted & (kinds == 0) & after]
    counts = task.counts(batch)
    assert set(found.metrics) == set(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(found.metrics[name].total, values.sum(), rtol=1e-5, atol=1e-4)
        assert counts[found.metrics[name].count] == len(values) > 0
    torch.testing.assert_close(found.terms["cross_entropy"].total, loss.sum(), rtol=1e-5, atol=1e-4)


def test_logits_are_in_the_order_of_positions() -> None:
    batch, task = code_batch(), RowsTask(config())
    model = network(task).double()
    x = model.embedding.tokens(batch.tokens)
    layer, rows = model.backbone.blocks[0], []
    for place, modality in enumerate(batch.modality.tolist()):
        name = MODALITY_NAMES[modality]
        h = x[place] + layer.weight[name] @ x[place] + layer.bias[name]
        h = h / (h.square().mean() + 1e-6).sqrt() * model.backbone.norm.weight[name]
        rows.append(model.head.weight @ h)
    torch.testing.assert_close(model(batch, "logits"), torch.stack(rows).float())


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("stem", ["linear", "unet"])
def test_the_denoising_loss_is_the_error_of_what_is_predicted(stem: str, prediction: str) -> None:
    image = image_config(stem=stem, prediction=prediction, unet=SMALL_UNET)
    task = RowsTask(config(image))
    model = network(task)
    batch = task.draw(transfusion_batch(), 1)
    predicted = model(batch, "denoised")
    latents, noise, t = (batch.side[name] for name in (LATENTS, NOISE, TIMESTEPS))
    signal = model.diffusion.alphas_bar[t].sqrt()[:, None, None, None]
    spread = (1 - signal**2).sqrt()
    wanted = noise if prediction == "epsilon" else signal * noise - spread * latents
    errors = (predicted.double() - wanted).square().flatten(1).mean(1)
    found = task.losses({"model": model}, batch)
    torch.testing.assert_close(found.terms["denoising"].total.double(), errors.sum())
    assert found.terms["denoising"].weight == 5.0
    buckets = [found.metrics[f"denoising_{i}"] for i in range(4)]
    torch.testing.assert_close(sum(b.total for b in buckets).double(), errors.sum())
    assert sum(task.counts(batch)[b.count] for b in buckets) == 2


def test_text_of_a_transfusion_batch_is_scored_with_what_follows_an_image_apart() -> None:
    task = RowsTask(config(image_config()))
    model = network(task)
    batch = task.draw(transfusion_batch(), 1)
    loss = cross_entropy(model(batch, "logits"), batch.targets, reduction="none", ignore_index=-100)
    found = task.losses({"model": model}, batch).metrics
    torch.testing.assert_close(found["text_loss"].total, loss.sum(), rtol=1e-5, atol=1e-4)
    after = batch.side[AFTER_IMAGE]
    torch.testing.assert_close(found["caption_loss"].total, loss[after].sum(), rtol=1e-5, atol=1e-4)
    assert task.counts(batch)[found["caption_loss"].count] == 4


def test_noise_belongs_to_the_image_and_the_seed() -> None:
    task = RowsTask(config(image_config(first_limit=7)))
    batch = transfusion_batch()
    one, again, other = (task.draw(batch, seed).side for seed in (1, 1, 2))
    assert torch.equal(one[NOISE], again[NOISE])
    assert torch.equal(one[TIMESTEPS], again[TIMESTEPS])
    assert not torch.equal(one[NOISE], other[NOISE])
    alone = copy.copy(batch.side)
    alone |= {name: alone[name][1:] for name in (LATENTS, IMAGE_FIRST, IMAGE_KEYS, IMAGE_SPANS)}
    second = task.draw(batch.__class__(**{**vars(batch), "side": alone}), 1).side
    assert torch.equal(second[NOISE], one[NOISE][1:])
    levels = [task.draw(transfusion_batch(sample), 1).side[TIMESTEPS] for sample in range(60)]
    plain, first = torch.stack(levels).unbind(1)
    assert first.max() < 7
    assert plain.max() > 900
    noise = torch.cat([task.draw(transfusion_batch(s), 1).side[NOISE] for s in range(60)])
    assert abs(noise.mean()) < 0.06
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("stem", ["linear", "unet"])
def test_a_batch_without_images_gives_gradients_of_zero(stem: str) -> None:
    task = RowsTask(config(image_config(stem=stem, unet=SMALL_UNET)))
    model = network(task)
    found = task.losses({"model": model}, task.draw(transfusion_batch(images=0), 1))
    total = sum(term.weight * term.total for term in found.terms.values())
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("stem.") or name.endswith(".image"):
            assert not parameter.grad.any(), name
    assert model.head.weight.grad.any()


def test_special_ids_have_a_table_of_their_own() -> None:
    task = RowsTask(config(image_config(), special_ids=(BOI, EOI + 30)))
    embed = network(task).embedding
    ids = torch.tensor([3, BOI, EOI + 30, 5])
    wanted = [embed.tokens.weight[3], embed.special[0], embed.special[1], embed.tokens.weight[5]]
    assert torch.equal(embed(ids), torch.stack(wanted))
    embed(ids).sum().backward()
    assert not embed.tokens.weight.grad[[0, BOI]].any()


def test_one_modality_needs_no_sorting() -> None:
    batch = code_batch()
    text = batch.__class__(**{**vars(batch), "modality": None, "host_counts": {}, "side": {}})
    routing = route_batch(text, ("text", "image"))
    assert routing.sizes == (40, 0)
    assert torch.equal(routing.order, torch.arange(40))
    sound = RowsTask(config())
    found = sound.losses({"model": network(sound)}, text)
    assert found.metrics["text_loss"].total == found.terms["cross_entropy"].total
    assert sound.counts(text)["text_targets"] == text.target_count


def test_a_modality_without_weights_is_named() -> None:
    with pytest.raises(
        DataError, match=r"the data have speech and model\.modalities is text, image"
    ):
        route_batch(code_batch(), ("text", "image"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "the data's images are 2 x 4 x 4 and model.image takes 2 x 8 x 8"),
        ({"patch": 4}, "2 images take 8 positions in the data, and with model.image.patch=4"),
    ],
)
def test_images_that_do_not_fit_are_named(changes: dict[str, int], message: str) -> None:
    task = RowsTask(config(image_config(**changes)))
    with pytest.raises(DataError, match=message):
        network(task)(task.draw(transfusion_batch(), 0))


def test_patches_are_squares_in_raster_order() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    rows = patchify(images, 2)
    assert torch.equal(rows[1].view(3, 2, 2), images[0, :, :2, 2:4])
    assert torch.equal(rows[3].view(3, 2, 2), images[0, :, 2:, :2])
    square = torch.randn(2, 3, 4, 4)
    assert torch.equal(unpatchify(patchify(square, 2), 3, 4, 2), square)


@pytest.mark.parametrize("stem", ["linear", "unet"])
@pytest.mark.parametrize("skip", [True, False])
def test_counts_of_a_stem(stem: str, skip: bool) -> None:
    image = ImageConfig(stem=stem, skip=skip)
    with torch.device("meta"):
        module = build_stem(image, 4096)
        with FlopCounterMode(display=False) as flops:
            images, t = torch.empty(2, 8, 32, 32), torch.zeros(2, dtype=torch.int64)
            rows, kept = module.down(images, t)
            module.up(rows, rows, kept, t)
    counted = sum(p.numel() for p in module.parameters())
    assert counted == image.count_parameters(4096)
    if stem == "unet":
        # Transfusion: 0.27 B for way in and way out together.
        assert 0.25e9 < counted < 0.28e9
    found = flops.get_total_flops() / (2 * image.positions)
    # The noise level's own layers are for an image, not for a position.
    assert found == pytest.approx(
        image.flops_per_position(4096), rel=0.03 if stem == "unet" else 0.5
    )


def test_both_stems_use_rows_noise_level_and_place() -> None:
    for stem in ("linear", "unet"):
        image = image_config(stem=stem, unet=SMALL_UNET, position_table=True)
        model = network(RowsTask(config(image)))
        images, t = torch.randn(1, 2, 4, 4), torch.tensor([3])
        rows, kept = model.stem.down(images, t)
        assert rows.shape == (4, D)
        out = model.stem.up(rows, rows, kept, t)
        assert out.shape == images.shape
        assert not torch.allclose(model.stem.down(images, t + 500)[0], rows)
        flat = torch.zeros(1, 2, 4, 4)
        same = model.stem.down(flat, t)[0]
        assert not torch.allclose(same[0], same[3])
