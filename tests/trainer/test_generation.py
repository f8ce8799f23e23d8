"""Generation against the full forward, row by row against alone, its sampling, its stops and its hook."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from packing import packed
from torch import nn
from weft.models import build_model
from weft.models.errors import ConfigError
from weft.models.transformer.cache import KVCache
from weft.models.transformer.config import Config, NgramConfig
from weft.trainer import generation
from weft.trainer.data.vocabulary import ByteVocabulary
from weft.trainer.generation import GenerationState, decode_prefix, generate
from weft.trainer.sampling import Sampling, filter_probabilities, pick_ids, row_generator

BYTES = ByteVocabulary()
PROMPTS = ["a", "the quick brown fox", "", "import numpy as np\n", "zz"]


def tiny(**more: object) -> nn.Module:
    settings = {"vocab_size": 264, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
    return build_model(Config(**{**settings, "init_std": 0.3, "n_kv_heads": 2, **more}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return tiny(ngram=NgramConfig(sizes=(2, 3), rows=97, init_std=0.3))


def full_logits(network: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """(V,) for the id after `ids`, by the packed forward that knows no cache."""
    with torch.no_grad():
        return network(packed(torch.tensor(ids), [len(ids)], len(ids)), output="logits")[-1]


def prompt_ids(prompt: str) -> list[int]:
    return [1, *(byte + 4 for byte in prompt.encode())]


class Script(nn.Module):
    """Says a fixed text whatever the prompt, one byte a step, by raising the next byte's logit."""

    def __init__(self, says: bytes) -> None:
        super().__init__()
        self.inner = tiny()
        self.config = self.inner.config
        self.says = [byte + 4 for byte in says]
        self.start = -1

    def forward_cached(
        self, tokens: torch.Tensor, new_lengths: torch.Tensor | None, cache: KVCache
    ) -> torch.Tensor:
        logits = self.inner.forward_cached(tokens, new_lengths, cache)
        if self.start < 0:
            self.start = int(cache.lengths[0])
        logits[:, -1] = 0
        logits[:, -1, self.says[int(cache.lengths[0]) - self.start]] = 50
        return logits


def test_greedy_takes_the_argmax_of_the_full_forward_at_every_step(network: nn.Module) -> None:
    for prompt, completion in zip(
        PROMPTS, generate(network, BYTES, PROMPTS, max_new_tokens=12), strict=True
    ):
        ids = prompt_ids(prompt)
        for found in completion.token_ids:
            assert found == int(full_logits(network, ids)[:260].argmax())
            ids.append(found)
        assert completion.finish_reason == ("eos" if completion.token_ids[-1] == 2 else "length")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(
    network: nn.Module, temperature: float
) -> None:
    settings = {"max_new_tokens": 16, "temperature": temperature, "top_p": 0.95, "seed": 3}
    together = generate(network, BYTES, PROMPTS, **settings)  # type: ignore[arg-type]
    alone = [generate(network, BYTES, [prompt], **settings)[0] for prompt in PROMPTS]  # type: ignore[arg-type]
    assert together == alone
    assert generate(network, BYTES, PROMPTS[::-1], batch_size=2, **settings) == together[::-1]  # type: ignore[arg-type]


def test_a_prompt_longer_than_a_prefill_piece_is_read_whole(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(network, BYTES, PROMPTS, max_new_tokens=8)
    monkeypatch.setattr(generation, "PREFILL_POSITIONS", 35)
    assert generate(network, BYTES, PROMPTS, max_new_tokens=8) == whole


def test_seeds_decide_and_equal_prompts_differ(network: nn.Module) -> None:
    def sample(seed: int) -> list[list[int]]:
        done = generate(network, BYTES, ["ab", "ab"], max_new_tokens=12, temperature=1.0, seed=seed)
        return [completion.token_ids for completion in done]

    first, second = sample(0)
    assert sample(0) == [first, second]
    assert first != second
    assert sample(1)[0] != first


def test_logprobs_are_those_of_the_model_itself(network: nn.Module) -> None:
    settings = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 5, "ignore_eos": True}
    (done,) = generate(network, BYTES, ["abc"], logprobs=True, **settings)  # type: ignore[arg-type]
    ids = prompt_ids("abc")
    assert done.logprobs is not None
    assert len(done.logprobs) == 6
    for found, logprob in zip(done.token_ids, done.logprobs, strict=True):
        wanted = full_logits(network, ids).double().log_softmax(-1)[found]
        assert logprob == pytest.approx(float(wanted), abs=1e-4)
        ids.append(found)
    assert generate(network, BYTES, ["abc"])[0].logprobs is None


def test_ids_without_a_meaning_are_never_chosen() -> None:
    network = tiny(vocab_size=4000)
    done = generate(network, BYTES, ["a"] * 8, max_new_tokens=20, temperature=1.0)
    assert max(i for completion in done for i in completion.token_ids) < 260


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 7])
def test_filtered_probabilities_by_definition(top_p: float, top_k: int | None) -> None:
    logits = torch.randn(16, 40) * 3
    found = filter_probabilities(logits, Sampling(0.8, top_p, top_k))
    for row, kept in zip(logits.double().numpy() / 0.8, found.numpy(), strict=True):
        order = np.argsort(-row)[: top_k or 40]
        weights = np.exp(row[order] - row.max())
        weights /= weights.sum()
        size = next(n for n in range(1, len(order) + 1) if weights[:n].sum() >= top_p - 1e-12)
        assert set(np.flatnonzero(kept)) == set(order[:size])
        np.testing.assert_allclose(
            kept[order[:size]], weights[:size] / weights[:size].sum(), rtol=1e-9
        )


def test_samples_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=row_generator(0, "x", 0))
    counts = torch.bincount(pick_ids(logits, Sampling(1.0), uniforms), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    top = pick_ids(logits, Sampling(1.0, top_p=0.7), uniforms)
    assert set(top.tolist()) == {0, 1}


def test_uniforms_at_the_edges_never_pick_a_dropped_id() -> None:
    logits = torch.tensor([[-math.inf, 2.0, -math.inf, 1.0, -math.inf]]).expand(2, 5)
    edges = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert pick_ids(logits, Sampling(1.0), edges).tolist() == [1, 3]


def test_stop_strings_span_ids_and_the_text_ends_before_them() -> None:
    (done,) = generate(
        Script(b"one two three"), BYTES, ["p"], stop=["o th", "never"], max_new_tokens=13
    )
    assert done.finish_reason == "stop"
    assert done.text == "one tw"
    assert BYTES.decode(done.token_ids) == "one two th"


def test_of_two_stops_in_one_id_the_earlier_place_wins() -> None:
    (done,) = generate(Script(b"xab"), BYTES, ["p"], stop=["b", "ab"], max_new_tokens=3)
    assert (done.text, done.finish_reason) == ("x", "stop")


def test_eos_ends_and_can_be_ignored() -> None:
    network = Script(b"hi")
    network.says += [2, 4 + 33]
    (done,) = generate(network, BYTES, ["p"], max_new_tokens=4)
    assert (done.text, done.finish_reason, done.token_ids[-1]) == ("hi", "eos", 2)
    network.start = -1
    (done,) = generate(network, BYTES, ["p"], max_new_tokens=4, ignore_eos=True)
    assert (done.text, done.finish_reason) == ("hi!", "length")


def test_a_character_cut_in_half_is_left_out_and_a_broken_one_is_shown() -> None:
    word = "naïve".encode()
    assert generate(Script(word), BYTES, ["p"], max_new_tokens=3)[0].text == "na"
    assert generate(Script(word), BYTES, ["p"], max_new_tokens=4)[0].text == "naï"
    assert decode_prefix(BYTES, [4 + 0xC3, 4 + 97]) == "\ufffda"


def test_stop_strings_of_many_bytes_are_found() -> None:
    text = "größer → ✓ ende"
    (done,) = generate(Script(text.encode()), BYTES, ["p"], stop=["→ ✓"], max_new_tokens=24)
    assert (done.text, done.finish_reason) == ("größer ", "stop")


def test_the_hook_overrides_forces_and_finishes(network: nn.Module) -> None:
    seen: list[tuple[int, list[int]]] = []

    def hook(state: GenerationState) -> None:
        seen.append((state.step, list(state.rows)))
        for slot, row in enumerate(state.rows):
            if state.step == 0 and row == 0:
                state.force(row, BYTES.encode("Wait").tolist())
            if state.step == 1 and row == 1:
                state.next_ids[slot] = 4 + ord("#")
            if state.step == 2 and row == 2:
                state.finish(row, "enough")

    plain = generate(network, BYTES, ["a", "b", "c"], max_new_tokens=7, ignore_eos=True)
    done = generate(
        network, BYTES, ["a", "b", "c"], max_new_tokens=7, ignore_eos=True, on_token=hook
    )
    assert done[0].token_ids[:4] == BYTES.encode("Wait").tolist()
    ids = prompt_ids("aWait")
    for found in done[0].token_ids[4:]:
        assert found == int(full_logits(network, ids)[:260].argmax())
        ids.append(found)
    assert done[1].token_ids[1] == 4 + ord("#")
    assert done[2].token_ids == plain[2].token_ids[:2]
    assert done[2].finish_reason == "enough"
    assert [rows for _, rows in seen] == [[0, 1, 2]] * 3 + [[0, 1]] * 4


def test_redraw_excludes_ids(network: nn.Module) -> None:
    (plain,) = generate(network, BYTES, ["a"], max_new_tokens=1)

    def hook(state: GenerationState) -> None:
        state.redraw(0, banned=[plain.token_ids[0]])

    (done,) = generate(network, BYTES, ["a"], max_new_tokens=1, on_token=hook)
    logits = full_logits(network, prompt_ids("a"))[:260]
    assert done.token_ids == [int(logits.argsort(descending=True)[1])]


def test_rewind_restores_the_cache_so_that_the_continuation_is_the_same(network: nn.Module) -> None:
    def hook(state: GenerationState) -> None:
        if state.step in (3, 6):
            state.rewind(1, len(state.generated[1]) if state.step == 3 else 2)

    settings = {"max_new_tokens": 9, "ignore_eos": True, "logprobs": True}
    prompts = ["abcdefg", "hello"]
    plain = generate(network, BYTES, prompts, **settings)  # type: ignore[arg-type]
    done = generate(network, BYTES, prompts, on_token=hook, **settings)  # type: ignore[arg-type]
    for a, b in zip(plain, done, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_hook_may_edit_the_cache(network: nn.Module) -> None:
    """Copying one row's keys and values over another's makes it go on as the first does."""

    def hook(state: GenerationState) -> None:
        if state.step == 0:
            state.cache.select(torch.tensor([0, 0]))
            state.next_ids[1] = state.next_ids[0]

    done = generate(
        network, BYTES, ["abc", "xyz"], max_new_tokens=6, ignore_eos=True, on_token=hook
    )
    assert done[0].token_ids == done[1].token_ids


def test_bad_settings_are_one_line_errors(network: nn.Module) -> None:
    cases = {
        "max_new_tokens": {"max_new_tokens": 0},
        "temperature": {"temperature": -1.0},
        "top-p": {"top_p": 0.0},
        "top-k": {"top_k": 0},
        "stop": {"stop": [""]},
    }
    for word, settings in cases.items():
        with pytest.raises(ConfigError, match=word) as caught:
            generate(network, BYTES, ["a"], **settings)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert generate(network, BYTES, []) == []


def test_training_mode_is_given_back(network: nn.Module) -> None:
    network.train()
    generate(network, BYTES, ["a"], max_new_tokens=1)
    assert network.training
    network.eval()
