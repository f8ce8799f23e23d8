"""Autoencoders of images: sizes, shapes, parity with diffusers, the quantiser's contract, discriminator, perceptual losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import ADVERSARY, CAUSAL, NESTED, SMALL, small
from weft.models import build_task
from weft.models.errors import ConfigError, DataError
from weft.models.image_tokenizer.accounting import forward_flops
from weft.models.image_tokenizer.autoencoder import Autoencoder, pad_pixels
from weft.models.image_tokenizer.config import (
    AdversarialConfig,
    Config,
    QuantizerConfig,
    ReconstructionConfig,
)
from weft.models.image_tokenizer.diffusers import import_diffusers
from weft.models.image_tokenizer.discriminator import Discriminator, hinge_loss
from weft.models.image_tokenizer.perceptual import VGG_STAGES, open_perceptual
from weft.models.image_tokenizer.quantizer import Quantizer, nearest_codes
from weft.models.initialise import initialise_module

VQ_16 = (128, 128, 256, 256, 512)
VQ_8 = (128, 256, 256, 512)
CAT_REF: dict[str, Any] = {
    "kind": "nested",
    "channels": (128, 128, 256, 256, 512, 512),
    "latent_channels": 16,
    "quant_conv": False,
    "lowest_attention": False,
    "ratios": (8, 16, 32),
}


def built(config: Config) -> Autoencoder:
    task = build_task(config)
    model = task.build_networks()["model"]
    assert isinstance(model, Autoencoder)
    initialise_module(model, "model", task, 0)
    return model


def on_meta(config: Config) -> dict[str, int]:
    with torch.device("meta"):
        networks = build_task(config).build_networks()
    return {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}


@pytest.mark.parametrize(
    ("channels", "codes", "total"),
    [
        (VQ_16, 1024, 71_760_523),
        (VQ_16, 16384, 71_883_403),
        (VQ_16, 131_072, 72_800_907),
        (VQ_8, 1024, 69_986_955),
        (VQ_8, 16384, 70_109_835),
        (VQ_8, 131_072, 71_027_339),
    ],
)
def test_parameters_of_vq(channels: tuple[int, ...], codes: int, total: int) -> None:
    config = Config(channels=channels, quantizer={"codes": codes}, adversarial={"norm": "batch"})
    found = on_meta(config)
    assert found == {"model": total, "discriminator": 2_765_633}
    assert sum(config.count_parameters().values()) == sum(found.values())


def test_parameters_of_the_parts_of_vq_16() -> None:
    with torch.device("meta"):
        model = Autoencoder(Config())
    assert sum(p.numel() for p in model.encoder.parameters()) == 29_298_176
    assert sum(p.numel() for p in model.decoder.parameters()) == 42_449_795
    flops = forward_flops(Config())
    assert [round(flops[part] / 1e9, 1) for part in ("encoder", "decoder")] == [138.4, 252.7]


@pytest.mark.parametrize(
    ("changes", "total"), [({}, 119_960_739), ({"middle_blocks": 8}, 176_620_707)]
)
def test_parameters_of_nested(changes: dict[str, Any], total: int) -> None:
    config = Config(**{**CAT_REF, **changes})
    assert on_meta(config) == {"model": total}
    assert sum(config.count_parameters().values()) == total
    with torch.device("meta"):
        model = Autoencoder(config)
    adapters = [*model.encoder.adapters.parameters(), *model.decoder.adapters.parameters()]
    if not changes:
        assert total - sum(p.numel() for p in adapters) == 92_679_331


@pytest.mark.parametrize(
    "config",
    [
        small(crt=CAUSAL, adversarial=ADVERSARY),
        small(kind="kl", adversarial={**ADVERSARY, "norm": "sync_batch"}),
        small(NESTED, channels=(8, 16, 24, 32), groups=8),
        Config(**CAT_REF).debug_size(),
        Config(crt={}, adversarial={}).debug_size(),
    ],
)
def test_sizes_by_arithmetic_are_those_of_the_networks(config: Config) -> None:
    assert sum(config.count_parameters().values()) == sum(on_meta(config).values())
    assert config.flops_per_token(1) > 3 * sum(forward_flops(config).values()) * 0.9


@pytest.mark.parametrize("size", [(17, 16), (13, 22), (5, 8)])
def test_odd_sizes_come_back_as_they_were(size: tuple[int, int]) -> None:
    pixels = torch.rand(2, 3, *size) * 2 - 1
    for config, sizes in ((small(), [2]), (small(NESTED), [1, 0, 1])):
        found = built(config)(pixels, sizes)
        assert found.pixels.shape == pixels.shape
        assert found.features.shape[2] % config.all_ratios[-1] == 0


def test_pictures_are_mirrored_and_too_small_ones_refused() -> None:
    row = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    assert pad_pixels(row, 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    with pytest.raises(DataError, match="4 x 4 pixels is too small for a ratio of 8: at least 5"):
        pad_pixels(row[..., :4, :4], 8)


def test_ratios_of_one_network_have_their_shapes_and_parts() -> None:
    model = built(small(NESTED))
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    together = model(pixels, [1, 1, 1])
    assert [tuple(mean.shape) for mean in together.means] == [
        (1, 4, 8, 8),
        (1, 4, 4, 4),
        (1, 4, 2, 2),
    ]
    for place in range(3):
        sizes = [int(place == other) for other in range(3)]
        alone = model(pixels[place : place + 1], sizes)
        torch.testing.assert_close(alone.pixels[0], together.pixels[place], rtol=1e-4, atol=1e-5)
    model(pixels, [3, 0, 0]).pixels.square().sum().backward()
    untouched = ("levels.2", "levels.3", "downs.1", "downs.2", "ups.1", "ups.2")
    untouched += ("adapters.4", "adapters.8")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != any(part in name for part in untouched), name


def test_settings_that_do_not_fit() -> None:
    for changes, told in (
        ({**NESTED, "ratios": (2, 4)}, "coarsest ratio is 4"),
        ({**NESTED, "ratios": (3, 8)}, "ascending powers of two"),
        ({**SMALL, "groups": 3}, "not a multiple of groups 3"),
        ({**SMALL, "ratios": (2, 4)}, "belong to kind nested"),
        ({**NESTED, "crt": {}}, "crt regularises the latents of kind vq"),
        ({**SMALL, "reconstruction": {"perceptual": "vgg"}}, "none of off, file:PATH"),
    ):
        with pytest.raises(ValueError, match=told):
            Config(**changes)


# The quantiser


def test_straight_through_gives_codes_and_passes_gradients_on() -> None:
    quantizer = Quantizer(QuantizerConfig(codes=16, width=4))
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    found = quantizer(z)
    torch.testing.assert_close(found.values, quantizer.lookup(found.codes))
    torch.testing.assert_close(found.values.norm(dim=1), torch.ones(2, 3, 3))
    wanted = torch.randn_like(found.values)
    (reached,) = torch.autograd.grad(
        (found.values * wanted).sum(), found.latents, retain_graph=True
    )
    assert torch.equal(reached, wanted)
    assert torch.autograd.grad(
        found.commitment.sum(), quantizer.codebook, allow_unused=True, retain_graph=True
    ) == (None,)
    assert torch.autograd.grad(found.codebook.sum(), z, allow_unused=True, retain_graph=True) == (
        None,
    )
    assert torch.autograd.grad(found.codebook.sum(), quantizer.codebook, retain_graph=True)[0].any()
    assert torch.autograd.grad(found.commitment.sum(), z)[0].any()


def test_lookup_is_exact_in_parts_under_autocast_and_for_ties() -> None:
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(64, 8), dim=1)
    table[7], table[50] = table[3], table[3]
    rows = torch.nn.functional.normalize(torch.randn(500, 8), dim=1)
    rows[0] = table[3]
    nearest = (rows.double()[:, None] - table.double()).square().sum(2).argmin(1)
    for chunk in (1, 64 * 7, 1 << 20):
        codes = nearest_codes(rows, table, is_normalised=True, chunk_values=chunk)
        assert torch.equal(codes, nearest)
    assert codes[0] == 3
    quantizer = Quantizer(QuantizerConfig(codes=64, width=8))
    quantizer.codebook.data = table
    latents = rows.T.reshape(1, 8, 20, 25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(latents)
    assert found.values.dtype == torch.float32
    assert torch.equal(found.codes.flatten(), nearest)


def test_lookup_by_distance_survives_a_large_common_part() -> None:
    torch.manual_seed(0)
    table, rows = (100 + 0.01 * torch.randn(n, 256) for n in (64, 200))
    nearest = (rows.double()[:, None] - table.double()).square().sum(2).argmin(1)
    codes = nearest_codes(rows, table, is_normalised=False, chunk_values=1 << 20)
    assert (codes == nearest).float().mean() > 0.98


def test_latents_of_zeros_have_bounded_gradients() -> None:
    quantizer = Quantizer(QuantizerConfig(codes=16, width=4))
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.zeros(1, 4, 2, 2, requires_grad=True)
    quantizer(z).commitment.sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().max() < 1e7


def test_the_codebook_starts_with_rows_of_length_one() -> None:
    codebook = built(small()).quantizer
    assert codebook is not None
    torch.testing.assert_close(codebook.codebook.norm(dim=1), torch.ones(32))
    plain = built(small(quantizer={"codes": 32, "width": 4, "normalise": False})).quantizer
    assert plain is not None
    assert 0 < float(plain.codebook.detach().abs().max()) <= 1 / 32


# Parity


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_weights_of_diffusers_give_their_pixels(kind: str, attention: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2
        + (("AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"),),
        "up_block_types": (("AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D"),)
        + ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    if kind == "vq":
        theirs = diffusers.VQModel(num_vq_embeddings=64, vq_embed_dim=4, **common)
    else:
        theirs = diffusers.AutoencoderKL(**common)
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    config, weights = import_diffusers(tmp_path)
    model = Autoencoder(config)
    model.load_state_dict(weights)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        wanted = theirs(pixels).sample
        found = model(pixels, [2]).pixels
    assert (wanted - found).abs().max() < 1e-4
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("silu", "relu")
    )
    with pytest.raises(ConfigError, match="act_fn is relu"):
        import_diffusers(tmp_path)
    with pytest.raises(DataError, match=r"no config\.json"):
        import_diffusers(tmp_path / "nowhere")


# Discriminator


@pytest.mark.parametrize("norm", ["group", "batch", "sync_batch"])
def test_the_discriminator_runs_with_every_norm_and_on_nothing(norm: Any) -> None:
    torch.manual_seed(0)
    critic = Discriminator(AdversarialConfig(width=8, layers=2, groups=4, norm=norm), 3)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(3, 3, 16, 16)
    scores = critic(pixels)
    assert scores.shape[0] == 3
    critic(pixels[:0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in critic.parameters())


def test_synchronised_norms_of_one_rank_are_batch_norms() -> None:
    torch.manual_seed(0)
    plain, synchronised = (
        Discriminator(AdversarialConfig(width=8, layers=2, norm=norm), 3)  # type: ignore[arg-type]
        for norm in ("batch", "sync_batch")
    )
    for name, parameter in plain.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        synchronised.get_parameter(name).data.copy_(parameter)
    pixels = torch.randn(3, 3, 16, 16)
    outputs = [critic(pixels) for critic in (plain, synchronised)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in plain.named_parameters():
        other = synchronised.get_parameter(name)
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_hinge_loss_of_known_scores() -> None:
    real, made = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[-3.0, 1.0]]])
    # relu(1 - 2), relu(1 - 0) against relu(1 - 3), relu(1 + 1): halves of the means 0.5 and 1.
    assert hinge_loss(real, made).tolist() == [0.75]


# Perceptual losses


def vgg(path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    widths = iter([3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512])
    inputs, weights = next(widths), {}
    for place in (n for stage in VGG_STAGES for n in stage):
        outputs = next(widths)
        weights[f"features.{place}.weight"] = (
            torch.randn(outputs, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        )
        weights[f"features.{place}.bias"] = torch.zeros(outputs)
        inputs = outputs
    torch.save(weights, path)
    return weights


def test_perceptual_weights_come_from_a_file_or_not_at_all(tmp_path: Path) -> None:
    assert open_perceptual(ReconstructionConfig()) is None
    absent = ReconstructionConfig(perceptual=f"file:{tmp_path}/vgg16.pth")
    with pytest.raises(
        ConfigError, match=r"there is no file .*vgg16\.pth; put the weights there .* or set"
    ):
        open_perceptual(absent)
    (tmp_path / "vgg16.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="holds no weights that can be read"):
        open_perceptual(absent)
    torch.save({"other": torch.zeros(1)}, tmp_path / "vgg16.pth")
    with pytest.raises(ConfigError, match="is no VGG16 as torchvision saves it"):
        open_perceptual(absent)


def test_perceptual_distances_are_lpips_with_heads(tmp_path: Path) -> None:
    weights = vgg(tmp_path / "vgg16.pth")
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(widths)}
    torch.save(heads, tmp_path / "heads.pth")
    plain = open_perceptual(ReconstructionConfig(perceptual=f"file:{tmp_path}/vgg16.pth"))
    headed = open_perceptual(
        ReconstructionConfig(
            perceptual=f"file:{tmp_path}/vgg16.pth", perceptual_heads=f"{tmp_path}/heads.pth"
        )
    )
    assert plain is not None
    assert headed is not None
    assert (plain.kind, headed.kind) == ("vgg_imagenet", "lpips_vgg")
    assert len(headed.facts["sha256"]) == len(headed.facts["heads_sha256"]) == 64
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert plain(x, x).item() == headed(x, x).item() == 0.0
    total = 0.0
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((v - shift[:, None, None]) / scale[:, None, None] for v in (x, y))
    for number, stage in enumerate(VGG_STAGES):
        if number:
            a, b = (torch.nn.functional.max_pool2d(v, 2) for v in (a, b))
        for n in stage:
            layer = weights[f"features.{n}.weight"], weights[f"features.{n}.bias"]
            a, b = (torch.relu(torch.nn.functional.conv2d(v, *layer, padding=1)) for v in (a, b))
        units = [v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (a, b)]
        squares = (units[0] - units[1]) ** 2 * heads[f"lin{number}.model.1.weight"]
        total += float(squares.sum(1).mean())
    assert headed(x, y).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("kind", ["random_features", "gradient"])
def test_distances_that_need_no_weights(kind: str) -> None:
    distance = open_perceptual(ReconstructionConfig(perceptual=kind))
    assert distance is not None
    assert distance.facts["kind"] == kind
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    near, far = distance(x, x + 0.01 * torch.randn_like(x)), distance(x, torch.randn_like(x))
    assert (distance(x, x) == 0).all()
    assert (near < far).all()
    if kind == "gradient":
        assert (distance(x, x + 0.5) < 1e-6).all()
