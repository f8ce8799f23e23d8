"""Complexity of images: what scorers say, thresholds, sidecars, and the ratios they lead to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_images_data import LEVELS, open_set, prepare, write_tars
from weft.models.errors import ConfigError, DataError
from weft.trainer.data.images.builtin import load_photographs
from weft.trainer.data.images.config import RatiosConfig
from weft.trainer.data.images.llm_scorer import LanguageModelScorer, parse_score, read_captions
from weft.trainer.data.images.ratios import ratio_of_sample
from weft.trainer.data.images.scorers import (
    JPEGScorer,
    Picture,
    Scorer,
    _jpeg_bytes,
    jpeg_bits,
    residual,
)
from weft.trainer.data.images.scoring import ScoreOptions, finish_scores, score_shards
from weft.trainer.data.images.sidecar import (
    Thresholds,
    fit_thresholds,
    mean_tokens,
    read_sidecar,
    shares_for,
)
from weft.trainer.data.loader import PackedLoader

SHARES = ScoreOptions((2, 4, 8), (0.2, 0.3, 0.5), None, 1000)


def test_measures_on_known_photographs() -> None:
    """Values measured independently on scikit-learn's photographs at JPEG quality 75."""
    china, flower = load_photographs()
    flat = np.full((128, 128, 3), 128, np.uint8)
    cases = [
        (flat, 0.430, 0.0, 0.0, 0.0),
        (china[:128, :128], 0.683, 0.0084, 0.0137, 0.0249),
        (china[200:328, 200:328], 3.069, 0.1022, 0.1219, 0.1471),
        (flower[150:278, 250:378], 2.764, 0.0612, 0.0791, 0.0879),
    ]
    for pixels, bpp, *residuals in cases:
        assert 8 * _jpeg_bytes(pixels) / 128**2 == pytest.approx(bpp, abs=0.02)
        assert jpeg_bits(pixels) == pytest.approx(bpp - 0.430, abs=0.02)
        found = [residual(pixels, block) for block in (8, 16, 32)]
        assert found == pytest.approx(residuals, abs=2e-4)


def test_shares_follow_from_the_wanted_tokens() -> None:
    shares = shares_for((8, 16, 32), 0.82, 0.05)
    assert shares == pytest.approx((0.05, 0.51, 0.44))
    assert mean_tokens((8, 16, 32), shares) == pytest.approx(0.82)
    assert shares_for((2, 4, 8), 1.0, 0.05) == pytest.approx((0.05, 0.75, 0.2))
    with pytest.raises(
        ConfigError, match=r"T=2 cannot be had .* set --finest-share between 0.333 and 0.467"
    ):
        shares_for((8, 16, 32), 2.0, 0.05)


def test_thresholds_at_their_borders() -> None:
    found = fit_thresholds(np.arange(1.0, 11.0), (0.2, 0.3, 0.5))
    assert found.borders == (5.0, 8.0)
    assert [found.place_of(s) for s in (1, 5, 5.01, 8, 8.01, None)] == [2, 2, 1, 1, 0, 1]
    assert fit_thresholds(np.arange(4.0), (0.5, 0.5, 0.0)).borders == (-np.inf, 1.0)
    assert [Thresholds((3, 6)).place_of(s) for s in range(1, 10)] == [2, 2, 2, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7), (" 7.\n", 7), ("Rating: 7", 7), ("The answer is 3!", 3),
        ("7 or 8", None), ("10", None), ("0", None), ("-3", None), ("7.5", None), ("7/10", None), ("", None), ("high", None),
    ],
)  # fmt: skip
def test_answers_are_never_bent(answer: str, score: int | None) -> None:
    assert parse_score(answer) == score


def test_scores_stop_go_on_and_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    prepare(write_tars(tmp_path / "tars", images=80), source)
    scorer = JPEGScorer(16)
    done: list[int] = []

    class Stops(Exception):
        pass

    def stop_late(images: int) -> None:
        done.append(images)
        if sum(done) > 100:
            raise Stops

    with pytest.raises(Stops):
        score_shards(scorer, source, tmp_path / "one", advance=stop_late)
    assert finish_scores(scorer, source, tmp_path / "one", SHARES) is None
    score_shards(scorer, source, tmp_path / "one", threads=2)
    whole = finish_scores(scorer, source, tmp_path / "one", SHARES)
    for k in (1, 0):
        score_shards(scorer, source, tmp_path / "two", part=(k, 2))
    parts = finish_scores(scorer, source, tmp_path / "two", SHARES)
    assert whole is not None
    assert whole == parts
    assert whole["shares"] == pytest.approx([0.2, 0.3, 0.5], abs=0.04)
    line = json.loads((tmp_path / "one" / "shard_00000.scores").read_text().splitlines()[0])
    assert set(line) == {"id", "sha256", "score", "ratio", "scorer", "version"}
    assert line["id"] == "0.tar/000"
    with pytest.raises(DataError, match="exists; give another --out"):
        score_shards(scorer, source, tmp_path / "one")


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, Path]:
    """A prepared source and its scores."""
    source, scores = tmp_path / "source", tmp_path / "scores"
    prepare(LEVELS, source)
    score_shards(JPEGScorer(16), source, scores)
    finish_scores(JPEGScorer(16), source, scores, SHARES)
    return source, scores


def test_images_are_trained_at_the_ratio_of_their_score(
    tmp_path: Path, scored: tuple[Path, Path]
) -> None:
    source, scores = scored
    config = {"values": [2, 4, 8], "scores": str(scores)}
    data = open_set(tmp_path, source, ratios=config)
    known = {}
    for line in (scores / "shard_00000.scores").read_text().splitlines():
        record = json.loads(line)
        known[bytes.fromhex(record["sha256"])] = [2, 4, 8].index(record["ratio"])
    with PackedLoader(data, seed=1, batch_rows=16) as loader:
        first = loader.next_step().micro_batches[0]
    rows, located = data.sources[0].train, data.order(1).locate(0, 16)
    expected = [known[rows[int(n)].sha256] for n in located.sequences]  # type: ignore[index, attr-defined]
    assert first.side["ratio"].tolist() == expected
    assert data.fingerprint["scores"]["identity"] == read_sidecar(scores).identity


def test_missing_scores_are_an_error_or_the_middle(
    tmp_path: Path, scored: tuple[Path, Path]
) -> None:
    config = {"values": [2, 4, 8], "scores": str(scored[1])}
    other = LEVELS + ",seed=3"
    with pytest.raises(
        DataError, match=r"images of source 's0' have no score in .*, such as s0: shape-"
    ):
        open_set(tmp_path, other, ratios=config)
    data = open_set(tmp_path, other, ratios=config | {"missing": "middle"})
    assert set(data.sources[0].train.ratios.tolist()) == {1}  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"has scores for ratios \[2, 4, 8\]"):
        open_set(tmp_path, scored[0], ratios=config | {"values": [1, 4, 8]})
    (scored[1] / "shard_00000.scores").write_text("")
    read_sidecar.__globals__["_read"].cache_clear()
    with pytest.raises(DataError, match="does not match its checksum"):
        open_set(tmp_path, scored[0], ratios=config)


def test_mixed_and_random_ratios_are_functions_of_the_sample() -> None:
    mixed = RatiosConfig(assignment="mixed", mix_share=0.25)
    found = [ratio_of_sample(mixed, lambda: 2, 7, sample) for sample in range(800)]
    assert found == [ratio_of_sample(mixed, lambda: 2, 7, sample) for sample in range(800)]
    shares = np.bincount(found, minlength=3) / 800
    assert shares == pytest.approx([0.125, 0.125, 0.75], abs=0.04)
    assert {ratio_of_sample(mixed, lambda: 2, None, sample) for sample in range(50)} == {2}
    random = RatiosConfig(assignment="random", shares=(0.1, 0.2, 0.7))
    drawn = [ratio_of_sample(random, lambda: 0, 7, sample) for sample in range(800)]
    assert np.bincount(drawn, minlength=3) / 800 == pytest.approx([0.1, 0.2, 0.7], abs=0.05)
    assert ratio_of_sample(RatiosConfig(fixed=32), lambda: 0, 7, 1) == 2


class Answers(LanguageModelScorer):
    """Gives answers that were written down, in order."""

    def __init__(self, *answers: list[str]) -> None:
        self.given, self.asked = list(answers), []  # type: ignore[var-annotated]
        self._captions = {}

    def answers(self, prompts):  # type: ignore[no-untyped-def]
        self.asked.append(list(prompts))
        return self.given.pop(0)


def words(caption: str | None) -> Picture:
    return Picture(f"image {caption}", b"", caption)


def test_an_answer_that_cannot_be_used_is_asked_for_once_more() -> None:
    scorer = Answers(["7", "about 4 or 5", "no"], ["4", "still no"])
    assert scorer.score([words("a"), words("b"), words("c")]) == [7, 4, None]
    assert [len(prompts) for prompts in scorer.asked] == [3, 2]
    assert "Image: b\n" in scorer.asked[1][0]
    with pytest.raises(DataError, match="has no caption to score; give --captions"):
        scorer.score([words(None)])


class Says(JPEGScorer):
    """Says nothing of some images."""

    def __init__(self, silent: int) -> None:
        super().__init__(16)
        self.silent = silent

    def score(self, pictures):  # type: ignore[no-untyped-def]
        numbers = [int(picture.id.split("-")[1]) for picture in pictures]
        return [None if number < self.silent else 5.0 for number in numbers]


@pytest.mark.parametrize("silent", [1, 3])
def test_few_missing_scores_are_flagged_and_many_refused(tmp_path: Path, silent: int) -> None:
    source, out = tmp_path / "source", tmp_path / "scores"
    prepare("builtin:shapes-images:size=16,images=200", source)
    options = ScoreOptions((8, 16, 32), None, (3, 6), 1)
    scorer: Scorer = Says(silent)
    score_shards(scorer, source, out)
    if silent > 2:
        with pytest.raises(DataError, match=r"3 of 200 images have no score, more than 1%"):
            finish_scores(scorer, source, out, options)
        return
    made = finish_scores(scorer, source, out, options)
    assert made is not None
    assert made["score_missing"] == 1
    first = json.loads((out / "shard_00000.scores").read_text().splitlines()[0])
    assert (first["score"], first["ratio"], first["score_missing"]) == (None, 16, True)


def test_a_local_model_is_asked(tmp_path: Path) -> None:
    """A tiny random one: it answers with something, which is read or not, but never guessed at."""
    tokenizers, transformers = (
        pytest.importorskip("tokenizers"),
        pytest.importorskip("transformers"),
    )
    vocabulary = ["<pad>", "<unk>", *map(str, range(1, 10)), "image", "a", "detail"]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=512,
        n_embd=8,
        n_layer=1,
        n_head=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    scorer = LanguageModelScorer(tmp_path, {"image a": "a detail"})
    first = scorer.score([words("a"), words("image 3")])
    assert first == scorer.score([words("a"), words("image 3")])
    assert all(score is None or 1 <= score <= 9 for score in first)
    assert len(scorer.identity["prompt_sha256"]) == len(scorer.identity["model_sha256"]) == 64
    with pytest.raises(DataError, match="holds no language model"):
        LanguageModelScorer(tmp_path / "none")


def test_captions_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"id": "a", "caption": "a cat"}\n\n{"id": "b", "caption": "two dogs"}\n')
    assert read_captions(path) == {"a": "a cat", "b": "two dogs"}
    path.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="line 1 is not"):
        read_captions(path)
