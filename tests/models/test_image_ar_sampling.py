"""Images drawn code by code: the cache, guidance, filters, and independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from image_batches import code_batch
from test_image_ar_model import TINY, random_codes, random_model
from weft.models.class_labels import labels_of_samples
from weft.models.errors import ConfigError, DataError
from weft.models.image_ar.config import Config
from weft.models.image_ar.model import ImageCache
from weft.models.image_ar.sampling import CodeSampling, filter_logits, guide, sample_codes


@pytest.mark.parametrize("rotation", ["zero", "identity"])
def test_the_cache_gives_the_logits_of_the_whole(rotation: str) -> None:
    config = Config(**TINY, class_rotation=rotation)
    model = random_model(config)
    codes, labels = random_codes(3, config)
    cache = ImageCache(config, 3, "cpu", torch.float32)
    with torch.no_grad():
        whole = model(code_batch(codes, labels), labels, output="logits").view(3, 9, -1)
        steps = [model(ids, cache=cache) for ids in (labels, *codes[:, :-1].T)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_filters_are_the_table_of_the_specification() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0]])

    def kept(**settings: Any) -> list[int]:
        found = filter_logits(logits, CodeSampling(**settings))[0]
        return torch.nonzero(found > -math.inf).flatten().tolist()

    assert kept() == [0, 1, 2, 3, 4]
    # By threshold: a tie with the second largest stays.
    assert kept(top_k=2) == [0, 1, 2]
    assert kept(top_k=1) == [0]
    # Shares are .56, .21, .21, ... of what top-k leaves: .58, .21, .21.
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_k=2, top_p=0.99) == [0, 1, 2]
    assert kept(top_k=4, top_p=0.975) == [0, 1, 2, 3]
    # Temperature is first: flatter shares need more codes.
    assert kept(temperature=10.0, top_p=0.6) == [0, 1, 2]
    assert filter_logits(logits, CodeSampling(temperature=2.0))[0, 0] == 1.5
    shuffled = filter_logits(logits[:, [4, 0, 3, 1, 2]], CodeSampling(top_p=0.6))[0]
    assert torch.nonzero(shuffled > -math.inf).flatten().tolist() == [1, 3]


def test_guidance_moves_logits_away_from_those_without_a_class() -> None:
    conditional, without = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    assert guide(conditional, without, 1.0).tolist() == [[1.0, 2.0]]
    assert guide(conditional, without, 3.0).tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("guided_codes", [None, 4, 0])
def test_guided_codes_are_those_of_two_whole_forward_passes(guided_codes: int | None) -> None:
    """The likeliest code each time (top-k 1), found by running the whole image anew for every code."""
    config = Config(**TINY)
    model = random_model(config)
    labels = torch.tensor([1, 4])
    sampling = CodeSampling(guidance=2.5, top_k=1, guided_codes=guided_codes)
    found = sample_codes(model, labels, [0, 1], 0, sampling)
    codes = torch.zeros(2, 9, dtype=torch.int64)
    for place in range(9):
        with torch.no_grad():
            both = [
                model(code_batch(codes, given), given, output="logits").view(2, 9, -1)[:, place]
                for given in (labels, torch.full_like(labels, 5))
            ]
        is_guided = guided_codes is None or place < guided_codes
        logits = both[1] + 2.5 * (both[0] - both[1]) if is_guided else both[0]
        codes[:, place] = logits.argmax(-1)
    assert torch.equal(found, codes)


def test_an_image_does_not_depend_on_its_batch() -> None:
    config = Config(**TINY)
    model = random_model(config, std=0.1)
    indices = list(range(10, 18))
    labels = labels_of_samples(indices, 5, 0)
    sampling = CodeSampling(guidance=1.5, top_k=20)
    whole = sample_codes(model, labels, indices, 3, sampling)
    parts = [sample_codes(model, labels[i : i + 1], [indices[i]], 3, sampling) for i in (5, 2)]
    assert torch.equal(torch.cat(parts), whole[[5, 2]])
    again = sample_codes(model, labels[[2, 7, 5]], [12, 17, 15], 3, sampling)
    assert torch.equal(again, whole[[2, 7, 5]])
    assert not torch.equal(sample_codes(model, labels, indices, 4, sampling), whole)


def test_codes_follow_the_model_s_probabilities() -> None:
    """The first code of many images against the softmax of the class position."""
    config = Config(**{**TINY, "grid": 1, "codebook_size": 4})
    model = random_model(config)
    labels = torch.full((4000,), 2)
    with torch.no_grad():
        shares = model(labels[:1], cache=ImageCache(config, 1, "cpu", torch.float32)).softmax(-1)
    drawn = sample_codes(model, labels, list(range(4000)), 0).flatten()
    counted = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(counted, shares[0], rtol=0, atol=0.03)


def test_labels_of_samples() -> None:
    assert labels_of_samples([0, 1, 2, 3, 7], 3, 0).tolist() == [0, 1, 2, 0, 1]
    drawn = labels_of_samples(range(300), 3, 0, "random")
    assert torch.equal(drawn[100:110], labels_of_samples(range(100, 110), 3, 0, "random"))
    assert torch.bincount(drawn).min() > 70
    with pytest.raises(ConfigError, match="image -1"):
        labels_of_samples([-1], 3, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 0.5}, "below 1"),
        ({"temperature": 0.0}, "not positive"),
        ({"top_k": 0}, "keeps nothing"),
        ({"top_p": 0.0}, "not in"),
        ({"guided_codes": -1}, "negative"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodeSampling(**settings)


def test_labels_have_to_go_with_the_model_and_the_indices() -> None:
    model = random_model(Config(**TINY))
    with pytest.raises(DataError, match="class 5"):
        sample_codes(model, torch.tensor([5]), [0], 0)
    with pytest.raises(ConfigError, match="1 labels for 2 images"):
        sample_codes(model, torch.tensor([1]), [0, 1], 0)
