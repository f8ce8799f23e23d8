"""Generation against a cache gives the full forward's logits; the cache may be edited between."""

from __future__ import annotations

import pytest
import torch
from packing import packed
from weft.models import build_model
from weft.models.errors import ConfigError
from weft.models.transformer.cache import KVCache
from weft.models.transformer.config import Config, NgramConfig
from weft.models.transformer.model import Transformer

TINY = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48, "init_std": 0.2}
CONFIGS = {
    "olmo2": Config(**TINY),
    "gqa and n-grams": Config(
        **TINY, n_kv_heads=2, ngram=NgramConfig(sizes=(2, 3, 5), rows=97, init_std=0.3)
    ),
    "unigrams": Config(**TINY, ngram=NgramConfig(sizes=(1,), rows=97, init_std=0.3)),
    "window, the paper's n-grams": Config(
        **TINY,
        window=3,
        ngram=NgramConfig(
            sizes=(2, 4),
            rows=97,
            init_std=0.3,
            oldest_first=False,
            short_windows="skip",
            average=True,
        ),
    ),
    "llama tied": Config(**TINY, norm="pre", qk_norm="none", n_kv_heads=1, tie_embeddings=True),
}


def full_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return model(packed(tokens, [len(tokens)], len(tokens)), output="logits")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_ragged_prompts_then_steps_equal_the_full_forward(name: str) -> None:
    model = build_model(CONFIGS[name])
    sequences = torch.randint(0, 64, (4, 12))
    prompt_lengths = torch.tensor([7, 1, 4, 6])
    padded = sequences[:, :7].clone()
    padded[torch.arange(7) >= prompt_lengths[:, None]] = 63
    cache = KVCache(CONFIGS[name], 4, 12)
    prompt_logits = model.forward_cached(padded, prompt_lengths, cache)
    found = [list(row[:n]) for row, n in zip(prompt_logits, prompt_lengths, strict=True)]
    for step in range(5):
        newest = sequences.gather(1, prompt_lengths[:, None] + step)
        for row, logits in zip(found, model.forward_cached(newest, None, cache), strict=True):
            row.append(logits[0])
    assert cache.lengths.tolist() == (prompt_lengths + 5).tolist()
    for row, tokens in zip(found, sequences, strict=True):
        expected = full_logits(model, tokens[: len(row)])
        torch.testing.assert_close(torch.stack(row), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prompts_may_come_in_ragged_pieces(name: str) -> None:
    model = build_model(CONFIGS[name])
    tokens = torch.randint(0, 64, (2, 9))
    cache = KVCache(CONFIGS[name], 2, 12)
    model.forward_cached(tokens[:, :4], torch.tensor([4, 2]), cache)
    second = torch.stack((tokens[0, 4:8], tokens[1, 2:6]))
    logits = model.forward_cached(second, None, cache)
    torch.testing.assert_close(
        logits[0], full_logits(model, tokens[0, :8])[4:], atol=2e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        logits[1], full_logits(model, tokens[1, :6])[2:], atol=2e-5, rtol=1e-5
    )


@torch.no_grad()
def test_rows_may_be_dropped_copied_and_cut_between_steps() -> None:
    config = CONFIGS["gqa and n-grams"]
    model, tokens = build_model(config), torch.randint(0, 64, (3, 8))
    cache = KVCache(config, 3, 16)
    model.forward_cached(tokens[:, :6], None, cache)
    cache.select(torch.tensor([2, 0, 2]))
    logits = model.forward_cached(torch.tensor([[5], [6], [7]]), None, cache)
    for row, (source, newest) in enumerate(((2, 5), (0, 6), (2, 7))):
        sequence = torch.cat((tokens[source, :6], torch.tensor([newest])))
        torch.testing.assert_close(
            logits[row, 0], full_logits(model, sequence)[-1], atol=2e-5, rtol=1e-5
        )
    # Taking the last id back: what lies past `lengths` is not looked at.
    cache.lengths -= 1
    cache.recent = torch.stack([tokens[i, 2:6] for i in (2, 0, 2)])
    again = model.forward_cached(torch.tensor([[5], [6], [7]]), None, cache)
    torch.testing.assert_close(again, logits, atol=2e-5, rtol=1e-5)


def test_a_full_cache_is_an_error_that_says_so() -> None:
    config = CONFIGS["olmo2"]
    model, cache = build_model(config), KVCache(config, 1, 4)
    with torch.no_grad():
        model.forward_cached(torch.zeros(1, 4, dtype=torch.int64), None, cache)
        with pytest.raises(ConfigError, match="holds 4 positions, 5 are needed"):
            model.forward_cached(torch.zeros(1, 1, dtype=torch.int64), None, cache)


@torch.no_grad()
def test_a_16_bit_cache_stays_close() -> None:
    config = CONFIGS["olmo2"]
    model, tokens = build_model(config), torch.randint(0, 64, (1, 9))
    cache = KVCache(config, 1, 9, dtype=torch.bfloat16)
    model.forward_cached(tokens[:, :8], None, cache)
    assert cache.keys[0].dtype == torch.bfloat16
    logits = model.forward_cached(tokens[:, 8:], None, cache)[0, 0]
    expected = full_logits(model, tokens[0])[-1]
    assert (logits - expected).norm() < 0.05 * expected.norm()
