"""What the transformer tells the trainer: sizes, FLOPs, groups, start values, losses."""

from __future__ import annotations

import pytest
import torch
from packing import packed
from weft.models import build_task
from weft.models.transformer.config import Config, NgramConfig
from weft.models.transformer.task import TransformerTask

TINY = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
NGRAMS = NgramConfig(sizes=(2, 3), rows=97)

# Published: parameters, without the input embedding, a block, GFLOPs a token at 4096
# (specification, section 1.1).
SIZES = {
    "1b": (
        {"n_layers": 16, "d_model": 2048, "n_heads": 16, "d_ff": 8192},
        1_484_916_736,
        67_117_056,
        9.287,
    ),
    "7b": (
        {"n_layers": 32, "d_model": 4096, "n_heads": 32, "d_ff": 11008},
        7_298_617_344,
        202_391_552,
        47.768,
    ),
    "13b": (
        {"n_layers": 40, "d_model": 5120, "n_heads": 40, "d_ff": 13824},
        13_716_198_400,
        317_214_720,
        89.281,
    ),
    "32b": (
        {"n_layers": 64, "d_model": 5120, "n_heads": 40, "n_kv_heads": 8, "d_ff": 27648},
        32_234_279_936,
        487_604_224,
        206.429,
    ),
}


def meta_network(config: Config) -> torch.nn.Module:
    with torch.device("meta"):
        return build_task(config).build_networks()["model"]


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_met_exactly(size: str) -> None:
    shape, total, block, gigaflops = SIZES[size]
    config = Config(**shape)
    network = meta_network(config)
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(config.count_parameters().values()) == total
    assert sum(p.numel() for p in network.blocks[0].parameters()) == block
    assert build_task(config).flops_per_token(4096) / 1e9 == pytest.approx(gigaflops, abs=5e-4)
    assert not list(network.buffers())


@pytest.mark.parametrize(
    "options",
    [
        {"ngram": NGRAMS, "n_kv_heads": 2},
        {"norm": "pre", "qk_norm": "none", "tie_embeddings": True},
        {
            "qk_norm": "head",
            "head_dim": 10,
            "ngram": NgramConfig(sizes=(3,), rows=7, hash_functions=2),
        },
    ],
)
def test_counts_by_part_equal_the_network(options: dict) -> None:
    config = Config(**TINY, **options)
    counts = dict.fromkeys(config.count_parameters(), 0)
    parts = {
        "embedding.tokens": "embedding",
        "embedding.ngrams": "ngram_tables",
        "blocks": "blocks",
        "norm": "final_norm",
        "head": "head",
    }
    for name, parameter in meta_network(config).named_parameters():
        part = next(part for prefix, part in parts.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    assert counts == config.count_parameters()


def test_groups_hold_every_parameter_once_and_decay_all_but_the_embeddings() -> None:
    task = build_task(Config(**TINY, ngram=NGRAMS))
    networks = {"model": meta_network(Config(**TINY, ngram=NGRAMS))}
    groups = {group.name: group for group in task.parameter_groups(networks)}
    assert set(groups) == {"decay", "no_decay", "ngrams"}
    assert groups["no_decay"].parameters == ("model/embedding.tokens.weight",)
    assert groups["ngrams"].parameters == ("model/embedding.ngrams.weight",)
    assert [groups[n].weight_decay for n in ("decay", "no_decay", "ngrams")] == [True, False, False]
    assert groups["ngrams"].algorithm == "row_sparse_adam"
    assert {"model/norm.weight", "model/head.weight"} <= set(groups["decay"].parameters)
    names = [name for group in groups.values() for name in group.parameters]
    assert sorted(names) == sorted(f"model/{n}" for n, _ in networks["model"].named_parameters())


def test_losses_are_sums_with_the_count_that_divides_them() -> None:
    task = build_task(Config(**TINY, z_loss=3e-5))
    assert isinstance(task, TransformerTask)
    network = task.build_networks()["model"]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = packed(torch.randint(0, 64, (32,)), [20, 12], 32)
    output = task.losses({"model": network}, batch)
    assert task.counts(batch) == {"tokens": 30}
    assert [(n, t.count, t.weight) for n, t in output.terms.items()] == [
        ("cross_entropy", "tokens", 1.0),
        ("z_loss", "tokens", 3e-5),
    ]
    assert output.terms["cross_entropy"].total.item() / 30 == pytest.approx(4.2, abs=1)
    assert len(task.blocks({"model": network})) == 2
