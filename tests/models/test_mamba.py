"""Mamba and Mixture-of-Mamba against their equations, each other, and the published sizes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mamba_oracle import PROJECTIONS, THREE, TINY, build, copy_dense, logits_by_hand, mixed
from packing import packed
from pydantic import ValidationError
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode
from weft.kernels import route_by_modality
from weft.models import build_task
from weft.models.mamba.config import Config
from weft.models.mamba.context import PackedContext
from weft.models.mamba.task import MambaTask

LAYOUTS = {
    "alternating": [0, 1, 2] * 8,
    "runs": [0] * 5 + [1] * 9 + [0] * 2 + [2] * 8,
    "single positions": [0] * 11 + [2] + [0] * 11 + [1],
    "two of three": [0, 1] * 12,
    "one": [1] * 24,
}
DOCUMENTS = [1, 2, 3, 6, 12]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_equations(layout: str) -> None:
    model = build(modalities=THREE, blocks_per_layer=2, d_conv=4)
    batch = mixed(DOCUMENTS, LAYOUTS[layout], 12)
    torch.testing.assert_close(model(batch, output="logits").double(), logits_by_hand(model, batch))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_embeddings": True, "d_conv": 3, "expand": 1, "dt_rank": 3},
        {"modalities": THREE, "split": {"norm": True}},
        {"modalities": THREE[:2], "split": {"dt_proj": False}, "compat_drop_dt_bias": True},
    ],
)
def test_variants_are_those_of_the_equations(settings: dict[str, Any]) -> None:
    model = build(**settings)
    batch = mixed(DOCUMENTS, [0, 1] * 12, 12)
    if "modalities" not in settings:
        batch = replace(batch, modality=None)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.testing.assert_close(model(batch, output="logits").double(), logits_by_hand(model, batch))


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=4)))
def test_every_subset_of_split_projections(chosen: tuple[bool, ...]) -> None:
    split = dict(zip(PROJECTIONS, chosen, strict=True))
    model = build(modalities=THREE[:2], split=split, n_layers=1)
    names = [name for name, _ in model.backbone.blocks[0].named_parameters()]
    assert {f"{p}.weight.image" in names for p, is_own in split.items() if is_own} <= {True}
    assert any(name.startswith("ssm.dt_bias") for name in names)
    assert sum(p.numel() for p in model.parameters()) == sum(
        model.config.count_parameters().values()
    )
    batch = mixed([3, 5], [0, 1, 1, 0, 0, 1, 0, 1], 8, THREE[:2])
    torch.testing.assert_close(model(batch, output="logits").double(), logits_by_hand(model, batch))
    model(batch)["cross_entropy/text"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_sets_are_the_dense_model_with_its_gradients(layout: str) -> None:
    dense, mixture = build(), build(modalities=THREE)
    copy_dense(dense, mixture)
    batch = mixed(DOCUMENTS, LAYOUTS[layout], 12)
    plain = replace(batch, modality=None)
    torch.testing.assert_close(mixture(batch, output="logits"), dense(plain, output="logits"))
    for model, given in ((mixture, batch), (dense, plain)):
        model(given)["cross_entropy/text"].backward()
    summed: dict[str, torch.Tensor] = {}
    for name, parameter in mixture.named_parameters():
        own, _, last = name.rpartition(".")
        key = own if last in THREE else name
        assert parameter.grad is not None, name
        summed[key] = summed.get(key, 0) + parameter.grad
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(summed[name], parameter.grad, msg=name)


def test_one_modality_is_dense_and_the_others_get_zeros() -> None:
    dense, mixture = build(), build(modalities=THREE)
    copy_dense(dense, mixture)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name.endswith((".text", ".speech")):
                parameter.fill_(float("nan"))
    batch = mixed(DOCUMENTS, [1] * 24, 12)
    plain = replace(batch, modality=None)
    found, expected = mixture(batch), dense(plain)
    torch.testing.assert_close(found["cross_entropy/text"], expected["cross_entropy/text"])
    found["cross_entropy/text"].backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith((".text", ".speech")):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_modalities_may_change_places_with_their_weights() -> None:
    model, renamed = build(modalities=THREE), build(modalities=THREE)
    places = {"text": "speech", "image": "text", "speech": "image"}
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in renamed.named_parameters():
            own, _, last = name.rpartition(".")
            back = {v: k for k, v in places.items()}.get(last)
            parameter.copy_(theirs[f"{own}.{back}" if back else name])
    kinds = LAYOUTS["runs"]
    batch = mixed(DOCUMENTS, kinds, 12)
    moved = mixed(DOCUMENTS, [THREE.index(places[THREE[k]]) for k in kinds], 12)
    moved = replace(moved, tokens=batch.tokens)
    torch.testing.assert_close(renamed(moved, output="logits"), model(batch, output="logits"))


def test_a_document_knows_nothing_of_the_others() -> None:
    model = build(modalities=THREE)
    batch = mixed(DOCUMENTS, LAYOUTS["runs"], 24)
    whole = model(batch, output="logits")
    borders = batch.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(borders):
        kinds = LAYOUTS["runs"][start:stop]
        alone = mixed([stop - start], kinds, stop - start)
        alone = replace(alone, tokens=batch.tokens[start:stop])
        torch.testing.assert_close(model(alone, output="logits"), whole[start:stop])
    # Not even what is not a number: nothing of a document is multiplied away.
    broken = batch.tokens.clone()
    broken[borders[3]] = 7
    with torch.no_grad():
        model.embedding.tokens.weight[7] = float("nan")
    first = replace(batch, tokens=broken.masked_fill(torch.arange(24) < borders[3], 0))
    assert model(first, output="logits")[: borders[3]].isfinite().all()
    after = replace(batch, tokens=broken.masked_fill(torch.arange(24) >= borders[4], 0))
    assert model(after, output="logits")[borders[4] :].isfinite().all()


SIZES = [
    # d, L, V, dense, M=2, M=3
    (768, 16, 32_000, 169_845_504, 289_432_320, None),
    (1536, 24, 32_000, 814_278_144, 1_526_932_992, None),
    (2048, 24, 32_000, 1_400_276_992, 2_665_056_256, None),
    (256, 4, 65_536, 37_058_816, 40_470_784, None),
    (512, 8, 65_536, 94_233_088, 120_988_160, None),
    (1024, 24, 65_536, 454_247_424, 772_064_256, 1_089_881_088),
    (1536, 24, 65_536, 917_300_736, 1_629_955_584, 2_342_610_432),
    (2048, 24, 65_536, 1_537_640_448, 2_802_419_712, 4_067_198_976),
]


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_all_sizes(size: tuple[int, ...]) -> None:
    d, layers, vocabulary, *totals = size
    for count, expected in enumerate(totals, 1):
        if expected is None:
            continue
        config = Config(
            d_model=d,
            n_layers=layers,
            blocks_per_layer=2,
            vocab_size=vocabulary,
            modalities=THREE[:count],
        )
        assert sum(config.count_parameters().values()) == expected
        assert config.flops_per_token(4096) == 3 * (
            2 * layers * (12.5 * d * d + 128 * d + 16 * d + 296 * d) + 2 * vocabulary * d
        )
    assert Config(d_model=2048, n_layers=24, blocks_per_layer=2, vocab_size=32_000).flops_per_token(
        1
    ) == pytest.approx(8.07e9, rel=1e-3)


def test_the_model_has_what_is_counted_and_multiplies_what_is_said() -> None:
    model = build(torch.float32, modalities=THREE, blocks_per_layer=2)
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == sum(config.count_parameters().values())
    batch = mixed(DOCUMENTS, LAYOUTS["runs"], 12)
    with FlopCounterMode(display=False) as counter:
        model(batch, output="logits")
    inner = config.d_inner
    unseen = 2 * config.d_conv * inner + 9 * inner * config.d_state + 4 * inner
    expected = config.flops_per_token(12) / 3 - config.n_blocks * unseen
    assert counter.get_total_flops() == 24 * expected


def test_start_values() -> None:
    config = Config(
        vocab_size=1000, d_model=128, n_layers=3, blocks_per_layer=2, modalities=THREE[:2]
    )
    model = build(torch.float32, **config.model_dump(exclude={"family"}))
    block = model.backbone.blocks[1]

    def check(weight: torch.Tensor, bound: float) -> None:
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)

    for name in THREE[:2]:
        check(block.in_proj.weight[name], 128**-0.5)
        check(block.x_proj.weight[name], 256**-0.5)
        check(block.dt_proj.weight[name], 8**-0.5)
        check(block.out_proj.weight[name], 256**-0.5 / math.sqrt(6))
        steps = softplus(block.ssm.dt_bias[name])
        assert 1e-3 * 0.999 <= steps.min() < 2e-3
        assert 0.05 < steps.max() <= 0.1 * 1.001
        assert steps.log().mean().item() == pytest.approx(math.log(1e-2), rel=0.06)
    for part in ("in_proj", "out_proj"):
        weight = getattr(block, part).weight
        assert not torch.equal(weight["text"], weight["image"]), "drawn each by itself"
    check(block.conv1d.weight, 0.5)
    check(block.conv1d.bias, 0.5)
    torch.testing.assert_close(block.ssm.A_log, torch.arange(1.0, 17).log().expand(256, -1))
    for ones in (block.ssm.D, block.norm.weight, model.backbone.norm.weight):
        assert (ones == 1).all()
    assert model.embedding.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    check(model.head.weight, 128**-0.5)
    plain = build(torch.float32, **{**config.model_dump(exclude={"family"}), "rescale_out": False})
    check(plain.backbone.blocks[1].out_proj.weight["image"], 256**-0.5)


def test_what_decays_is_told_by_name() -> None:
    task = build_task(Config(**TINY, modalities=THREE[:2]))
    groups = task.parameter_groups(task.build_networks())
    assert {(g.name, g.weight_decay, g.needs) for g in groups} == {
        ("decay", True, None),
        ("no_decay", False, None),
        ("decay_text", True, "text_positions"),
        ("no_decay_text", False, "text_positions"),
        ("decay_image", True, "image_positions"),
        ("no_decay_image", False, "image_positions"),
    }
    undecayed = [name for g in groups if not g.weight_decay for name in g.parameters]
    kinds = {
        name.rpartition("blocks.")[2].partition(".")[2] for name in undecayed if "blocks" in name
    }
    assert kinds == {
        "norm.weight",
        "conv1d.weight",
        "conv1d.bias",
        "ssm.A_log",
        "ssm.D",
        "ssm.dt_bias.text",
        "ssm.dt_bias.image",
    }
    outside = {name for name in undecayed if "blocks" not in name}
    assert outside == {"model/embedding.tokens.weight", "model/backbone.norm.weight"}
    assert "model/head.weight" not in undecayed
    tied = build_task(Config(**TINY, tie_embeddings=True))
    assert (
        "model/embedding.tokens.weight"
        in tied.parameter_groups(tied.build_networks())[0].parameters
    )


def test_step_sizes_are_summed_in_fp32_under_autocast() -> None:
    model = build(torch.float32, modalities=THREE[:2], n_layers=1)
    ssm = model.backbone.blocks[0].ssm
    seen: list[torch.Tensor] = []

    class Watching(PackedContext):
        def scan(self, u, delta, A, B, C, D, z, bias):  # type: ignore[no-untyped-def]
            seen.append(softplus(delta.double() + (0 if bias is None else bias.double())))
            return super().scan(u, delta, A, B, C, D, z, bias)

    for kinds in ([0, 1] * 8, [0] * 16):
        routing = route_by_modality(torch.tensor(kinds), 2)
        delta = (0.01 * torch.randn(16, 32)).to(torch.bfloat16)
        rest = [torch.randn(16, width, dtype=torch.bfloat16) for width in (32, 8, 32)]
        context = Watching(torch.arange(16), 1)
        ssm(rest[0], delta, rest[1], rest[2], routing, context)
        biases = torch.stack([ssm.dt_bias["text"], ssm.dt_bias["image"]]).double()
        raw = routing.restore(delta).double() + biases[torch.tensor(kinds)]
        error = (seen[-1] / softplus(raw) - 1).abs().max()
        assert error < 1e-5, "bf16 sums are off by up to 1.6e-2"


def test_the_stream_is_fp32_under_autocast_unless_asked_otherwise() -> None:
    batch = packed(torch.randint(0, 50, (12,)), [12], 12)
    for wide, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = build(torch.float32, residual_fp32=wide)
        seen: list[torch.dtype] = []
        model.backbone.blocks[1].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].dtype)
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)
        assert seen == [expected]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": {"norm": True}}, "split is given but there is one modality"),
        ({"modalities": ("image", "text")}, "text first"),
        ({"modalities": ("text", "smell")}, "no modality 'smell'"),
        ({"dt_min": 0.5}, "dt_min 0.5 is above dt_max 0.1"),
        ({"d_conv": 5}, "less than or equal to 4"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config(**TINY, **settings)


def test_the_smallest_form_keeps_every_part() -> None:
    config = Config(d_model=2048, n_layers=24, blocks_per_layer=2, modalities=THREE, dt_rank=64)
    small = config.debug_size()
    assert (small.n_blocks, small.d_model, small.rank) == (4, 64, 2)
    assert (small.modalities, small.splits) == (config.modalities, config.splits)
    assert small.debug_size() == small


def test_a_mixture_starts_from_a_dense_run() -> None:
    task = build_task(Config(**TINY, modalities=THREE, upcycle_from="runs/dense"))
    assert isinstance(task, MambaTask)
    (base,) = task.base_weights(task.build_networks())
    assert (base.source, base.stays_there) == ("runs/dense", False)
    dense = build_task(Config(**TINY)).build_networks()["model"]
    assert set(base.parameters.values()) == {f"model/{n}" for n, _ in dense.named_parameters()}
    wanted = "model/backbone.blocks.0.in_proj.weight"
    assert base.parameters[f"{wanted}.speech"] == wanted
