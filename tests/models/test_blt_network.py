"""BLT's network against its definition, and what must not reach a byte: other documents, and what comes after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blt_oracle import document_logits
from packing import packed
from weft.kernels import Patches
from weft.models.batch import IGNORED, PackedBatch
from weft.models.blt.config import Config
from weft.models.blt.network import BLT, drop_absent, patch_layout
from weft.models.blt.patching import make_patches
from weft.models.build import build_model, build_task

SIZES: dict[str, Any] = {
    "patching": {"scheme": "stride", "stride": 3},
    "window": 4,
    "ngram": {"sizes": (2, 3), "rows": 31},
    "encoder": {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 12},
    "latent": {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 12},
    "decoder": {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 12},
}
CHOICES: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {"formulation": "paper"},
    "single residual": {"double_residual": False},
    "k of 3, projected": {"patch_vectors": 3, "latent": {"n_kv_heads": 2}},
    "encoder all": {"encoder": {"n_layers": 3, "cross_attention": "all"}},
    "encoder last of 2": {"encoder": {"n_layers": 2}},
    "learned queries": {"encoder": {"queries": "learned"}},
    "no encoder cross-attention": {
        "encoder": {"cross_attention": "none", "pooling": ("max", "mean", "min")}
    },
    "decoder first": {"decoder": {"cross_attention": "first"}},
    "no decoder cross-attention": {"decoder": {"cross_attention": "none"}},
    "no n-grams, other widths": {"ngram": None, "decoder": {"d_model": 12, "cross_heads": 5}},
    "spaces, no window": {"patching": {"scheme": "space", "stride": None}, "window": None},
    "cut patches": {"patching": {"stride": 5, "max_length": 2}},
}
LENGTHS = [11, 3, 1, 9]


def make_config(**changes: Any) -> Config:
    merged = dict(SIZES)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if is_section else value
    return Config(**merged)


def make_network(config: Config) -> BLT:
    """In fp64, with norms that are not 1: a weight that is left out must show."""
    network = build_model(config, seed=3).double()
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return network


def text(count: int, seed: int = 0) -> torch.Tensor:
    """Ids of letters and spaces, with a begin id first."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.tensor(list(b"abc xy "))
    ids = letters[torch.randint(0, len(letters), (count,), generator=generator)] + 4
    ids[0] = 1
    return ids


def batch_of(ids: torch.Tensor, lengths: list[int] = LENGTHS) -> PackedBatch:
    return packed(ids, lengths, len(ids))


def patches_of(batch: PackedBatch, config: Config, room: int | None = None) -> Patches:
    return make_patches(batch, config.patching, None, room or len(batch.tokens))


def logits_of(network: BLT, batch: PackedBatch, room: int | None = None) -> torch.Tensor:
    return network(batch, patches_of(batch, network.config, room), output="logits")


def starts_of(ids: list[int], config: Config) -> list[bool]:
    """Patch starts of one document and of the byte after it, by definition."""
    patching, found, rule_start = config.patching, [], 0
    for t in range(len(ids) + 1):
        if t < 2:
            opens = True
        elif patching.scheme == "stride":
            opens = (t - 1) % patching.stride == 0
        else:
            opens = ids[t - 1] < 4 or (is_space(ids[t - 1]) and not is_space(ids[t - 2]))
        rule_start = t if opens else rule_start
        found.append(
            opens or bool(patching.max_length and (t - rule_start) % patching.max_length == 0)
        )
    return found


def is_space(one: int) -> bool:
    return one < 4 or not chr(one - 4).isalnum()


@pytest.mark.parametrize("choice", CHOICES)
def test_logits_are_those_of_the_definition(choice: str) -> None:
    config = make_config(**CHOICES[choice])
    network = make_network(config)
    ids = text(sum(LENGTHS))
    found = logits_of(network, batch_of(ids))
    weights = network.state_dict()
    expected = torch.cat(
        [
            document_logits(config, weights, part.tolist(), starts_of(part.tolist(), config))
            for part in ids.split(LENGTHS)
        ]
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_documents_do_not_see_each_other(choice: str) -> None:
    network = make_network(make_config(**CHOICES[choice]))
    ids = text(sum(LENGTHS))
    before = logits_of(network, batch_of(ids)).split(LENGTHS)
    changed = ids.clone()
    changed[: LENGTHS[0]] = text(LENGTHS[0], seed=9)
    after = logits_of(network, batch_of(changed)).split(LENGTHS)
    assert not torch.equal(before[0], after[0])
    for one, other in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_comes_later_changes_nothing(choice: str) -> None:
    network = make_network(make_config(**CHOICES[choice]))
    ids = text(17)
    whole = logits_of(network, batch_of(ids, [17]))
    for length in range(1, 17):
        prefix = logits_of(network, batch_of(ids[:length], [length]))
        torch.testing.assert_close(prefix, whole[:length], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_parameter_learns(choice: str) -> None:
    network = make_network(make_config(**CHOICES[choice]))
    batch = batch_of(text(sum(LENGTHS)))
    network(batch, patches_of(batch, network.config))["cross_entropy"].backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        assert torch.isfinite(values).all(), name
        assert values.abs().sum() > 0, name


def test_gradient_is_that_of_the_loss() -> None:
    """Finite differences in fp64, in one random direction for each parameter."""
    network = make_network(make_config(latent={"n_layers": 1}, decoder={"n_layers": 1}))
    batch = batch_of(text(sum(LENGTHS)))
    patches = patches_of(batch, network.config)
    kept = batch.targets != IGNORED

    def loss() -> torch.Tensor:
        states = network(batch, patches, output="states")
        logits = states @ network.head.weight.T
        return torch.nn.functional.cross_entropy(logits[kept], batch.targets[kept])

    loss().backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            sides = []
            for side in (1e-6, -1e-6):
                parameter.add_(direction, alpha=side)
                sides.append(loss().item())
                parameter.sub_(direction, alpha=side)
        slope = (sides[0] - sides[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("room", [13, 14, 24, 40])
def test_room_for_more_patches_changes_nothing(room: int) -> None:
    """On shapes that never change, as on a GPU; 12 patches are there."""
    config = make_config(pad_patches=True)
    network = make_network(config)
    batch = batch_of(text(sum(LENGTHS)))
    exact = patches_of(batch, config, 12)
    assert (int(exact.count), int(exact.overflow)) == (12, 0)
    expected = network(batch, exact)["cross_entropy"]
    found = network(batch, patches_of(batch, config, room))["cross_entropy"]
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if not p.grad.is_sparse)


def test_patch_layout_keeps_absent_patches_apart() -> None:
    config = make_config(patching={"stride": 2})
    batch = packed(text(24), [8, 4, 9, 3], 12)
    patches = patches_of(batch, config, 24)
    layout = patch_layout(batch, patches)
    count = int(patches.count)
    lengths = [length for length in layout.cu_seqlens.diff().tolist() if length]
    assert sum(lengths) == 24
    assert max(lengths) <= layout.longest == 12
    assert sum(lengths[:4]) == count
    assert layout.position_ids.tolist() == [i for length in lengths for i in range(length)]
    dropped = patch_layout(batch, drop_absent(patches))
    assert dropped.total == count
    assert [n for n, times in dropped.runs for _ in range(times)] == lengths[:4]


def test_overflow_reaches_no_other_document() -> None:
    """Patches that find no room: their bytes still train, without reading any patch of others."""
    config = make_config()
    network = make_network(config)
    batch = batch_of(text(sum(LENGTHS)))
    patches = patches_of(batch, config, 6)
    assert int(patches.overflow) == 6
    logits = network(batch, patches, output="logits")
    assert logits.isfinite().all()
    whole = logits_of(network, batch)
    torch.testing.assert_close(logits[: LENGTHS[0]], whole[: LENGTHS[0]])


def test_compiled_blocks_agree() -> None:
    """What compiles is traced as a whole; the default backend takes its time and was looked at by hand."""
    config = make_config(pad_patches=True, latent={"n_layers": 1}, decoder={"n_layers": 1})
    network = make_network(config)
    batch = batch_of(text(sum(LENGTHS)))
    expected = logits_of(network, batch)
    for block in build_task(config).blocks({"model": network}):
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(network, batch), expected, atol=1e-6, rtol=1e-5)
