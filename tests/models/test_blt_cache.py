"""A BLT's cached forward against its packed one at every byte, and how often its latent transformer runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from packing import packed
from test_blt_network import CHOICES, make_config, text
from torch import Tensor, nn
from weft.models.blt.cache import KVCache
from weft.models.blt.config import Config
from weft.models.blt.generation import BLTGenerator
from weft.models.blt.patching import batch_entropy, make_patches
from weft.models.build import build_task
from weft.models.errors import ConfigError
from weft.models.initialise import initialise_module
from weft.models.transformer.config import Config as TransformerConfig

LENGTHS = [29, 40, 3, 33]
PROMPTS = [7, 22, 1, 12]
ENTROPY = TransformerConfig(
    vocab_size=260, n_layers=2, d_model=16, n_heads=2, d_ff=24, window=6, norm="pre", qk_norm="none",
    init_std=0.6,
)  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "stride": {"stride": 3},
    "space": {"scheme": "space", "stride": None},
    "entropy": {"scheme": "entropy", "threshold": 0.0},
    "rise": {"scheme": "rise", "rise": 0.02, "forced_starts": 3},
    "both, cut": {"scheme": "both", "threshold": 0.0, "rise": 0.0, "max_length": 3},
    "lines": {"scheme": "entropy", "threshold": 0.0, "newline_reset": "after"},
    "one forced start": {"stride": 4, "forced_starts": 1},
}


def with_rule(rule: str, **changes: Any) -> Config:
    patching = RULES[rule]
    if patching.get("scheme", "stride") not in ("stride", "space"):
        patching = {**patching, "stride": None, "entropy_model": "unused", "entropy": ENTROPY}
    return make_config(**{**changes, "patching": patching})


def networks_of(config: Config) -> dict[str, nn.Module]:
    """With weights large enough that a byte read wrongly shows; the entropy model's are drawn by its own family."""
    task = build_task(config)
    networks = task.build_networks()
    initialise_module(networks["model"], "model", task, 3)
    if "entropy" in networks:
        initialise_module(networks["entropy"], "model", build_task(ENTROPY), 4)
    for name, parameter in networks["model"].named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return networks


def documents(seed: int = 5) -> list[Tensor]:
    parts = [text(length, seed + number) for number, length in enumerate(LENGTHS)]
    for part in parts:
        part[10::9] = 10 + 4
    return parts


def level_in_the_middle(config: Config, networks: dict[str, nn.Module], parts: list[Tensor]) -> Config:  # fmt: skip
    """The same with a threshold that half of the entropies pass, and that none is within rounding of."""
    if config.patching.threshold is None:
        return config
    batch = packed(torch.cat(parts), LENGTHS, sum(LENGTHS))
    found = batch_entropy(batch, networks["entropy"], config.patching.newline_reset).sort().values
    gaps = found.diff()
    middle = slice(len(gaps) * 2 // 5, len(gaps) * 3 // 5)
    place = middle.start + int(gaps[middle].argmax())
    level = float(found[place : place + 2].mean())
    patching = config.patching.model_copy(update={"threshold": level})
    return config.model_copy(update={"patching": patching})


@torch.no_grad()
def packed_logits(config: Config, networks: dict[str, nn.Module], parts: list[Tensor]) -> tuple[list[Tensor], list[list[int]]]:  # fmt: skip
    """Logits and patch starts of each document of one packed batch, by the forward that training runs."""
    batch = packed(torch.cat(parts), LENGTHS, sum(LENGTHS))
    patches = make_patches(batch, config.patching, networks.get("entropy"), sum(LENGTHS))
    logits = networks["model"](batch, patches, output="logits").split(LENGTHS)
    is_start = patches.is_start.split(LENGTHS)
    return list(logits), [starts.nonzero()[:, 0].tolist() for starts in is_start]


@torch.no_grad()
def cached_logits(generator: BLTGenerator, cache: KVCache, parts: list[Tensor]) -> list[Tensor]:
    """The same by a prefill of unequal prompts and a byte at a time; rows that have ended leave the batch."""
    longest = max(PROMPTS)
    padded = torch.full((len(parts), longest), 99)
    for row, count in enumerate(PROMPTS):
        padded[row, :count] = parts[row][:count]
    found = [[row[:count]] for row, count in zip(
        generator.forward_cached(padded, torch.tensor(PROMPTS), cache), PROMPTS, strict=True
    )]  # fmt: skip
    rows = list(range(len(parts)))
    done = list(PROMPTS)
    while True:
        staying = [slot for slot, row in enumerate(rows) if done[row] < len(parts[row])]
        if not staying:
            return [torch.cat(logits) for logits in found]
        if len(staying) < len(rows):
            cache.select(torch.tensor(staying))
            rows = [rows[slot] for slot in staying]
        cache.used = int(cache.lengths.max())
        newest = torch.stack([parts[row][done[row]] for row in rows])[:, None]
        for row, logits in zip(rows, generator.forward_cached(newest, None, cache), strict=True):
            found[row].append(logits)
            done[row] += 1


def check(config: Config, dtype: torch.dtype = torch.float32) -> None:
    parts = documents()
    networks = {name: network.to(dtype) for name, network in networks_of(config).items()}
    config = level_in_the_middle(config, networks, parts)
    networks["model"].config = config
    expected, starts = packed_logits(config, networks, parts)
    generator = BLTGenerator(networks["model"], networks.get("entropy"))  # type: ignore[arg-type]
    cache = KVCache(config, len(parts), max(LENGTHS), dtype=dtype)
    found = cached_logits(generator, cache, parts)
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=f"document {row}")
    sizes = [b - a for s in starts for a, b in pairwise(s[2:])]
    assert len(set(sizes)) > 1 or config.patching.scheme == "stride" or config.patching.max_length


@pytest.mark.parametrize("rule", RULES)
def test_every_byte_has_the_logits_of_the_packed_forward(rule: str) -> None:
    check(with_rule(rule))


def test_in_fp64_too() -> None:
    check(with_rule("entropy"), torch.float64)


@pytest.mark.parametrize("choice", CHOICES)
def test_whatever_the_architecture(choice: str) -> None:
    check(make_config(**CHOICES[choice]))


def test_the_latent_transformer_takes_one_step_a_patch_and_none_without() -> None:
    config = with_rule("space")
    networks = networks_of(config)
    parts = documents()
    _, starts = packed_logits(config, networks, parts)
    calls: list[int] = []
    model: Any = networks["model"]
    model.latent.blocks[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[:2].numel()))  # fmt: skip
    generator = BLTGenerator(model)
    cache = KVCache(config, 1, LENGTHS[1])
    with torch.no_grad():
        for newest in parts[1]:
            generator.forward_cached(newest.view(1, 1), None, cache)
    opens = cache.patch_starts(0)
    assert [start for start in opens if start < LENGTHS[1]] == starts[1]
    # The patch that is still open has taken no step.
    assert calls == [1] * (len(opens) - 1)
    assert len(calls) < LENGTHS[1] / 2


def test_rewinding_gives_the_same_bytes_again() -> None:
    config = with_rule("lines")
    networks = networks_of(config)
    parts = documents()
    config = level_in_the_middle(config, networks, parts)
    networks["model"].config = config
    generator = BLTGenerator(networks["model"], networks["entropy"])  # type: ignore[arg-type]
    tokens = torch.stack([part[:29] for part in (parts[0], parts[1])])
    cache = KVCache(config, 2, 29)
    with torch.no_grad():
        expected = generator.forward_cached(tokens, None, cache)
        cache.rewind(0, tokens[0, :11].tolist())
        cache.rewind(1, tokens[1, :20].tolist())
        starts = cache.patch_starts(0)
        other = torch.tensor([[70], [70]])
        cache.used = 20
        generator.forward_cached(other, None, cache)
        cache.rewind(0, tokens[0, :11].tolist())
        cache.rewind(1, tokens[1, :20].tolist())
        assert cache.patch_starts(0) == starts
        cache.used = 20
        rest = torch.zeros(2, 9, dtype=torch.int64)
        rest[0], rest[1] = tokens[0, 11:20], tokens[1, 20:]
        again = generator.forward_cached(rest, None, cache)
    torch.testing.assert_close(again[0], expected[0, 11:20], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again[1], expected[1, 20:], atol=1e-5, rtol=1e-5)


def test_a_full_cache_and_a_missing_entropy_model_are_one_line_errors() -> None:
    config = with_rule("space")
    generator = BLTGenerator(networks_of(config)["model"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the cache holds 4 positions, 5 are needed"):
        generator.forward_cached(torch.zeros(1, 5, dtype=torch.int64), None, KVCache(config, 1, 4))
    networks = networks_of(with_rule("entropy"))
    with pytest.raises(ConfigError, match="needs its entropy model"):
        BLTGenerator(networks["model"])  # type: ignore[arg-type]
