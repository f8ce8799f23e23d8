"""Generated text as it is shown: characters stay whole, borders are counted, and a stream takes nothing back."""

from __future__ import annotations

from typing import Any

import pytest
from test_blt_cache import networks_of, with_rule
from weft.models.blt.generation import BLTGenerator
from weft.trainer.data.vocabulary import ByteVocabulary
from weft.trainer.generated_text import TextStream, held_back, text_with_borders
from weft.trainer.generation import generate

BYTES = ByteVocabulary()


def ids_of(text: str) -> list[int]:
    return [1, *BYTES.encode(text).tolist()]


def test_borders_stand_between_patches_and_before_a_character_they_cut() -> None:
    assert text_with_borders(BYTES, ids_of("ab cd"), [0, 1, 4], 5) == "ab |cd"
    assert text_with_borders(BYTES, ids_of("xéy"), [0, 1, 3, 4], 3) == "x|é|y"
    assert text_with_borders(BYTES, ids_of("xéy"), [0, 1, 2, 3], 3) == "x||éy"
    assert text_with_borders(BYTES, ids_of("ab cd"), [0, 1, 4], 3) == "ab "
    assert text_with_borders(BYTES, [*ids_of("a"), 4 + 0xC3], [0, 1, 2], 2) == "a|"
    assert text_with_borders(BYTES, [*ids_of("a"), 2], [0, 1, 2], 1) == "a"


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert held_back("one two", ["two\n"]) == 3
    assert held_back("one", ["x"]) == 0
    assert held_back("aab", ["aabaa", "bc"]) == 3
    assert held_back("", ["ab"]) == 0
    assert held_back("ab", []) == 0


@pytest.mark.parametrize("with_borders", [False, True])
def test_a_stream_adds_up_to_the_completion(with_borders: bool) -> None:
    """With untrained weights every byte comes, so that most characters are broken ones."""
    model: Any = networks_of(with_rule("space"))["model"]
    pieces: list[str] = []
    stream = TextStream(pieces.append, BYTES, ["zz"], with_borders=with_borders)
    settings: dict[str, Any] = {"max_new_tokens": 80, "temperature": 1.0, "ignore_eos": True}
    (done,) = generate(BLTGenerator(model), BYTES, ["naïve ab"], on_token=stream, **settings)
    assert len(pieces) > 10
    stream.finish(done)
    whole = "".join(pieces)
    assert done.patch_starts is not None
    assert whole.encode().decode() == whole
    if with_borders:
        ids = [*done.prompt_ids, *done.token_ids]
        assert whole == text_with_borders(BYTES, ids, done.patch_starts, len("naïve ab" + done.text))  # fmt: skip
        assert whole.startswith("na|ïve| ab") or whole.startswith("na|ïve |ab")
    else:
        assert whole == done.text
