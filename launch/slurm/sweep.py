"""From `--sweep key=a,b` and `--seeds N` to the runs of a job array, each with a readable folder. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...models.errors import ConfigError

__all__ = ["Combination", "combinations"]

MOST_RUNS = 10_000


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Args:
        name: of its folder: `lr=1e-4_seed=0`.
        overrides: `key=value`.
    """

    name: str
    overrides: tuple[str, ...]


def combinations(sweeps: Sequence[str], seeds: int | None, first_seed: int) -> list[Combination]:
    """Every combination, the last sweep changing fastest; none where nothing is swept.

    Args:
        sweeps: `key=value,value,...`; commas in brackets or quotes belong to a value.
        seeds: number of seeds from `first_seed` on.

    Raises:
        ConfigError: a sweep without values, a key or a value given twice, or more runs than anyone means.
    """
    axes = [_axis(text) for text in sweeps]
    if seeds is not None:
        axes.append(("run.seed", [str(first_seed + i) for i in range(seeds)]))
    if not axes:
        return []
    keys = [key for key, _ in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"{twice} is swept twice; give all its values in one --sweep")
    count = 1
    for _, values in axes:
        count *= len(values)
    if count > MOST_RUNS:
        raise ConfigError(f"the sweep makes {count} runs, more than {MOST_RUNS}; sweep less")
    short = _short_names(keys)
    found = []
    for chosen in itertools.product(*(values for _, values in axes)):
        name = "_".join(f"{short[k]}={_plain(v)}" for k, v in zip(keys, chosen, strict=True))
        overrides = tuple(f"{k}={v}" for k, v in zip(keys, chosen, strict=True))
        found.append(Combination(name, overrides))
    names = [c.name for c in found]
    if same := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two runs of the sweep would share the folder {same}; name values apart")
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = _split(values)
    if not (key and equals and all(found)):
        raise ConfigError(
            f"--sweep {text}: expected KEY=VALUE,VALUE, such as optimizer.lr=1e-4,3e-4"
        )
    if twice := next((v for v in found if found.count(v) > 1), None):
        raise ConfigError(f"--sweep {text}: the value {twice} is there twice")
    return key, found


def _split(values: str) -> list[str]:
    """At commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in values:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key, or as many as tell it from the others."""
    names = {}
    for key in keys:
        words = key.split(".")
        for length in range(1, len(words) + 1):
            short = ".".join(words[-length:])
            if not any(other != key and f".{other}".endswith(f".{short}") for other in keys):
                break
        names[key] = short
    return names


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value.strip("[]{}'\" ")) or "empty"
