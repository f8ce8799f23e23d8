"""Text to ids and back: raw bytes, or a local Hugging Face tokenizer. Imports no torch.

The byte ids are BLT's (specs: byte + 4, with BOE 0, BOS 1, EOS 2, PAD 3), so any bytes round-trip.
A document is closed by EOS in every vocabulary, and EOS never occurs inside one: packing relies on
it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError, LaunchError

__all__ = ["ByteVocabulary", "HuggingFaceVocabulary", "Vocabulary", "open_vocabulary"]


class Vocabulary(ABC):
    """Ids of a text, and the text of ids.

    Attributes:
        size: ids are in [0, size).
        bos_id: id that opens a document, None where documents open with their first token.
        eos_id: id that closes a document.
        dtype: the smallest storage type that holds the ids.
    """

    size: int
    bos_id: int | None
    eos_id: int
    dtype: np.dtype

    @abstractmethod
    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """(N,) int64 ids, without BOS or EOS; special tokens spelled out in the text are plain
        text.
        """

    @abstractmethod
    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """Each document's ids in storage type, opened by BOS where there is one and closed by
        EOS.
        """

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """The bytes the ids stand for; special ids stand for none."""

    @abstractmethod
    def token_byte_lengths(self) -> NDArray[np.int32] | None:
        """(size,) int32, raw bytes each id stands for (0 for special ids); None where that is not
        defined.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-able; equal exactly where the same text gets the same ids."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of the ids; bytes that are not UTF-8 become replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteVocabulary(Vocabulary):
    """256 bytes after 4 special ids; a document is BOS bytes EOS."""

    OFFSET = 4
    BOE, BOS, EOS, PAD = 0, 1, 2, 3

    def __init__(self) -> None:
        self.size = 256 + self.OFFSET
        self.bos_id: int | None = self.BOS
        self.eos_id = self.EOS
        self.pad_id = self.PAD
        self.dtype = np.dtype("<u2")

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int64) + self.OFFSET

    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return [self._document(text) for text in texts]

    def _document(self, text: bytes) -> NDArray[Any]:
        ids = np.empty(len(text) + 2, self.dtype)
        ids[0], ids[-1] = self.BOS, self.EOS
        np.add(np.frombuffer(text, np.uint8), self.OFFSET, out=ids[1:-1], dtype=self.dtype)
        return ids

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        values = np.asarray(ids, dtype=np.int64)
        return (values[values >= self.OFFSET] - self.OFFSET).astype(np.uint8).tobytes()

    def token_byte_lengths(self) -> NDArray[np.int32] | None:
        lengths = np.ones(self.size, np.int32)
        lengths[: self.OFFSET] = 0
        return lengths

    def identity(self) -> dict[str, Any]:
        return {"kind": "bytes", "size": self.size, "offset": self.OFFSET}


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


class HuggingFaceVocabulary(Vocabulary):
    """A `tokenizer.json` read by the tokenizers library; nothing is ever downloaded.

    BOS opens documents exactly where the tokenizer's own post-processor adds it (Llama 3 yes, OLMo
    2 no).
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"no tokenizer at {file}: data.vocabulary=hf:PATH needs a local folder with "
                "tokenizer.json; "
                "download the model's tokenizer files there first"
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise LaunchError(
                "data.vocabulary=hf:... needs the tokenizers package; install it with: pip install "
                "'weft[hf]'"
            ) from error
        raw = file.read_bytes()
        try:
            self._json: dict[str, Any] = json.loads(raw)
            self._tokenizer = Tokenizer.from_str(raw.decode())
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not a tokenizer.json: {error}") from error
        except Exception as error:
            raise DataError(
                f"{file} is not a tokenizer.json that tokenizers can read: {error}"
            ) from error
        # A document that spells out "<|endoftext|>" must not be cut there.
        self._tokenizer.encode_special_tokens = True
        self._sha256 = hashlib.sha256(raw).hexdigest()
        self._read_specials(file)

    def _read_specials(self, file: Path) -> None:
        settings_file = file.with_name("tokenizer_config.json")
        settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocab.values()) + 1
        self.dtype = np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")
        eos = self._special_id(settings, "eos_token", vocab)
        if eos is None:
            eos = next(
                (
                    vocab[name]
                    for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")
                    if name in vocab
                ),
                None,
            )
        if eos is None:
            raise DataError(
                f"{file} names no end-of-text token; put a tokenizer_config.json with eos_token "
                "beside it"
            )
        self.eos_id = eos
        opening = self._tokenizer.encode("", add_special_tokens=True).ids
        self.bos_id = opening[0] if opening and opening[0] != eos else None

    @staticmethod
    def _special_id(settings: dict[str, Any], key: str, vocab: dict[str, int]) -> int | None:
        value = settings.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return vocab.get(name) if isinstance(name, str) else None

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        string = text if isinstance(text, str) else text.decode("utf-8", errors="replace")
        return np.array(
            self._tokenizer.encode(string, add_special_tokens=False).ids, dtype=np.int64
        )

    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        head = [] if self.bos_id is None else [self.bos_id]
        return [np.array([*head, *item.ids, self.eos_id], dtype=self.dtype) for item in encodings]

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        values = [int(i) for i in ids]
        if self._spelling == "byte_level":
            specials = self._special_ids()
            table = _byte_of_character()
            names = [self._tokenizer.id_to_token(i) or "" for i in values if i not in specials]
            return b"".join(
                bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()
                for name in names
            )
        return self._tokenizer.decode(values, skip_special_tokens=True).encode()

    @property
    def _spelling(self) -> str:
        """How tokens spell bytes: `byte_level` (GPT-2), `byte_fallback` (SentencePiece), or
        `other`.
        """
        decoder = self._json.get("decoder") or {}
        kinds = {decoder.get("type")} | {item.get("type") for item in decoder.get("decoders", ())}
        if "ByteLevel" in kinds:
            return "byte_level"
        return "byte_fallback" if "ByteFallback" in kinds else "other"

    def _special_ids(self) -> set[int]:
        return {item["id"] for item in self._json.get("added_tokens", ()) if item.get("special")}

    def token_byte_lengths(self) -> NDArray[np.int32] | None:
        spelling = self._spelling
        if spelling == "other":
            return None
        lengths = np.zeros(self.size, np.int32)
        added = {item["id"] for item in self._json.get("added_tokens", ())}
        for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = len(name.encode())
            elif spelling == "byte_level":
                lengths[i] = len(name)
            else:
                is_byte = len(name) == 6 and name.startswith("<0x")
                lengths[i] = 1 if is_byte else len(name.replace("\u2581", " ").encode())
        lengths[list(self._special_ids())] = 0
        return lengths

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "hf",
            "size": self.size,
            "sha256": self._sha256,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }


def open_vocabulary(spec: str) -> Vocabulary:
    """The vocabulary a recipe names.

    Args:
        spec: `bytes`, or `hf:PATH` with a folder that holds tokenizer.json (or that file).

    Raises:
        DataError: the tokenizer is missing or unreadable.
        LaunchError: the tokenizers package is missing.
    """
    if spec == "bytes":
        return ByteVocabulary()
    if spec.startswith("hf:"):
        return HuggingFaceVocabulary(Path(spec[3:]).expanduser())
    raise DataError(f"unknown vocabulary {spec!r}; use bytes or hf:PATH")
