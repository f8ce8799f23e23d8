"""What BLT tells the trainer: sizes and FLOPs of the paper, groups, start values, base weights, losses, overflow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_blt_network import batch_of, make_config, text
from weft.launch.options import load_recipe
from weft.models.blt.config import Config
from weft.models.blt.flops import transformer_flops
from weft.models.blt.memory import activation_bytes, block_parameters
from weft.models.blt.shapes import parameter_shapes
from weft.models.blt.task import BLTTask
from weft.models.build import build_model, build_task
from weft.models.errors import TrainingError

# Total and table parameters; forward FLOPs a byte at 8k bytes of context and 4.5, 6 and 8 bytes a patch, and the share
# of all but the latent transformer (specification, sections 6 and 7). Those of 2B and 4B are not published.
SIZES: dict[str, tuple[int, int, dict[float, tuple[float, float]]]] = {
    "400m": (
        2_872_495_872,
        6 * 500_002 * 768,
        {4.5: (3.82e8, 0.39), 6: (3.16e8, 0.46), 8: (2.69e8, 0.53)},
    ),
    "1b": (
        4_533_879_808,
        6 * 500_002 * 1024,
        {4.5: (9.24e8, 0.35), 6: (7.61e8, 0.42), 8: (6.43e8, 0.49)},
    ),
    "2b": (5_323_750_400, 6 * 500_002 * 1024, {}),
    "4b": (7_332_647_936, 6 * 500_002 * 1024, {}),
    "8b": (
        10_553_570_560,
        6 * 500_002 * 1280,
        {4.5: (3.34e9, 0.11), 6: (2.57e9, 0.14), 8: (2.00e9, 0.18)},
    ),
}
# 12 l h^2, as the paper prints it: encoder, latent, decoder.
STAGES = {
    "400m": (7e6, 470e6, 50e6),
    "1b": (12e6, 1.26e9, 113e6),
    "2b": (12e6, 2.04e9, 113e6),
    "4b": (12e6, 4.08e9, 113e6),
    "8b": (20e6, 6.44e9, 118e6),
}


def recipe(name: str) -> Config:
    found = load_recipe(f"blt/{name}").config.model
    assert isinstance(found, Config)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_and_flops(name: str) -> None:
    config = recipe(name)
    total, tables, flops = SIZES[name]
    counts = config.count_parameters()
    assert sum(counts.values()) == total
    assert counts["ngram_tables"] == tables
    for stage, expected in zip(("encoder", "latent", "decoder"), STAGES[name], strict=True):
        part = getattr(config, stage)
        assert 12 * part.n_layers * part.d_model**2 == pytest.approx(expected, rel=0.05)
    for patch_size, (expected, share) in flops.items():
        parts = config.forward_flops_per_byte(8192, patch_size)
        entropy = parts.pop("entropy_model")
        assert entropy == pytest.approx(2.1e8, rel=0.01)
        assert sum(parts.values()) == pytest.approx(expected, rel=2e-3)
        assert 1 - parts["latent"] / sum(parts.values()) == pytest.approx(share, abs=6e-3)
        whole = config.flops_per_byte(8192, patch_size)
        without = config.flops_per_byte(8192, patch_size, entropy_model=False)
        assert whole - without == pytest.approx(entropy)
    assert config.flops_per_token(8192) == config.flops_per_byte(8192, 4.5)


@pytest.mark.parametrize(
    ("name", "parameters", "flops"), [("bpe-470m", 470e6, 3.14e8), ("bpe-3.6b", 3.6e9, 2.13e9)]
)
def test_token_baselines_cost_what_the_paper_says(
    name: str, parameters: float, flops: float
) -> None:
    config = load_recipe(f"blt/{name}").config
    model, length = config.model, config.data.sequence_length
    found = transformer_flops(model.d_model, model.n_layers, 8192 / 3.7, model.vocab_size) / 3.7
    assert found == pytest.approx(flops, rel=3e-3)
    assert 12 * model.n_layers * model.d_model**2 == pytest.approx(parameters, rel=0.01)
    assert length * 3.7 == pytest.approx(8192, rel=0.01)
    assert config.train.batch_tokens * 3.7 == pytest.approx(16_777_216, rel=0.01)


@pytest.mark.parametrize("name", ["debug", *SIZES, "8b-from-llama"])
def test_debug_size_keeps_the_parts(name: str) -> None:
    config = recipe(name)
    small = config.debug_size()
    assert sum(small.count_parameters().values()) < 4e6
    assert small.cross_layers == tuple(min(2, n) for n in config.cross_layers)
    for key in ("formulation", "patch_vectors", "window"):
        assert getattr(small, key) == getattr(config, key)
    # No entropy model is there, and no Llama to start from.
    assert small.patching.scheme == ("space" if name == "debug" else "stride")
    assert small.latent.start_from is None
    assert part_names(small) == part_names(config)


def part_names(config: Config) -> set[str]:
    """Names of parameters without the numbers of their layers."""
    return {re.sub(r"\d+", "N", name) for name in parameter_shapes(config)}


def test_shapes_and_counts_are_the_networks() -> None:
    for changes in ({}, {"encoder": {"queries": "learned"}}, {"patch_vectors": 3}):
        config = make_config(**changes)
        network = build_model(config)
        assert list(parameter_shapes(config).items()) == [
            (name, tuple(p.shape)) for name, p in network.named_parameters()
        ]
        total = sum(p.numel() for p in network.parameters())
        assert total == sum(config.count_parameters().values())


def test_debug_size_keeps_an_entropy_model_that_is_there(tmp_path: Path) -> None:
    assert with_entropy(tmp_path).debug_size().patching == with_entropy(tmp_path).patching


def with_entropy(run: Path, name: str = "1b") -> Config:
    """A recipe whose entropy model is taken to be at `run`."""
    config = recipe(name)
    patching = config.patching.model_copy(update={"entropy_model": str(run)})
    return config.model_copy(update={"patching": patching})


def small_byteified(run: Path) -> Config:
    """The smallest `8b-from-llama`, with an entropy model at `run`."""
    config = with_entropy(run, "8b-from-llama")
    small = config.debug_size()
    latent = small.latent.model_copy(update={"start_from": config.latent.start_from})
    return small.model_copy(update={"latent": latent})


def test_groups_start_values_and_units(tmp_path: Path) -> None:
    config = small_byteified(tmp_path)
    task = build_task(config)
    assert isinstance(task, BLTTask)
    with torch.device("meta"):
        networks = task.build_networks()
    groups = {group.name: group for group in task.parameter_groups(networks)}
    assert {n: (g.algorithm, g.weight_decay, g.lr_scale) for n, g in groups.items()} == {
        "local": ("adamw", True, 1.0),
        "latent": ("adamw", True, 0.1),
        "ngrams": ("row_sparse_adam", False, 1.0),
        "entropy": ("frozen", False, 1.0),
    }
    names = [name for group in groups.values() for name in group.parameters]
    there = {f"{n}/{p}" for n, net in networks.items() for p, _ in net.named_parameters()}
    assert sorted(names) == sorted(there)
    units = task.blocks(networks)
    assert len(units) == 14 + 2 + 2 + 4
    held = {id(p) for unit in units for p in unit.parameters()}
    assert (
        sum(p.numel() for p in networks["model"].parameters() if id(p) in held)
        == (config.count_parameters()["blocks"])
    )
    width, hidden = config.latent.d_model, config.latent.hidden
    assert task.init_spec("model/latent.blocks.0.attention.o_proj.weight").std == width**-0.5
    assert task.init_spec("model/latent.blocks.0.mlp.down_proj.weight").std == hidden**-0.5
    assert task.init_spec("model/encoder.cross.0.kv_norm.weight").value == 1.0
    assert task.init_spec("model/embedding.ngrams.weight").std == config.encoder.d_model**-0.5


def test_base_weights_are_the_entropy_models_and_llamas(tmp_path: Path) -> None:
    config = small_byteified(tmp_path)
    task = build_task(config)
    with torch.device("meta"):
        networks = task.build_networks()
    entropy, latent = task.base_weights(networks)
    assert (entropy.source, entropy.stays_there) == (str(tmp_path), True)
    assert entropy.parameters["entropy/norm.weight"] == "model/norm.weight"
    assert (latent.source, latent.stays_there) == ("runs/llama31-8b", False)
    assert latent.parameters["model/latent.blocks.1.mlp.up_proj.weight"] == (
        "model/blocks.1.mlp.up_proj.weight"
    )
    assert all(".blocks." in name for name in latent.parameters)
    # Half-split rotation on both sides: the order of channels stays.
    assert len(latent.parameters) == 2 * 9


def test_losses_and_counts() -> None:
    config = make_config()
    task, network = build_task(config), build_model(config)
    batch = batch_of(text(24))
    output = task.losses({"model": network}, batch)
    counts = task.counts(batch)
    assert counts == {"tokens": 20, "positions": 24}
    assert output.terms["cross_entropy"].total.item() / 20 == pytest.approx(5.6, abs=1.5)
    assert {n: (t.total.item(), t.count) for n, t in output.metrics.items()} == {
        "patches": (12, "positions"),
        "patch_overflow": (0, "positions"),
    }


def test_overflow_ends_the_run_unless_merging_is_asked_for() -> None:
    record = {"step": 3.0, "patches": 0.5, "patch_overflow": 0.125}
    with pytest.raises(
        TrainingError, match=r"step 3: there is room for 6 of its 8 patches; raise model\.pat"
    ):
        build_task(make_config()).review(record, 16)
    merging = build_task(make_config(patching={"overflow": "merge"}))
    assert merging.review(record, 16) == {"patch_size": 2.0, "patches": 8.0, "patch_overflow": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": {"n_heads": 3}}, "latent: d_model 16 is not a multiple of n_heads 3"),
        ({"decoder": {"d_model": 6, "n_heads": 2}}, "decoder: head width 3 must be even"),
        ({"encoder": {"cross_heads": 9}}, "encoder: 9 cross_heads are more than d_model 8"),
        (
            {"encoder": {"queries": "learned", "cross_attention": "none"}},
            "encoder: queries=learned needs cross_attention=last or all",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Value error, {message}"):
        make_config(**changes)


def test_formulation_decides_what_is_left_out() -> None:
    paper = make_config(formulation="paper")
    assert (paper.double_residual, paper.encoder.queries) == (False, "embeddings")
    assert paper.ngram is not None
    assert (paper.ngram.oldest_first, paper.ngram.short_windows, paper.ngram.average) == (
        False,
        "skip",
        True,
    )
    mixed = make_config(formulation="paper", double_residual=True, ngram={"average": False})
    assert (mixed.double_residual, mixed.ngram.average, mixed.ngram.oldest_first) == (
        True,
        False,
        False,
    )
    assert Config(**paper.model_dump()) == paper


def test_planned_activations_follow_patch_size_and_recomputation() -> None:
    config = recipe("1b")
    assert block_parameters(config) == config.count_stages()["latent_blocks"] // 25
    sizes = {
        mode: activation_bytes(config, 8192, compute_bytes=2, recompute=mode)
        for mode in ("none", "selective", "block")
    }
    assert sizes["none"]["kept"] > sizes["selective"]["kept"] > sizes["block"]["kept"]
    assert sizes["none"]["recomputed"] == 0 < sizes["block"]["recomputed"]
    longer = config.patching.model_copy(update={"patch_size": 8.0})
    fewer = activation_bytes(
        config.model_copy(update={"patching": longer}), 8192, compute_bytes=2, recompute="none"
    )
    assert fewer["kept"] < sizes["none"]["kept"]
