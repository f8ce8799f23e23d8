"""Generation from a recurrent state against the parallel form, and going back."""

from __future__ import annotations

import pytest
import torch
from mamba_oracle import THREE, build, logits_by_hand, mixed
from weft.models.errors import ConfigError
from weft.models.mamba.cache import KVCache
from weft.models.mamba.model import Mamba

LENGTH = 11
MIXED = [0, 0, 1, 1, 1, 0, 2, 0, 2, 2, 0]


@pytest.fixture(params=[("text",), THREE], ids=["dense", "mixture"])
def model(request: pytest.FixtureRequest) -> Mamba:
    return build(modalities=request.param, blocks_per_layer=2)


def cache_of(model: Mamba, rows: int = 1, capacity: int = 40) -> KVCache:
    return KVCache(model.config, rows, capacity, dtype=torch.float64)


def whole(model: Mamba, kinds: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (1, T), their modalities (1, T), and the logits of the equations (T, V)."""
    batch = mixed([len(kinds)], kinds, len(kinds))
    return batch.tokens[None], batch.modality[None], logits_by_hand(model, batch)


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [5, 1, 1, 4], [2, 9], [1, 10]])
def test_pieces_give_what_the_whole_gives(model: Mamba, pieces: list[int]) -> None:
    kinds = MIXED if len(model.config.modalities) > 1 else [0] * LENGTH
    tokens, modality, expected = whole(model, kinds)
    cache = cache_of(model)
    found, start = [], 0
    with torch.no_grad():
        for count in pieces:
            piece = slice(start, start + count)
            found.append(model.forward_cached(tokens[:, piece], None, cache, modality[:, piece])[0])
            start += count
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [LENGTH]
    assert cache.modality[0, :LENGTH].tolist() == kinds


def test_sequences_of_different_lengths_side_by_side(model: Mamba) -> None:
    """What pads a piece leaves no trace: rows of 0, 2, 3 and 7 new ids, twice."""
    tokens = torch.randint(0, 50, (4, 14))
    first, second = torch.tensor([0, 2, 3, 7]), torch.tensor([7, 1, 0, 4])
    cache = cache_of(model, 4)
    with torch.no_grad():
        model.forward_cached(tokens[:, :7], first, cache)
        logits = model.forward_cached(tokens[:, 7:], second, cache)
        assert cache.lengths.tolist() == [7, 3, 3, 11]
        for row, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            ids = torch.cat((tokens[row, :a], tokens[row, 7 : 7 + b]))[None]
            alone = cache_of(model)
            expected = model.forward_cached(ids, None, alone)[0]
            torch.testing.assert_close(logits[row, :b], expected[a:])
            for mine, theirs in zip(cache.states, alone.states, strict=True):
                torch.testing.assert_close(mine[row], theirs[0])
            for mine, theirs in zip(cache.windows, alone.windows, strict=True):
                torch.testing.assert_close(mine[row], theirs[0])


def test_selected_and_taken_back(model: Mamba) -> None:
    tokens = torch.randint(0, 50, (3, 9))
    kinds = torch.tensor([MIXED[:9]] * 3, dtype=torch.uint8) % len(model.config.modalities)
    following = torch.randint(0, 50, (3, 2))
    cache = cache_of(model, 3)
    with torch.no_grad():
        model.forward_cached(tokens, None, cache, kinds)
        cache.rewind(0, tokens[0, :6].tolist())
        cache.rewind(2, [])
        assert cache.lengths.tolist() == [6, 9, 0]
        cache.select(torch.tensor([2, 0, 1, 0]))
        assert cache.lengths.tolist() == [0, 6, 9, 6]
        logits = model.forward_cached(following[[2, 0, 1, 0]], None, cache)
        assert not cache.pending
        for slot, (row, kept) in enumerate([(2, 0), (0, 6), (1, 9), (0, 6)]):
            alone = cache_of(model)
            if kept:
                model.forward_cached(tokens[row : row + 1, :kept], None, alone, kinds[:1, :kept])
            expected = model.forward_cached(following[row : row + 1], None, alone)
            torch.testing.assert_close(logits[slot], expected[0])


def test_a_snapshot_is_gone_back_to_any_number_of_times() -> None:
    model = build(modalities=THREE)
    tokens, patches = torch.randint(0, 50, (2, 5)), torch.randn(2, 4, 16, dtype=torch.float64)
    cache = cache_of(model, 2)
    with torch.no_grad():
        model.forward_cached(tokens, None, cache)
        before = cache.snapshot()
        first = model.read_rows(patches, cache, 1)
        assert cache.lengths.tolist() == [9, 9]
        cache.restore(before)
        model.read_rows(patches + 1, cache, 1)
        cache.restore(before)
        assert (cache.lengths.tolist(), cache.used) == ([5, 5], 5)
        assert torch.equal(model.read_rows(patches, cache, 1), first)
        model.forward_cached(tokens[:, :1], None, cache)
    assert first.shape == (2, 4, 16)
    with pytest.raises(ConfigError, match="cannot go back to behind an image"):
        cache.rewind(0, [0] * 9)
    cache.rewind(0, [0] * 5)


def test_patches_are_read_as_the_packed_form_reads_them() -> None:
    """The backbone on rows that are no ids, among ids."""
    from weft.kernels import route_by_modality

    model = build(modalities=THREE[:2])
    kinds = torch.tensor([0, 0, 1, 1, 1, 0])
    tokens, patches = torch.randint(0, 50, (3,)), torch.randn(3, 16, dtype=torch.float64)
    ids = model.embedding(tokens)
    x = torch.cat((ids[:2], patches, ids[2:]))
    routing = route_by_modality(kinds, 2)
    batch = mixed([6], kinds.tolist(), 6)
    context = model.backbone.context(batch, routing)
    expected = routing.restore(model.backbone(routing.permute(x), routing, context))
    cache = cache_of(model)
    with torch.no_grad():
        model.forward_cached(tokens[None, :2], None, cache)
        found = model.read_rows(patches[None], cache, 1)[0]
        last = model.forward_cached(tokens[None, 2:], None, cache)[0, 0]
    torch.testing.assert_close(found, expected[2:5].detach())
    logits = (expected[5] @ model.head_weight.T).float().detach()
    torch.testing.assert_close(last, logits)


def test_states_are_fp32_and_the_cache_has_an_end() -> None:
    model = build(torch.bfloat16)
    cache = KVCache(model.config, 1, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        model.forward_cached(torch.zeros(1, 3, dtype=torch.int64), None, cache)
    assert {x.dtype for x in (*cache.states, *cache.windows)} == {torch.float32}
    with pytest.raises(ConfigError, match="the cache holds 3 positions, 4 are needed"):
        model.forward_cached(torch.zeros(1, 1, dtype=torch.int64), None, cache)


def test_a_modality_without_weights_is_refused(model: Mamba) -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    kind = torch.full((1, 2), len(model.config.modalities))
    with pytest.raises(ValueError, match=r"modality is [13], expected an id from 0 to"):
        model.forward_cached(ids, None, cache_of(model), kind)
