"""The diffusion transformer: published sizes and costs, diffusers' at the same weights, packing, positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from weft.kernels import Segments
from weft.models import build_model, build_task
from weft.models.dit.config import Config, RatioConfig
from weft.models.dit.memory import activation_bytes
from weft.models.dit.network import grid_positions, unpatchify
from weft.models.errors import DataError
from weft.models.multimodal.stem import patchify

RATIOS = tuple(RatioConfig(ratio=r, mean=(0.1 * r,), std=(1.0 + r / 8,)) for r in (8, 16, 32))
TINY: dict[str, Any] = {
    "channels": 3,
    "patch": 1,
    "image_size": 64,
    "classes": 5,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
}
MIXED: dict[str, Any] = {**TINY, "ratios": RATIOS}
# Blocks, width, heads; parameters with patch 2 on 4 channels, the fixed positions of 256 tokens counted, and as published
# in millions.
LAYOUTS = {
    "s": (12, 384, 6, 32_963_360, 33),
    "b": (12, 768, 12, 130_512_416, 130),
    "l": (24, 1024, 16, 458_102_816, 458),
    "xl": (28, 1152, 16, 675_129_632, 675),
}


def random_model(config: Config, std: float = 0.2) -> Any:
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, std, generator=generator)
    return model


def mixed_images(counts: tuple[int, ...] = (2, 3, 4)) -> tuple[list[torch.Tensor], ...]:
    """Groups of 8 x 8, 4 x 4 and 2 x 2 latents, with noise levels and labels."""
    generator = torch.Generator().manual_seed(2)
    groups = [
        torch.randn(n, 3, side, side, generator=generator)
        for n, side in zip(counts, (8, 4, 2), strict=True)
    ]
    t = [torch.randint(1000, (n,), generator=generator) for n in counts]
    labels = [torch.randint(6, (n,), generator=generator) for n in counts]
    return groups, t, labels


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_sizes_are_met_exactly(name: str) -> None:
    layers, width, heads, with_positions, millions = LAYOUTS[name]
    config = Config(n_layers=layers, d_model=width, n_heads=heads)
    assert with_positions / 1e6 == pytest.approx(millions, abs=0.6)
    total = with_positions - 256 * width
    assert sum(config.count_parameters().values()) == total
    with torch.device("meta"):
        network = build_task(config).build_networks()["model"]
    assert sum(p.numel() for p in network.parameters()) == total
    assert not list(network.buffers())


def test_sixteen_channels_and_counts_by_part() -> None:
    assert sum(Config(channels=16).count_parameters().values()) == 675_000_704
    config = Config(**MIXED)
    counts = dict.fromkeys(config.count_parameters(), 0)
    for name, parameter in build_model(config).named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    assert counts == config.count_parameters()
    assert counts["ratios"] == 3 * 32


@pytest.mark.parametrize(
    ("tokens", "gmacs"), [(16, 7.38), (64, 29.03), (256, 118.6), (1024, 524.5), (4096, 2909)]
)
def test_an_image_costs_what_is_published(tokens: int, gmacs: float) -> None:
    config = Config()
    assert config.forward_macs(tokens) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    side = 2 * math.isqrt(tokens)
    with torch.device("meta"):
        network = build_task(config).build_networks()["model"]
        image = torch.empty(1, 4, side, side)
        level = torch.zeros(1, dtype=torch.int64)
    network.config = config.model_copy(update={"attention": "runs"})
    # Positions are made where weights are; on the meta device there is nothing to keep.
    with FlopCounterMode(display=False) as counter:
        network([image], level, level, [0])
    assert counter.get_total_flops() == 2 * config.forward_macs(tokens)


def test_flops_are_those_of_the_expected_mix() -> None:
    ratios = [{"ratio": 8, "share": 1}, {"ratio": 16, "share": 3}]
    config = Config(ratios=ratios, image_size=256)
    mean = (config.forward_macs(256) + 3 * config.forward_macs(64)) / 4
    assert config.flops_per_token(1) == 6 * mean
    assert config.mean_image_tokens == (256 + 3 * 64) / 4


def diffusers_twin(model: Any, size: int) -> Any:
    """diffusers' DiT with this model's weights."""
    diffusers = pytest.importorskip("diffusers")
    c = model.config
    twin = diffusers.DiTTransformer2DModel(
        num_attention_heads=c.n_heads,
        attention_head_dim=c.head_width,
        in_channels=c.channels,
        out_channels=c.out_channels,
        num_layers=c.n_layers,
        sample_size=size,
        patch_size=c.patch,
        num_embeds_ada_norm=c.classes,
        norm_eps=1e-6,
    ).eval()
    own = model.state_dict()
    state: dict[str, torch.Tensor] = {}

    def copy(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"]

    shape = (c.d_model, c.channels, c.patch, c.patch)
    state["pos_embed.proj.weight"] = own["patches.weight"].view(shape)
    state["pos_embed.proj.bias"] = own["patches.bias"]
    for i in range(c.n_layers):
        block, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        copy(f"{theirs}.norm1.linear", f"{block}.modulation")
        copy(f"{theirs}.norm1.emb.timestep_embedder.linear_1", "time.input")
        copy(f"{theirs}.norm1.emb.timestep_embedder.linear_2", "time.output")
        table = f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"
        state[table] = own["classes.weight"]
        for kind in ("weight", "bias"):
            parts = own[f"{block}.qkv_proj.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                state[f"{theirs}.attn1.to_{name}.{kind}"] = part
        copy(f"{theirs}.attn1.to_out.0", f"{block}.o_proj")
        copy(f"{theirs}.ff.net.0.proj", f"{block}.up_proj")
        copy(f"{theirs}.ff.net.2", f"{block}.down_proj")
    copy("proj_out_1", "head.modulation")
    copy("proj_out_2", "head.output")
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("longest", [True, False])
def test_diffusers_gives_the_same_at_the_same_weights(longest: bool) -> None:
    config = Config(
        **{**TINY, "channels": 4, "patch": 2},
        positions="index",
        time_includes_longest=longest,
    )
    model = random_model(config, std=0.1)
    twin = diffusers_twin(model, 8)
    if not longest:
        # Its waves end on the longest period; the released model's are one step short of it.
        for block in twin.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    images = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t, labels = torch.tensor([0, 431, 999]), torch.tensor([0, 5, 2])
    with torch.no_grad():
        found = model([images], t, labels, [0])[0]
        wanted = twin(images, t, labels).sample
    assert wanted.abs().mean() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_packed_images_give_what_each_gives_alone_with_gradients() -> None:
    config = Config(**MIXED)
    groups, t, labels = mixed_images()
    results = []
    for parts in (
        [[(g, i) for g in range(3) for i in range(len(groups[g]))]],
        [[(g, i)] for g in range(3) for i in range(len(groups[g]))],
    ):
        model = random_model(config)
        outputs = []
        for part in parts:
            out = model(
                [groups[g][i : i + 1] for g, i in part],
                torch.stack([t[g][i] for g, i in part]),
                torch.stack([labels[g][i] for g, i in part]),
                [g for g, _ in part],
            )
            sum(values.square().sum() for values in out).backward()
            outputs += out
        results.append((outputs, {n: p.grad for n, p in model.named_parameters()}))
    for found, wanted in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, grad in results[0][1].items():
        wanted = results[1][1][name]
        assert (grad - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_three_dense_calls_give_what_document_attention_gives() -> None:
    """On weights of usual size, within the rounding that differs between the two."""
    config = Config(**MIXED)
    groups, t, labels = mixed_images()
    outputs = []
    for backend in ("auto", "runs", "mask", "flex"):
        model = random_model(config, std=0.05)
        own = config.model_copy(update={"attention": backend})
        for block in model.blocks:
            block.config = own
        with torch.no_grad():
            out = model(groups, torch.cat(t), torch.cat(labels), [0, 1, 2])
        outputs.append(torch.cat([values.flatten() for values in out]))
    for other in outputs[1:]:
        assert (outputs[0] - other).abs().max() < 1e-6
    assert outputs[0].abs().max() > 1e-3


def test_forgetting_the_borders_would_be_noticed() -> None:
    config = Config(**MIXED)
    groups, t, labels = mixed_images((0, 3, 0))
    model = random_model(config)
    with torch.no_grad():
        before = model(groups, torch.cat(t), torch.cat(labels), [0, 1, 2])[1]
        groups[1][0] += 1
        after = model(groups, torch.cat(t), torch.cat(labels), [0, 1, 2])[1]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_the_output_is_zero_at_the_start() -> None:
    config = Config(**MIXED)
    model = build_model(config)
    groups, t, labels = mixed_images()
    out = model(groups, torch.cat(t), torch.cat(labels), [0, 1, 2])
    assert [tuple(values.shape) for values in out] == [(2, 6, 8, 8), (3, 6, 4, 4), (4, 6, 2, 2)]
    assert not any(values.any() for values in out)


def test_start_values_are_xavier_s() -> None:
    config = Config(**{**TINY, "d_model": 64})
    weights = dict(build_model(config).named_parameters())
    for layer, ins, outs in (("qkv_proj", 64, 192), ("up_proj", 64, 256), ("down_proj", 256, 64)):
        bound = math.sqrt(6 / (ins + outs))
        weight = weights[f"blocks.1.{layer}.weight"]
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not weights[f"blocks.1.{layer}.bias"].any()
    assert weights["time.output.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["classes.weight"].std().item() == pytest.approx(0.02, rel=0.15)
    assert not weights["blocks.0.modulation.weight"].any()


def test_positions_are_places_in_the_image() -> None:
    """Tokens of 16x lie at whole numbers; those of the others in the middle of the part they cover."""
    plain = grid_positions(4, 4, 32, 1.0)
    frequencies = [10_000 ** -(i / 8) for i in range(8)]
    wanted = [math.sin(3 * f) for f in frequencies] + [math.cos(3 * f) for f in frequencies]
    wanted += [math.sin(2 * f) for f in frequencies] + [math.cos(2 * f) for f in frequencies]
    # Row 2, column 3: the column first.
    torch.testing.assert_close(plain[2 * 4 + 3], torch.tensor(wanted))
    coarse = grid_positions(2, 2, 32, 2.0)
    assert coarse[0, 0].item() == pytest.approx(math.sin(0.5))
    fine = grid_positions(8, 8, 32, 0.5)
    assert fine[0, 0].item() == pytest.approx(math.sin(-0.25))
    assert fine[3, 0].item() == pytest.approx(math.sin(1.25))
    model = build_model(Config(**MIXED))
    torch.testing.assert_close(model.positions((2, 2), 2, torch.float32), coarse)
    model = build_model(Config(**MIXED, positions="index"))
    torch.testing.assert_close(model.positions((4, 4), 2, torch.float32), plain)


def test_oblong_images_come_back_as_they_went_in() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    rows = patchify(images, 2)
    last = rows.unflatten(1, (3, 2, 2)).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(unpatchify(last, (2, 3), 2), images)
    config = Config(**{**TINY, "patch": 2})
    model = random_model(config)
    level = torch.zeros(2, dtype=torch.int64)
    assert model([images / 100], level, level, [0])[0].shape == (2, 6, 4, 6)
    with pytest.raises(DataError, match=r"4 x 5 do not divide into patches of 2"):
        model([images[..., :5]], level, level, [0])
    with pytest.raises(DataError, match="2 channels and the model takes 3"):
        model([images[:, :2]], level, level, [0])


def test_a_block_keeps_what_is_estimated() -> None:
    def saved(layers: int) -> int:
        config = Config(**{**MIXED, "d_model": 64, "n_layers": layers})
        model = random_model(config)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        groups, t, labels = mixed_images((8, 8, 8))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(groups, torch.cat(t), torch.cat(labels), [0, 1, 2])
        sizes.append(activation_bytes(config, 24, compute_bytes=4, recompute="none")["kept"])
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    sizes: list[int] = []
    measured = (saved(3) - saved(1)) / 2
    assert sizes[1] == pytest.approx(measured, rel=0.1)


def test_the_mix_that_a_compiled_block_would_see_is_gathered() -> None:
    """Beyond a few runs modulation is gathered by segment; the network gives the same."""
    config = Config(**MIXED)
    model = random_model(config)
    groups, t, labels = mixed_images((4, 4, 4))
    apart = [group[i : i + 1] for i in range(4) for group in groups]
    order = [(g, i) for i in range(4) for g in range(3)]
    assert not Segments([(1, 4)] * len(apart)).has_few_runs
    with torch.no_grad():
        whole = model(groups, torch.cat(t), torch.cat(labels), [0, 1, 2])
        parts = model(
            apart,
            torch.stack([t[g][i] for g, i in order]),
            torch.stack([labels[g][i] for g, i in order]),
            [g for g, _ in order],
        )
    for (g, i), found in zip(order, parts, strict=True):
        torch.testing.assert_close(found[0], whole[g][i], rtol=1e-5, atol=1e-5)
