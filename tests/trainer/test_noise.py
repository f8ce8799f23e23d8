"""Noise on text: what each kind does, that it is the same everywhere, and what it does to a run's scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import write_recipe
from weft.models.errors import ConfigError
from weft.trainer.configuration.load import load_config
from weft.trainer.noise import KINDS, Noise, noises
from weft.trainer.run_evaluation import evaluate_noise, evaluate_run, open_for_noise
from weft.trainer.train import train
from weft.trainer.trained import open_trained

TEXT = ("The quick brown fox, Straße 12, ends here.\n" * 200).encode()
BROKEN = b"ab\xff\xc3(\xe2\x82 cd"


def apply(kind: str, level: float | None = None, text: bytes = TEXT, seed: int = 0) -> bytes:
    (noise,) = noises(kind, level, seed=seed)
    return noise(text)


def test_kinds_that_touch_every_character() -> None:
    assert apply("upper", text="aé Ab\n".encode()) == "AÉ AB\n".encode()
    assert apply("antspeak", text="aé b".encode()) == "A É   B".encode()


def test_drop_leaves_the_rest_in_order() -> None:
    before, after = TEXT.decode(), apply("drop").decode()
    assert len(after) == pytest.approx(0.9 * len(before), rel=0.02)
    rest = iter(before)
    assert all(character in rest for character in after)
    assert apply("drop", 0) == TEXT
    assert apply("drop", 1) == b""


def test_repeat_writes_up_to_so_many_copies_more() -> None:
    text = b"abcdefgh" * 1000
    after = apply("repeat", text=text).decode()
    runs = [len(part) for part in _runs(after)]
    assert len(runs) == len(text)
    assert set(runs) == {1, 2, 3, 4, 5}
    touched = sum(length > 1 for length in runs) / len(runs)
    assert touched == pytest.approx(0.2, abs=0.02)
    assert {len(part) for part in _runs(Noise("repeat", 1.0, max_repeats=1)(text).decode())} == {2}


def _runs(text: str) -> list[str]:
    parts = [text[0]]
    for character in text[1:]:
        if character == parts[-1][0]:
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def test_random_case_changes_case_alone() -> None:
    text = b"abcdefghij" * 500
    after = apply("random-case", text=text)
    assert after.lower() == text
    assert sum(map(str.isupper, after.decode())) == pytest.approx(2500, abs=150)
    assert apply("random-case", 1, text) == text.upper()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_and_the_document_decide_and_any_bytes_will_do(kind: str) -> None:
    assert apply(kind) == apply(kind)
    if KINDS[kind] is not None:
        assert apply(kind) != apply(kind, seed=1)
        # Another document draws anew: no common prefix of what is drawn.
        assert apply(kind, text=TEXT + b"x")[: len(TEXT) // 2] != apply(kind)[: len(TEXT) // 2]
    assert apply(kind, text=b"") == b""
    broken = apply(kind, text=BROKEN)
    assert set(broken.lower()) <= set(BROKEN) | {0x20}


def test_bytes_that_are_no_utf8_are_kept_by_what_changes_case() -> None:
    assert apply("upper", text=BROKEN) == b"AB\xff\xc3(\xe2\x82 CD"


def test_all_is_every_kind_at_the_papers_level() -> None:
    assert {noise.kind: noise.level for noise in noises("all")} == KINDS


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("all", 0.5, "takes no level"),
        ("upper", 0.5, "takes no level"),
        ("drop", 1.5, "expected a share"),
        ("louder", None, "there is no noise"),
    ],
)
def test_a_level_that_makes_no_sense_is_one_line(
    kind: str, level: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        noises(kind, level)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    recipe = write_recipe(folder, train__steps=20)
    train(load_config(str(recipe), [], folder).config)
    return folder / "run"


def test_scores_before_and_after(run: Path) -> None:
    plain = evaluate_run(run)
    with open_for_noise(run) as trained:
        found = evaluate_noise(trained, [Noise("drop", 0.0), *noises("upper"), *noises("antspeak")])
    assert found["clean"] == {"sources": plain["sources"], "total": plain["total"]}
    nothing, upper, ants = (found["noise"][kind] for kind in ("drop", "upper", "antspeak"))
    assert {
        **plain["total"],
        "bits_per_clean_byte": plain["total"]["bits_per_byte"],
    } == pytest.approx(nothing["total"])
    assert upper["total"]["bytes"] == plain["total"]["bytes"]
    assert upper["sources"]["tales"]["bits_per_byte"] > plain["sources"]["tales"]["bits_per_byte"]
    # Sums have no letters.
    assert upper["sources"]["sums"]["bits_per_byte"] == plain["sources"]["sums"]["bits_per_byte"]
    documents = len(plain["sources"])
    assert ants["total"]["bytes"] == 2 * plain["total"]["bytes"] - documents
    bits = ants["total"]["bits_per_byte"] * ants["total"]["bytes"]
    assert ants["total"]["bits_per_clean_byte"] == pytest.approx(bits / plain["total"]["bytes"])
    written = json.loads((run / "eval" / "step_00000020_noise.json").read_text())
    assert written == found
    assert (run / "eval" / "step_00000020.json").is_file()


def test_part_of_the_documents_is_the_same_part_before_and_after(run: Path) -> None:
    overrides = ["eval.max_tokens=100"]
    with open_for_noise(run, overrides=overrides) as trained:
        found = evaluate_noise(trained, noises("antspeak"), overrides)
    # 100 ids of each source: BOS and 99 bytes, closed by an EOS of its own.
    assert found["clean"]["total"]["bytes"] == 2 * 99
    assert found["noise"]["antspeak"]["total"]["bytes"] == 2 * (2 * 99 - 1)


PATCHES = {
    "family": "blt",
    "window": 16,
    "patching": {"scheme": "space", "max_patches": 10, "overflow": "merge"},
    "ngram": None,
    "encoder": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24},
    "latent": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24},
    "decoder": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24},
}


def test_every_patch_that_noise_makes_has_room(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=4)
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "model": PATCHES}))
    train(load_config(str(recipe), [], tmp_path).config)
    lost = []
    for opened in (open_trained(tmp_path / "run"), open_for_noise(tmp_path / "run")):
        with opened as trained:
            found = evaluate_noise(trained, noises("antspeak"))
        lost.append(found["noise"]["antspeak"]["total"]["patch_overflow"])
    assert lost[0] > 0
    assert lost[1] == 0


def test_stored_patches_do_not_fit_noise(tmp_path: Path) -> None:
    patching = {"scheme": "space", "stored": True}
    config = {"model": {**PATCHES, "patching": patching}, "train": {"steps": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"model\.patching\.stored=false"):
        open_for_noise(tmp_path)
