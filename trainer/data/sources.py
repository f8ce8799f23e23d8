"""From the path in a recipe to a list of input files, and to units of work over them.

The list is sorted and the units depend on the files alone, never on the number of workers, so the
same input always gives the same shards in the same order.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...models.errors import DataError
from .config import SourceConfig

__all__ = [
    "INTERLEAVED_KINDS",
    "InputFile",
    "Listing",
    "Unit",
    "distinct_names",
    "group_files",
    "is_prepared_source",
    "list_inputs",
    "plan_units",
    "stat_file",
    "walk_files",
]

SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 64 << 20
UNITS_AIMED_AT = 256
SMALLEST_INTERLEAVED_BYTES = 1 << 16
"""Of JSONL that names images: a line stands for much more than its own bytes."""
BUILTIN_DOCUMENT_BYTES = 1 << 10
BUILTIN_UNIT_DOCUMENTS = 4096

ENDINGS = {
    "jsonl": (
        ".jsonl",
        ".jsonl.gz",
        ".jsonl.zst",
        ".ndjson",
        ".ndjson.gz",
        ".json.gz",
        ".json.zst",
    ),
    "parquet": (".parquet",),
    "tokens": (".npy",),
    "webdataset": (".tar", ".tar.gz"),
}
ENDINGS["interleaved"] = ENDINGS["jsonl"]
INTERLEAVED_KINDS = ("interleaved", "webdataset", "builtin")
"""Documents of several modalities; `interleaved` has to be asked for, as its files are called what those of text are."""
# Files that lie beside data without being data; a folder of text takes them as text all the same.
COMPANIONS = (".csv", ".csv.gz", ".md", ".txt", ".json", ".yaml", ".yml")
BUILTINS = ("python-stdlib", "digits-captions", "shapes", "spoken-digits")
STDLIB_LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "turtledemo",
    "lib-dynload",
    # A hundred code pages that are copies of one table: held out, they would flatter any score.
    "encodings",
}


@dataclass(frozen=True)
class InputFile:
    """One file of a source: where it lies, what it is called in the source, and its version."""

    path: str
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """All files of a source, in order, and how to read them: text, jsonl, parquet, tokens, interleaved,
    webdataset, builtin (documents that are made) or prepared.
    """

    kind: str
    title: str
    files: tuple[InputFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: whole files, or one file's part.

    `start` and `stop` are bytes of plain JSONL, row groups of Parquet, ids of token files, documents that
    are made; both 0 is all of it. `size_bytes` is its share of the input.
    """

    index: int
    files: tuple[InputFile, ...]
    size_bytes: int
    start: int = 0
    stop: int = 0


def list_inputs(source: SourceConfig) -> Listing:
    """Find and order the files of a source.

    Raises:
        DataError: nothing is there, it cannot be read, or its format cannot be told.
    """
    if source.path.startswith("builtin:"):
        return _list_builtin(source)
    path = Path(source.path).expanduser()
    if is_prepared_source(source):
        return Listing("prepared", source.path, ())
    if glob.has_magic(source.path) and not path.exists():
        matches = sorted(glob.glob(str(path), recursive=True), key=os.fsencode)
        paths = [
            (Path(match), os.path.basename(match)) for match in matches if os.path.isfile(match)
        ]
        paths = distinct_names(paths)
    elif path.is_dir():
        paths = list(walk_files(path))
    elif path.exists() or path.is_symlink():
        paths = [(path, path.name)]
    else:
        raise DataError(
            f"source {source.name!r}: {source.path} does not exist; check data.sources path"
        )
    return _build_listing(source, paths)


def is_prepared_source(source: SourceConfig) -> bool:
    """Whether the path is a folder that `weft data prepare` or `weft data encode` made, or is said to be one."""
    has_manifest = (Path(source.path).expanduser() / "manifest.json").is_file()
    return source.format == "prepared" or (source.format == "auto" and has_manifest)


def distinct_names(paths: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Glob matches are named by the path below their common folder."""
    if len(paths) < 2:
        return paths
    top = os.path.commonpath([path.parent for path, _ in paths])
    return [(path, path.relative_to(top).as_posix()) for path, _ in paths]


def walk_files(
    root: Path, left_out: Iterable[str] = ("__pycache__",)
) -> Iterator[tuple[Path, str]]:
    """Files under a folder in the byte order of their relative paths, without hidden ones."""
    unwanted, found = set(left_out), []
    for folder, folders, names in os.walk(root, onerror=_cannot_list):
        folders[:] = [name for name in folders if name not in unwanted and not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                found.append((path, path.relative_to(root).as_posix()))
    yield from sorted(found, key=lambda item: os.fsencode(item[1]))


def _cannot_list(error: OSError) -> None:
    raise DataError(
        f"cannot list {error.filename}: {error.strerror}; make the folder readable"
    ) from error


def _build_listing(source: SourceConfig, paths: list[tuple[Path, str]]) -> Listing:
    kind = (
        source.format
        if source.format != "auto"
        else _tell_kind(source, [name for _, name in paths])
    )
    if kind in ENDINGS and len(paths) > 1:
        paths = [(path, name) for path, name in paths if name.endswith(ENDINGS[kind])]
    if source.extensions:
        wanted = tuple("." + ending.lstrip(".") for ending in source.extensions)
        paths = [(path, name) for path, name in paths if name.endswith(wanted)]
    files = tuple(stat_file(path, name) for path, name in paths)
    if not any(file.size for file in files):
        limit = f" ending in {', '.join(source.extensions)}" if source.extensions else ""
        raise DataError(
            f"source {source.name!r}: {source.path} holds no {kind} files{limit} with anything in "
            "them; "
            "check data.sources path, format and extensions"
        )
    return Listing(kind, source.path, files)


def _tell_kind(source: SourceConfig, names: list[str]) -> str:
    kinds = {
        kind
        for kind, endings in ENDINGS.items()
        if kind != "interleaved" and any(name.endswith(endings) for name in names)
    }
    if not kinds or source.extensions:
        return "text"
    known = tuple(ending for endings in ENDINGS.values() for ending in endings) + COMPANIONS
    others = [name for name in names if not name.endswith(known) and "." in os.path.basename(name)]
    if len(kinds) > 1 or others:
        also = f" and others such as {others[0]}" if others else ""
        raise DataError(
            f"source {source.name!r}: {source.path} holds {' and '.join(sorted(kinds))} "
            f"files{also}; "
            "say which to read with format: text, jsonl, parquet, tokens, interleaved or webdataset"
        )
    return kinds.pop()


def stat_file(path: Path, name: str) -> InputFile:
    """A file as it is now.

    Raises:
        DataError: it cannot be read.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; mend or remove it") from error
    return InputFile(os.path.abspath(path), name, info.st_size, info.st_mtime_ns)


def _list_builtin(source: SourceConfig) -> Listing:
    name = source.path.removeprefix("builtin:").partition(":")[0]
    if name not in BUILTINS:
        raise DataError(
            f"source {source.name!r}: no built-in corpus {name!r}; there is {', '.join(BUILTINS)}"
        )
    if name != "python-stdlib":
        from .interleaved.builtin import open_builtin

        made = open_builtin(source.path)
        # What it is made of stands where a file has its version.
        version = json.dumps(made.identity, sort_keys=True)
        file = InputFile(source.path, version, made.count * BUILTIN_DOCUMENT_BYTES, 0)
        return Listing("builtin", source.path, (file,))
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        (path, relative)
        for path, relative in walk_files(root, STDLIB_LEFT_OUT | {"__pycache__"})
        # The build's own settings differ between two installs of one version.
        if relative.endswith(".py") and not relative.startswith("_sysconfigdata")
    ]
    if not paths:
        raise DataError(
            f"the Python standard library at {root} has no .py sources; use a Python that ships "
            "them"
        )
    return Listing(
        "text", source.path, tuple(stat_file(path, relative) for path, relative in paths)
    )


def plan_units(listing: Listing, token_dtype: str = "uint32") -> list[Unit]:
    """Cut a listing into units of similar size. Depends on the listing only."""
    smallest = SMALLEST_UNIT_BYTES
    if listing.kind in INTERLEAVED_KINDS:
        smallest = SMALLEST_INTERLEAVED_BYTES
    aim = min(LARGEST_UNIT_BYTES, max(smallest, listing.size // UNITS_AIMED_AT))
    if listing.kind == "builtin":
        aim = BUILTIN_UNIT_DOCUMENTS * BUILTIN_DOCUMENT_BYTES
    if listing.kind == "text":
        return group_files(listing.files, aim)
    units: list[Unit] = []
    for file in listing.files:
        if file.size:
            length = _length(listing.kind, file, token_dtype)
            # A file that cannot be entered in the middle has one part.
            step = max(1, length * aim // file.size) if length else 1
            for start in range(0, max(length, 1), step):
                stop = min(start + step, length)
                share = file.size * (stop - start) // length if length else file.size
                units.append(Unit(len(units), (file,), share, start, stop))
    return units


def _length(kind: str, file: InputFile, token_dtype: str) -> int:
    """What a file can be cut by: bytes, row groups, ids or documents; 0 where it has to be read whole."""
    if kind == "parquet":
        from .readers import count_row_groups

        return count_row_groups(file)
    if kind == "builtin":
        return file.size // BUILTIN_DOCUMENT_BYTES
    if kind == "webdataset":
        return 0
    if kind == "tokens":
        from .token_files import read_layout

        return read_layout(file, token_dtype).count
    return 0 if file.path.endswith((".gz", ".zst")) else file.size


def group_files(files: tuple[InputFile, ...], aim: int) -> list[Unit]:
    """Neighbours together until they have `aim` bytes."""
    units: list[Unit] = []
    group: list[InputFile] = []
    held = 0
    for i, file in enumerate(files):
        group.append(file)
        held += file.size
        if held >= aim or i == len(files) - 1:
            units.append(Unit(len(units), tuple(group), held))
            group, held = [], 0
    return units
