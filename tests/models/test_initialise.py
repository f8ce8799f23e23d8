"""Start values: the same however a parameter is cut, distinct by name and seed, of known spread."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weft.models import build_model, build_task
from weft.models.initialise import BLOCK, fill_range
from weft.models.task import InitSpec
from weft.models.transformer.config import Config, NgramConfig

COUNT = 2 * BLOCK + 1000


def whole(spec: InitSpec, seed: int = 3, name: str = "a") -> torch.Tensor:
    out = torch.empty(COUNT)
    fill_range(out, spec, seed=seed, name=name)
    return out


KINDS = ["trunc_normal", "normal", "uniform", "log_counting", "softplus_inverse_log_uniform"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(1, COUNT - 1), min_size=1, max_size=3, unique=True))
def test_any_split_gives_the_same_values(kind: str, cuts: list[int]) -> None:
    spec = InitSpec(kind, std=0.02, period=7)  # type: ignore[arg-type]
    borders = [0, *sorted(cuts), COUNT]
    parts = []
    for start, stop in itertools.pairwise(borders):
        parts.append(torch.empty(stop - start))
        fill_range(parts[-1], spec, seed=3, name="a", start=start)
    assert torch.equal(torch.cat(parts), whole(spec))


def test_truncated_normal_has_its_spread_and_cut() -> None:
    values = whole(InitSpec("trunc_normal", std=0.02, cut=3.0))
    assert 0.0599 < values.abs().max() <= 0.06
    # A standard normal cut at 3 has a standard deviation of 0.98658.
    assert values.std().item() == pytest.approx(0.02 * 0.98658, rel=3e-3)
    assert abs(values.mean().item()) < 1e-4
    assert whole(InitSpec("trunc_normal", std=0.5, cut=1.0)).abs().max() <= 0.5


def test_steps_are_log_uniform_behind_softplus_and_counting_repeats() -> None:
    spec = InitSpec("softplus_inverse_log_uniform", low=1e-3, high=0.1, floor=2e-3)
    steps = torch.nn.functional.softplus(whole(spec).double())
    assert 1.999e-3 < steps.min() < 2.001e-3
    assert 0.0999 < steps.max() < 0.1001
    share = (steps > 1e-2).double().mean()
    assert share.item() == pytest.approx(0.5, abs=5e-3)
    counted = whole(InitSpec("log_counting", period=4))[:8].exp()
    torch.testing.assert_close(counted, torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4]))


def test_seed_name_and_block_all_matter() -> None:
    base = whole(InitSpec())
    assert not torch.equal(base, whole(InitSpec(), seed=4))
    assert not torch.equal(base, whole(InitSpec(), name="b"))
    assert not torch.equal(base[:BLOCK], base[BLOCK : 2 * BLOCK])


def test_a_model_starts_as_the_paper_says() -> None:
    config = Config(
        vocab_size=512, n_layers=1, d_model=64, n_heads=4, d_ff=256, ngram=NgramConfig(rows=100)
    )
    model = build_model(config, seed=0)
    task = build_task(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        std = 1 / 8 if "ngrams" in name else 0.02
        assert parameter.abs().max() <= 3 * std, name
        assert parameter.std().item() == pytest.approx(0.98658 * std, rel=0.03), name
        assert task.init_spec(f"model/{name}").std == std
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), build_model(config, seed=0).parameters(), strict=True)
    )
