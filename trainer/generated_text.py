"""Generated text as it is shown: whole characters, patch borders on request, and as it comes.

A byte model says characters byte by byte and a border may fall inside one: it is then shown before that character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from .data.vocabulary import Vocabulary
from .generation import Completion, GenerationState, decode_prefix

__all__ = ["BORDER", "TextStream", "completion_with_borders", "text_with_borders"]

BORDER = "|"


def text_with_borders(
    vocabulary: Vocabulary, ids: Sequence[int], starts: Sequence[int], length: int
) -> str:
    """The first `length` characters of the ids' text, with a sign before each patch but the first that shows.

    Args:
        starts: places in `ids` that start a patch.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    borders, shown, parts, is_open = set(starts), 0, [], False
    for place, one in enumerate(ids):
        if shown == length:
            break
        if place in borders and is_open:
            parts.append(BORDER)
        raw = vocabulary.decode_bytes([one])
        is_open |= bool(raw)
        part = decoder.decode(raw)[: length - shown]
        parts.append(part)
        shown += len(part)
    return "".join(parts)


def completion_with_borders(completion: Completion, vocabulary: Vocabulary) -> str:
    """Prompt and generated text of a model with patches, with a sign before each patch."""
    length = len(decode_prefix(vocabulary, completion.prompt_ids)) + len(completion.text)
    ids = [*completion.prompt_ids, *completion.token_ids]
    return text_with_borders(vocabulary, ids, completion.patch_starts or [], length)


class TextStream:
    """Writes one prompt's text while it is generated: give it to `generate` as `on_token`, and call `finish` after.

    What is written is never taken back: no part of a character, and nothing that may be the beginning of a stop string.

    Args:
        write: takes the next piece of text.
        with_borders: write the prompt too, with signs between patches; else the generated text alone.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        vocabulary: Vocabulary,
        stop: Sequence[str] = (),
        *,
        with_borders: bool = False,
    ) -> None:
        self.write, self.vocabulary, self.stop = write, vocabulary, tuple(stop)
        self.with_borders = with_borders
        self._written = 0

    def __call__(self, state: GenerationState) -> None:
        text = state.text(0)
        text = text[: len(text) - held_back(text, self.stop)]
        starts = state.cache.patch_starts(0) if self.with_borders else None
        self._write(state.prompts[0], state.generated[0], text, starts)

    def finish(self, completion: Completion) -> None:
        """Write the rest."""
        starts = completion.patch_starts if self.with_borders else None
        self._write(completion.prompt_ids, completion.token_ids, completion.text, starts)

    def _write(
        self, prompt: list[int], generated: list[int], text: str, starts: list[int] | None
    ) -> None:
        if starts is not None:
            length = len(decode_prefix(self.vocabulary, prompt)) + len(text)
            text = text_with_borders(self.vocabulary, [*prompt, *generated], starts, length)
        if len(text) > self._written:
            self.write(text[self._written :])
            self._written = len(text)


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text could be the beginning of a stop string."""
    longest = max((len(one) for one in stop), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-count:]) for one in stop):
            return count
    return 0
