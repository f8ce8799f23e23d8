"""The transformer against transformers' Olmo2 and Llama, and against itself packed, cached, chunked and in parts."""

from __future__ import annotations

import pytest
import torch
from packing import packed
from torch import nn

from weft.models import build_model, build_task
from weft.models.initialise import fill_range
from weft.models.task import InitSpec
from weft.models.transformer.cache import KVCache
from weft.models.transformer.config import Config, NgramConfig, RopeScalingConfig
from weft.models.transformer.hugging_face import to_hugging_face_name

TINY = dict(vocab_size=64, n_layers=2, d_model=32, n_heads=4, d_ff=48, init_std=0.2)
NGRAMS = NgramConfig(sizes=(2, 3, 5), rows=97, init_std=0.3)


def peer(config: Config, model: nn.Module) -> nn.Module:
    """transformers' model of the same shape holding the same weights."""
    import transformers

    common = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=False,
        max_position_embeddings=131072,
        pad_token_id=None,
    )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        s = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    kind = "Olmo2" if config.norm == "reordered" else "Llama"
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**common, rope_parameters=rope, attn_implementation="eager")
    )
    weights = {to_hugging_face_name(name, config): p for name, p in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    return theirs.eval()


CASES = {
    "olmo2": Config(**TINY),
    "olmo2 gqa": Config(**TINY, n_kv_heads=2),
    "llama": Config(**TINY, norm="pre", qk_norm="none", norm_eps=1e-5),
    "llama3 gqa stretched tied": Config(
        **TINY,
        norm="pre",
        qk_norm="none",
        n_kv_heads=2,
        tie_embeddings=True,
        rope_theta=10000.0,
        rope_scaling=RopeScalingConfig(original_max_positions=32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    config = CASES[name]
    model = build_model(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    tokens = torch.randint(0, 64, (96,))
    with torch.no_grad():
        ours = model(packed(tokens, [96], 96), output="logits")
        theirs = peer(config, model)(tokens[None]).logits[0]
    assert ours.abs().max() > 2
    assert (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("ngram", [None, NGRAMS])
def test_packed_documents_equal_each_alone(backend: str, ngram: NgramConfig | None) -> None:
    model = build_model(Config(**TINY, n_kv_heads=2, attention=backend, ngram=ngram))
    lengths = [16, 1, 7, 8, 11, 5]
    tokens = torch.randint(0, 64, (48,))
    with torch.no_grad():
        together = model(packed(tokens, lengths, 16), output="logits")
        alone = [
            model(packed(piece, [len(piece)], len(piece)), output="logits") for piece in tokens.split(lengths)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5)


def test_nothing_of_one_document_reaches_another() -> None:
    model = build_model(Config(**TINY, ngram=NGRAMS))
    lengths, tokens = [10, 22], torch.randint(1, 64, (32,))
    tokens[:10] = 63
    tokens[10:] = torch.randint(1, 63, (22,))
    with torch.no_grad():
        before = model(packed(tokens, lengths, 32), output="logits")
        model.embedding.tokens.weight[63] = 100.0
        after = model(packed(tokens, lengths, 32), output="logits")
    assert not torch.equal(before[:10], after[:10])
    assert torch.equal(before[10:], after[10:])


@pytest.mark.parametrize("ngram", [None, NGRAMS])
def test_cached_forward_equals_full_with_ragged_prompts(ngram: NgramConfig | None) -> None:
    config = Config(**TINY, n_kv_heads=2, ngram=ngram)
    model = build_model(config)
    sequences = [torch.randint(0, 64, (n,)) for n in (9, 4, 1)]
    prompts = [s[: max(1, len(s) - 3)] for s in sequences]
    counts = torch.tensor([len(p) for p in prompts])
    padded = torch.zeros(3, int(counts.max()), dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = KVCache(config, 3, 16)
    with torch.no_grad():
        logits = model.forward_cached(padded, cache, counts)
        collected = [[*logits[i, :n]] for i, n in enumerate(counts)]
        for step in range(3):
            ids = torch.stack([s[min(len(p) + step, len(s) - 1)] for s, p in zip(sequences, prompts, strict=True)])
            logits = model.forward_cached(ids[:, None], cache)
            for i in range(3):
                collected[i].append(logits[i, 0])
        for i, s in enumerate(sequences):
            full = model(packed(s, [len(s)], len(s)), output="logits")
            torch.testing.assert_close(torch.stack(collected[i])[: len(s)], full, atol=2e-5, rtol=1e-5)


PUBLISHED = {
    1_484_916_736: dict(n_layers=16, d_model=2048, n_heads=16, d_ff=8192),
    7_298_617_344: dict(n_layers=32, d_model=4096, n_heads=32, d_ff=11008),
    13_716_198_400: dict(n_layers=40, d_model=5120, n_heads=40, d_ff=13824),
    32_234_279_936: dict(n_layers=64, d_model=5120, n_heads=40, n_kv_heads=8, d_ff=27648),
}


@pytest.mark.parametrize("count", PUBLISHED)
def test_parameter_counts_are_the_published_ones(count: int) -> None:
    config = Config(**PUBLISHED[count])
    with torch.device("meta"):
        network = build_task(config).build_networks()["model"]
    assert sum(p.numel() for p in network.parameters()) == count
    assert sum(config.count_parameters().values()) == count


def test_groups_hold_every_parameter_once_and_decay_all_but_the_embedding() -> None:
    task = build_task(Config(**TINY, ngram=NGRAMS))
    networks = task.build_networks()
    groups = task.parameter_groups(networks)
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(f"model/{n}" for n, _ in networks["model"].named_parameters())
    undecayed = {name for group in groups if not group.weight_decay for name in group.parameters}
    assert undecayed == {"model/embedding.tokens.weight", "model/embedding.ngrams.weight"}


def test_loss_terms_and_chunks() -> None:
    config = Config(**TINY)
    model, tokens = build_model(config), torch.randint(0, 64, (32,))
    batch = packed(tokens, [20, 12], 32)
    sums = model(batch)
    logits = model(batch, output="logits").detach().double()
    kept = batch.targets >= 0
    expected = nn.functional.cross_entropy(logits[kept], batch.targets[kept], reduction="sum")
    assert sums["cross_entropy"].double() == pytest.approx(expected.item(), rel=1e-6)
    assert sums["z_loss"].item() == pytest.approx((logits[kept].logsumexp(-1) ** 2).sum().item(), rel=1e-6)
    (sums["cross_entropy"] + 0.1 * sums["z_loss"]).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chunked = build_model(config.model_copy(update={"loss_chunk_tokens": 7}))
    sums = chunked(batch)
    (sums["cross_entropy"] + 0.1 * sums["z_loss"]).backward()
    for name, p in chunked.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], atol=2e-5, rtol=1e-4)


def test_ngram_gradient_is_sparse_and_equals_dense() -> None:
    model, tokens = build_model(Config(**TINY, ngram=NGRAMS)), torch.randint(0, 64, (32,))
    batch = packed(tokens, [32], 32)
    model(batch)["cross_entropy"].backward()
    table = model.embedding.ngrams.weight
    assert table.grad.is_sparse
    sparse = table.grad.to_dense()
    rows = sparse.abs().sum(1).nonzero()[:3, 0]
    base = table.detach().clone()
    for row in rows:
        direction = torch.zeros_like(base)
        direction[row] = torch.randn(base.shape[1])
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                table.copy_(base + sign * 1e-2 * direction)
                values.append(model(batch)["cross_entropy"].double().item())
        assert (values[0] - values[1]) / 2e-2 == pytest.approx((sparse * direction).sum().item(), rel=2e-2, abs=2e-2)


def test_start_values_do_not_depend_on_the_split() -> None:
    count = (1 << 18) + 1000
    spec = InitSpec(std=0.02, cut=3.0)
    whole = torch.empty(count)
    fill_range(whole, spec, seed=3, name="a")
    cut = [100, 1 << 18, (1 << 18) + 5]
    parts = [torch.empty(b - a) for a, b in zip([0, *cut], [*cut, count], strict=True)]
    for part, start in zip(parts, [0, *cut], strict=True):
        fill_range(part, spec, seed=3, name="a", start=start)
    assert torch.equal(torch.cat(parts), whole)
    assert whole.abs().max() <= 0.06
    assert whole.std().item() == pytest.approx(0.02 * 0.9866, rel=0.01)
    other = torch.empty(count)
    fill_range(other, spec, seed=3, name="b")
    assert not torch.equal(other, whole)


def test_bf16_and_compiled_blocks_stay_close() -> None:
    model, tokens = build_model(Config(**{**TINY, "init_std": 0.1})), torch.randint(0, 64, (32,))
    batch = packed(tokens, [20, 12], 32)
    exact = model(batch)["cross_entropy"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch)["cross_entropy"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=2e-2)
