"""What an installed Weft consists of: a wheel from a clean copy of the tree, and every supported Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "models", "trainer", "launch")
PACKAGED = (*FLOORS, "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built without a network from a copy, so that the working tree stays as it was."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PACKAGED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, tree],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "!!" not in done.stdout + done.stderr, "setuptools has something to say"
    return next(folder.glob("weft-*.whl"))


def source_files(pattern: str) -> set[str]:
    return {
        f"weft/{path.relative_to(ROOT)}"
        for floor in FLOORS
        for path in (ROOT / floor).rglob(pattern)
        if path.relative_to(ROOT).parts[:2] != ("launch", "weft")
    }


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    root = {"weft/__init__.py", "weft/__main__.py"}
    files = [source_files(pattern) for pattern in ("*.py", "*.yaml", "*.j2", "*.sh")]
    assert names == set().union(*files) | root
    assert "weft/launch/recipes/olmo2/quickstart.yaml" in names


def test_the_wheel_carries_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Version 2.0, January 2004" in archive.read(info["LICENSE"]).decode()
    assert "weft = weft.launch.cli:main" in archive.read(info["entry_points.txt"]).decode()
    metadata = archive.read(info["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_the_installed_package_works_away_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # Path entries come before an editable install's finder only when that finder is not asked.
    program = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "import weft, runpy\n"
        f"assert weft.__file__.startswith({str(site)!r}), weft.__file__\n"
        "sys.argv = ['weft', 'train', 'olmo2/debug', 'run.seed=3', '--print-config']\n"
        "runpy.run_module('weft', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "# olmo2/debug.yaml:" in done.stdout


def other_pythons() -> list[str]:
    """Interpreters of the supported versions other than this one, where this machine has them."""
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    found = [
        str(p) for home in homes for v in ("3.11", "3.12") for p in home.glob(f"{v}.*/bin/python3")
    ]
    found += [p for v in ("3.11", "3.12") if (p := shutil.which(f"python{v}"))]
    return [p for p in found if f"/{sys.version_info.major}.{sys.version_info.minor}." not in p]


def test_the_tree_compiles_under_other_supported_pythons(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "for path in sys.argv[1:]:\n"
        "    compile(pathlib.Path(path).read_text('utf-8'), path, 'exec')\n"
        "print('%d.%d' % sys.version_info[:2], len(sys.argv) - 1)\n"
    )
    files = [str(path) for floor in (*FLOORS, "tests") for path in (ROOT / floor).rglob("*.py")]
    for python in other_pythons():
        done = subprocess.run(
            [python, "-W", "error", "-c", program, *files], capture_output=True, text=True
        )
        if "command not found" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1] == str(len(files))


def test_floors_only_import_downwards() -> None:
    order = {floor: i for i, floor in enumerate(FLOORS)}
    wrong = []
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            depth = len(path.relative_to(ROOT).parts)
            for line in path.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[:1] != ["from"] or not words[1].startswith("."):
                    continue
                dots = len(words[1]) - len(words[1].lstrip("."))
                target = words[1].lstrip(".").partition(".")[0]
                if dots == depth and order.get(target, -1) > order[floor]:
                    wrong.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert wrong == []


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment that looks installed."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / ".venv").mkdir()
    for name, time_s in (("pyvenv.cfg", 900), (".installed", 2000), (".installed-dev", 2000)):
        (tmp_path / ".venv" / name).touch()
        os.utime(tmp_path / ".venv" / name, (time_s, time_s))
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**env, "VENV": ".venv"},
    )


@pytest.mark.parametrize("target", ["install", "dev"])
def test_an_install_is_made_again_only_when_it_changed(makefile: Path, target: str) -> None:
    assert make(makefile, "--question", target).returncode == 0
    for name in ("setup.py", "constraints.txt"):
        os.utime(makefile / name, (3000, 3000))
        assert make(makefile, "--question", target).returncode == 1
        os.utime(makefile / name, (1000, 1000))


def test_a_machine_without_a_new_python_is_told(makefile: Path) -> None:
    shutil.rmtree(makefile / ".venv")
    done = make(makefile, "PYTHON=", "quickstart")
    assert done.returncode == 2
    assert "no Python >= 3.11 here" in done.stdout + done.stderr
    assert not (makefile / ".venv").exists()


def test_installs_are_constrained_and_tests_run_as_documented(makefile: Path) -> None:
    shutil.rmtree(makefile / ".venv")
    lines = make(makefile, "--dry-run", "test").stdout.splitlines()
    assert any("pip install -c constraints.txt -e '.[dev]'" in line for line in lines)
    assert lines[-1] == ".venv/bin/python -m pytest -n 2 --dist load"
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.splitlines()[-1] == "make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
