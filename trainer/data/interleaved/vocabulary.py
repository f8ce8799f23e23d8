"""A vocabulary of text, extended by ids that open and close images and speech, and by their codes.

    base.size + 0  opens an image (BOI)          base.size + 2  opens speech
    base.size + 1  closes an image (EOI)         base.size + 3  closes speech
    then image codes, then speech codes

The first four are there whatever the modalities, so that data of some modalities fit runs with more of them; they are
missing only where reserved ids of the base stand for all that are needed. A position of a continuous image holds BOI,
which nothing looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from ..vocabulary import Vocabulary, open_vocabulary
from .config import SPECIAL_IDS, InterleavedConfig

__all__ = ["InterleavedVocabulary", "open_interleaved"]


class InterleavedVocabulary(Vocabulary):
    """Text's own ids and those of what stands between it.

    Attributes:
        base: the vocabulary of the text.
        boi_id, eoi_id: open and close an image.
        bos_speech_id, eos_speech_id: open and close speech.
        first_image_code, image_codes: ids of image codes are [first, first + codes).
        first_speech_code, speech_codes: those of speech codes.
    """

    def __init__(self, base: Vocabulary, config: InterleavedConfig) -> None:
        self.base, self.config = base, config
        self.bos_id, self.eos_id = base.bos_id, base.eos_id
        self.size = base.size + config.added_ids
        self.dtype = np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")
        given = config.special_ids()
        self._check_reserved(given)
        ids = [
            base.size + place if given[name] is None else int(given[name] or 0)
            for place, name in enumerate(SPECIAL_IDS)
        ]
        self.boi_id, self.eoi_id, self.bos_speech_id, self.eos_speech_id = ids
        self.image_codes, self.speech_codes = config.image_codes, config.speech_codes
        self.first_image_code = self.size - self.speech_codes - self.image_codes
        self.first_speech_code = self.size - self.speech_codes

    def _check_reserved(self, given: dict[str, int | None]) -> None:
        for name, value in given.items():
            if value is None:
                continue
            if value >= self.base.size or value in (self.bos_id, self.eos_id):
                raise DataError(
                    f"data.interleaved.{name}: {value} is no reserved id of the vocabulary ({self.base.size} ids, "
                    f"BOS {self.bos_id}, EOS {self.eos_id}); name one that text never gets, or null to add one"
                )

    @property
    def special_ids(self) -> tuple[int, int, int, int]:
        """Ids that open and close images and speech."""
        return self.boi_id, self.eoi_id, self.bos_speech_id, self.eos_speech_id

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        return self.base.encode(text)

    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return self.base.encode_documents(texts)

    def encode_texts(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """Ids of pieces of text, in one go, without BOS and EOS."""
        first = 0 if self.bos_id is None else 1
        return [ids[first:-1] for ids in self.base.encode_documents(texts)]

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        values = np.asarray(ids, dtype=np.int64)
        is_text = (values < self.base.size) & ~np.isin(values, self.special_ids)
        return self.base.decode_bytes(values[is_text])

    def token_byte_lengths(self) -> NDArray[np.int32] | None:
        known = self.base.token_byte_lengths()
        if known is None:
            return None
        lengths = np.zeros(self.size, np.int32)
        lengths[: len(known)] = known
        lengths[[value for value in self.special_ids if value < self.size]] = 0
        return lengths

    def identity(self) -> dict[str, Any]:
        return {"kind": "interleaved", "size": self.size, "base": self.base.identity()} | {
            name: part for name, part in self.parts().items() if name in self.config.modalities
        }

    def parts(self) -> dict[str, dict[str, int]]:
        """JSON-able: which ids each modality but text has. Two vocabularies agree on data that hold only what they have in common."""
        return {
            "image": {
                "opens": self.boi_id,
                "closes": self.eoi_id,
                "first_code": self.first_image_code if self.image_codes else 0,
                "codes": self.image_codes,
            },
            "speech": {
                "opens": self.bos_speech_id,
                "closes": self.eos_speech_id,
                "first_code": self.first_speech_code if self.speech_codes else 0,
                "codes": self.speech_codes,
            },
        }


def open_interleaved(spec: str, config: InterleavedConfig | None) -> Vocabulary:
    """The vocabulary a recipe names, extended where its data are interleaved.

    Raises:
        DataError: the tokenizer is missing or unreadable, or an id is none of its reserved ones.
    """
    base = open_vocabulary(spec)
    return base if config is None else InterleavedVocabulary(base, config)
