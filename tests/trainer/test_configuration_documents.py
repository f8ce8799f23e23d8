"""Strict YAML: what scalars mean, where errors point, and that what is written reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weft.models.errors import ConfigError
from weft.trainer.configuration.documents import (
    dump_value,
    dump_yaml,
    parse_value,
    read_document,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E3", -2500.0),
        ("5e5", 5e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("65_536", 65536),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-01-31", "2026-01-31"),
        ("12:30", "12:30"),
        ("", None),
        ("~", None),
        ("null", None),
        ("'1e-4'", "1e-4"),
        ("1e-4x", "1e-4x"),
        ("[1, a, [2]]", [1, "a", [2]]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "expected ',' or ']'"),
        ("a:\n  b: 1\n\tc: 2\n", 3, "cannot start any token"),
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 2\n", 3, "key 'b' is given twice"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", 2, "tag"),
        ("a: 1\nb: !!python/name:os.system x\n", 2, "tag"),
        ("a: &x\n  b: *x\n", 1, "contains itself"),
        ("a: 1\n? [b]\n: 2\n", 2, "a key must be a word"),
        ("a: 1\n---\nb: 2\n", 2, "document"),
        ("a: !!int many\n", 1, "does not fit"),
        ("- a\n- b\n", 1, "expected sections"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, line: int, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert problem in message
    assert "\n" not in message


def test_aliases_cannot_multiply_without_end(tmp_path: Path) -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(levels))
    with pytest.raises(ConfigError, match="aliases multiply"):
        read_document(path)


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml: No such file"):
        read_document(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        read_document(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_document(binary)
    control = tmp_path / "control.yaml"
    control.write_bytes(b"a: \x01\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_document(control)


def test_lines_of_nested_and_listed_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "# a comment\na:\n  b: 1\n\n  c:\n    - d: 1\n      e: 2\n    - d: 3\nf: {g: 1, h: 2}\n"
    )
    lines = read_document(path).lines
    expected = {"a": 2, "a.b": 3, "a.c": 5, "a.c.0.d": 6, "a.c.0.e": 7, "a.c.1.d": 8, "f.h": 9}
    assert {key: lines[key] for key in expected} == expected


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert read_document(path).data == {}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Co", "Cn")))
    | st.sampled_from(
        ["1e-4", "yes", "on", "010", "0o7", "1_0", "12:30", "2026-01-31", "~", "a\nb", " "]
    )
)


@given(SCALARS | st.lists(SCALARS, max_size=4))
def test_values_read_back_as_written(value: Any) -> None:
    text = dump_value(value)
    assert "\n" not in text
    assert parse_value(text) == value


@given(
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_documents_read_back_as_written(value: Any) -> None:
    assert parse_value(dump_yaml(value)) == value
