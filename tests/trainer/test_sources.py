"""Which files a source is, in which order, and how they are cut into units."""

from __future__ import annotations

from pathlib import Path

import pytest
from weft.models.errors import DataError
from weft.trainer.data.config import SourceConfig
from weft.trainer.data.sources import InputFile, Listing, list_inputs, plan_units


def source(path: Path | str, **rest: object) -> SourceConfig:
    return SourceConfig(name="s", path=str(path), **rest)  # type: ignore[arg-type]


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")
    return root


def names(config: SourceConfig) -> list[str]:
    return [file.name for file in list_inputs(config).files]


def test_folders_are_walked_in_the_order_of_paths(tmp_path: Path) -> None:
    make(
        tmp_path,
        "b.py",
        "a/z.txt",
        "a.txt",
        ".git/config",
        "a/.hidden",
        "a/__pycache__/x.pyc",
        "B.md",
    )
    assert names(source(tmp_path)) == ["B.md", "a.txt", "a/z.txt", "b.py"]
    assert names(source(tmp_path, extensions=(".py", "md"))) == ["B.md", "b.py"]
    assert list_inputs(source(tmp_path)).kind == "text"


def test_globs_and_single_files(tmp_path: Path) -> None:
    make(tmp_path, "x/1.txt", "y/2.txt", "y/3.md")
    assert names(source(tmp_path / "*" / "*.txt")) == ["x/1.txt", "y/2.txt"]
    assert names(source(tmp_path / "y" / "3.md")) == ["3.md"]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["a.jsonl", "b.jsonl.gz", "README.md"], "jsonl"),
        (["a.parquet"], "parquet"),
        (["a.npy", "a.csv.gz"], "tokens"),
        (["a.json", "b.py"], "text"),
    ],
)
def test_formats_are_told_by_names(tmp_path: Path, files: list[str], kind: str) -> None:
    listing = list_inputs(source(make(tmp_path, *files)))
    assert listing.kind == kind
    if kind != "text":
        assert all(
            file.name.startswith(("a", "b")) and not file.name.endswith((".md", ".csv.gz"))
            for file in listing.files
        )


def test_a_mixed_folder_asks_for_its_format(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.py")
    with pytest.raises(
        DataError,
        match=r"holds jsonl files and others such as b\.py; say which to read with format",
    ):
        list_inputs(source(tmp_path))
    assert names(source(tmp_path, format="jsonl")) == ["a.jsonl"]
    assert names(source(tmp_path, format="text")) == ["a.jsonl", "b.py"]


def test_missing_empty_and_broken_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; check data\.sources path"):
        list_inputs(source(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no text files with anything in them"):
        list_inputs(source(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"holds no text files ending in \.py"):
        list_inputs(source(make(tmp_path / "texts", "a.txt"), extensions=(".py",)))
    with pytest.raises(DataError, match=r"holds no text files"):
        list_inputs(source(tmp_path / "*.nothing"))
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot read .*link\.txt: No such file"):
        list_inputs(source(tmp_path / "link.txt"))
    with pytest.raises(DataError, match="no built-in corpus 'nothing'; there is python-stdlib"):
        list_inputs(source("builtin:nothing"))


def test_the_standard_library_is_about_700_files_without_tests() -> None:
    listing = list_inputs(source("builtin:python-stdlib"))
    found = [file.name for file in listing.files]
    assert 500 < len(found) < 1200
    assert found == sorted(found)
    assert "json/decoder.py" in found
    assert not any(
        part in name.split("/") for name in found for part in ("test", "tests", "site-packages")
    )


def test_units_cover_everything_once_whatever_the_format(tmp_path: Path) -> None:
    def files(*sizes: int) -> tuple[InputFile, ...]:
        return tuple(
            InputFile(f"/x/{i}.jsonl", f"{i}.jsonl", size, 0) for i, size in enumerate(sizes)
        )

    sizes = (3 << 20, 10, 0, 5 << 20)
    texts = plan_units(Listing("text", "t", files(*sizes)))
    assert [file for unit in texts for file in unit.files] == list(files(*sizes))
    assert sum(unit.size_bytes for unit in texts) == sum(sizes)
    parts = plan_units(Listing("jsonl", "t", files(*sizes)))
    covered = {
        file.name: [(u.start, u.stop) for u in parts if u.files == (file,)]
        for file in files(*sizes)
    }
    for file in files(*sizes):
        spans = covered[file.name]
        assert ([0, *(stop for _, stop in spans)][: len(spans)]) == [start for start, _ in spans]
        assert (spans[-1][1] if spans else 0) == file.size
    assert [unit.index for unit in parts] == list(range(len(parts)))
    assert len(parts) == 3 + 1 + 5
