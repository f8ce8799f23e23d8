"""What stands where text has its vocabulary: ids that are classes or codes and stand for no bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from ..prepare import IMAGE_IDENTITY
from ..vocabulary import Vocabulary

__all__ = ["ImageVocabulary"]


class ImageVocabulary(Vocabulary):
    """No text at all; ids are shown as numbers."""

    size = 0
    bos_id: int | None = None
    eos_id = -1
    dtype = np.dtype("<i8")

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        raise DataError("this run is of images and takes no text; leave the text out")

    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        raise DataError("this run is of images and takes no text; leave the text out")

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        return " ".join(map(str, np.asarray(ids).tolist())).encode()

    def token_byte_lengths(self) -> NDArray[np.int32] | None:
        return None

    def identity(self) -> dict[str, Any]:
        return dict(IMAGE_IDENTITY)
