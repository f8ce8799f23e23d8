"""The reference of all keys, as a terminal table and as the tables in docs/configuration.md.

`python -m weft.trainer.configuration.reference docs/configuration.md` brings the page up to date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from ...models.errors import ConfigError
from .keys import Key, nearest_key, walk_keys
from .recipes import DEFAULT_FAMILY
from .schema import TrainingConfig, list_families, model_section
from .validation import schema_of

__all__ = ["keys_under", "render_markdown", "update_page"]

BEGIN = "<!-- keys: written by `make docs` from the field descriptions; do not edit -->"
END = "<!-- keys: end -->"


def keys_under(prefix: str, family: str = DEFAULT_FAMILY) -> list[Key]:
    """Every key that is `prefix` or stands below it, sections left out; all keys for an empty prefix.

    Raises:
        ConfigError: no key begins like that.
    """
    schema = schema_of(model_section(family))
    every = list(walk_keys(schema))
    wanted = ".".join("N" if part.isdigit() else part for part in prefix.strip(".").split("."))
    if wanted:
        every = [key for key in every if key.name == wanted or key.name.startswith(f"{wanted}.")]
    found = [key for key in every if key.section is None or key.takes_null or key.is_list]
    if not found:
        raise ConfigError(f"no key begins with {prefix!r}; {nearest_key(schema, prefix)}")
    return found


def render_markdown() -> str:
    """One table a section; the model section once for each family."""
    blocks = []
    for name, field in TrainingConfig.model_fields.items():
        if name == "model":
            for family in list_families():
                title = f"`model` with `family: {family}`"
                blocks.append(_table(title, model_section(family), keys_under("model", family)))
        else:
            kind = field.annotation
            assert isinstance(kind, type)
            blocks.append(_table(f"`{name}`", kind, keys_under(name)))
    return "\n\n".join(blocks)


def _table(title: str, section: type[BaseModel], keys: list[Key]) -> str:
    lines = [f"### {title}", "", inspect.getdoc(section) or "", ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(_cells(key))} |" for key in keys]
    return "\n".join(lines)


def _cells(key: Key) -> Iterator[str]:
    yield f"`{key.name}`"
    yield _escaped(key.type_text)
    yield f"`{_escaped(key.default_text)}`"
    yield _escaped(key.description)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def update_page(text: str) -> str:
    """A documentation page with the part between its two marks written anew.

    Raises:
        ConfigError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the page lacks the marks {BEGIN} and {END}; put both back")
    return f"{before}{BEGIN}\n\n{render_markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page = Path(argument)
        page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")
