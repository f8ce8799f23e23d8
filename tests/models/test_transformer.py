"""The transformer against transformers' Olmo2, Llama and Qwen3, and itself packed and chunked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import packed
from torch import nn
from weft.models import build_model
from weft.models.errors import ConfigError
from weft.models.transformer.config import Config, NgramConfig, RopeScalingConfig
from weft.models.transformer.hugging_face import to_hugging_face_name

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

TINY = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48, "init_std": 0.2}
NGRAMS = NgramConfig(sizes=(2, 3, 5), rows=97, init_std=0.3)


def peer(config: Config, model: nn.Module) -> nn.Module:
    """transformers' model of the same shape holding the same weights."""
    import transformers

    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "max_position_embeddings": 131072,
        "pad_token_id": None,
    }
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
    if config.qk_norm == "head":
        kind, common = "Qwen3", common | {"head_dim": config.head_width}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            **common, rope_parameters=rope, attn_implementation="eager"
        )
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
    "qwen3": Config(**TINY, norm="pre", qk_norm="head", n_kv_heads=2, head_dim=12),
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
    assert 2 < ours.abs().max() < 20
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
            model(packed(piece, [len(piece)], len(piece)), output="logits")
            for piece in tokens.split(lengths)
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


def test_loss_terms_and_chunks() -> None:
    config = Config(**TINY)
    model, tokens = build_model(config), torch.randint(0, 64, (32,))
    batch = packed(tokens, [20, 12], 32)
    sums = model(batch)
    logits = model(batch, output="logits").detach().double()
    kept = batch.targets >= 0
    expected = nn.functional.cross_entropy(logits[kept], batch.targets[kept], reduction="sum")
    assert sums["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums["z_loss"].item() == pytest.approx(
        (logits[kept].logsumexp(-1) ** 2).sum().item(), rel=1e-6
    )
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
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(
            (sparse * direction).sum().item(), rel=2e-2, abs=2e-2
        )


def test_all_gradients_equal_finite_differences() -> None:
    config = Config(**TINY, n_kv_heads=2, ngram=NGRAMS, loss_chunk_tokens=5)
    model = build_model(config).double()
    batch = packed(torch.randint(0, 64, (24,)), [5, 7, 12], 12)

    def objective() -> torch.Tensor:
        sums = model(batch)
        return sums["cross_entropy"] + 0.1 * sums["z_loss"]

    objective().backward()
    for name, parameter in model.named_parameters():
        direction, base = torch.randn_like(parameter), parameter.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(base + sign * 1e-6 * direction)
                values.append(objective().item())
        with torch.no_grad():
            parameter.copy_(base)
        slope = (parameter.grad.to_dense() * direction).sum().item()
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-5), name


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_losses_do_not_depend_on_the_packing(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    model = build_model(Config(**TINY, ngram=NGRAMS))
    pieces = [torch.randint(0, 64, (n,)) for n in lengths]
    with torch.no_grad():
        together = model(packed(torch.cat(pieces), lengths, sum(lengths)))
        order = data.draw(st.permutations(range(len(lengths))))
        shuffled = model(
            packed(torch.cat([pieces[i] for i in order]), [lengths[i] for i in order], sum(lengths))
        )
        alone = [model(packed(piece, [len(piece)], len(piece))) for piece in pieces]
    for term, total in together.items():
        expected = sum(losses[term].item() for losses in alone)
        assert total.item() == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert shuffled[term].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("resets", [True, False])
def test_ngrams_cross_documents_only_where_asked_and_rows_never(resets: bool) -> None:
    ngram = NGRAMS.model_copy(update={"reset_at_documents": resets})
    model = build_model(Config(**TINY, ngram=ngram))
    tokens = torch.randint(1, 32, (24,))
    changed = tokens.clone()
    changed[[5, 11]] = 40  # the last of a document inside a row, and the last of the first row
    with torch.no_grad():
        before, after = (
            model(packed(ids, [6, 6, 12], 12), output="logits") for ids in (tokens, changed)
        )
    is_same = (before == after).all(1)
    assert is_same[6].item() is resets
    assert is_same[12:].all()
    assert not is_same[5]


def test_learns_a_sequence_by_heart() -> None:
    model = build_model(Config(**{**TINY, "init_std": 0.05}))
    batch = packed(torch.randint(0, 64, (64,)), [40, 24], 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch)["cross_entropy"] / batch.target_count
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_attention_that_cannot_run_here_is_a_user_error() -> None:
    batch = packed(torch.randint(0, 64, (16,)), [16], 16)
    for backend, message in (("varlen", "needs CUDA"), ("flex", "no gradient on the CPU")):
        with pytest.raises(ConfigError, match=f"model.attention={backend}: .*{message}.*use auto"):
            build_model(Config(**TINY, attention=backend))(batch)
