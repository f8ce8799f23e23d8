"""The reference of keys: read off the fields, complete, and the page in docs/ up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field
from weft.models.errors import ConfigError
from weft.models.section import Section
from weft.trainer.configuration.keys import find_key, nearest_key, walk_keys
from weft.trainer.configuration.reference import keys_under, render_markdown, update_page
from weft.trainer.configuration.schema import TrainingConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


class Inner(Section):
    """Things."""

    size: int = Field(..., ge=1, le=9, description="how big")


class Outer(Section):
    """More things."""

    items: tuple[Inner, ...] = Field((), description="several")
    maybe: Inner | None = Field(None, description="one or none")
    mode: Literal["fast", "slow"] = Field("fast", description="a choice")
    pair: tuple[float, float] = Field((0.5, 1e-9), description="two")
    rate: float | None = Field(None, gt=0, description="a rate")


def test_keys_types_and_defaults() -> None:
    found = {key.name: (key.type_text, key.default_text) for key in walk_keys(Outer)}
    assert found == {
        "items": ("list of sections", "[]"),
        "items.N.size": ("integer >= 1 and <= 9", "required"),
        "maybe": ("section or null", "null"),
        "maybe.size": ("integer >= 1 and <= 9", "required"),
        "mode": ("fast | slow", "fast"),
        "pair": ("pair of numbers", "[0.5, 1.0e-09]"),
        "rate": ("number > 0 or null", "null"),
    }


def test_keys_are_found_by_index() -> None:
    key = find_key(Outer, "items.3.size")
    assert key is not None
    assert key.description == "how big"
    assert find_key(Outer, "items.size") is None


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("items.4.sizes", "did you mean items.4.size?"),
        ("mod", "did you mean mode?"),
        ("x.rate", "did you mean rate?"),
        ("maybe.qqqqqq", "maybe has size"),
        ("qqq", "a recipe has items, maybe, mode, pair, rate"),
    ],
)
def test_hints(given: str, hint: str) -> None:
    assert nearest_key(Outer, given) == hint


def test_every_key_has_a_description() -> None:
    bare = [key.name for key in keys_under("") if not key.description]
    assert bare == []


def test_prefixes() -> None:
    assert [key.name for key in keys_under("train.steps")] == ["train.steps"]
    assert {key.name.split(".")[0] for key in keys_under("schedule")} == {"schedule"}
    assert {key.name.split(".")[0] for key in keys_under("")} == set(TrainingConfig.model_fields)
    with pytest.raises(
        ConfigError, match=r"no key begins with 'train\.stepz'; did you mean train\.steps\?"
    ):
        keys_under("train.stepz")


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert update_page(text) == text, "run `make docs`"


def test_tables_have_four_cells_a_row() -> None:
    rows = [line for line in render_markdown().splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks the marks"):
        update_page("# nothing\n")
