"""One unit of interleaved documents to a shard: ids, what is no text in them, latents.

A document is BOS (where the vocabulary has one), its parts, EOS. An image is BOI, its positions, EOI; speech alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from ....models.modalities import MODALITIES
from ..hashed_file import HashedFile, write_hashed
from ..repeats import find_repetitive_rows
from ..shard_writer import Found, UnitJob, key_of
from ..shards import SPAN_COLUMNS, Shard
from ..sources import Unit
from ..vocabulary import open_vocabulary
from .builtin import open_builtin
from .codecs import ImageCodec, open_codec
from .config import ImageConfig, InterleavedConfig
from .documents import InterleavedDocument, Part, read_interleaved
from .images import fit_image
from .layout import LatentStatistics, image_grid
from .vocabulary import InterleavedVocabulary

__all__ = ["encode_interleaved"]

DOCUMENTS_AT_ONCE = 64
IMAGE, SPEECH = MODALITIES.index("image"), MODALITIES.index("speech")


def encode_interleaved(job: UnitJob, unit: Unit, folder: Path) -> Found:
    """Write the ids, spans and latents of one unit.

    Raises:
        DataError: a part that cannot be read or does not fit the settings; the message names it.
    """
    assert job.interleaved is not None
    name = f"shard_{unit.index:05d}"
    encoder = _Encoder(job.vocabulary, job.interleaved)
    dropped: dict[str, int] = {}
    candidates: list[tuple[int, int, int]] = []
    lengths: list[int] = []
    spans: list[NDArray[np.int64]] = []
    statistics: list[LatentStatistics] = []
    position = images = text_bytes = 0
    documents, files = _documents(job, unit)
    with (
        HashedFile(folder / f"{name}.ids") as ids_out,
        HashedFile(folder / f"{name}.latents") as out,
    ):
        for batch in _batches(documents, dropped):
            for document, encoded in zip(batch, encoder.encode(batch), strict=True):
                if job.repeats and find_repetitive_rows(encoded.text_ids[None, :], job.repeats)[0]:
                    dropped["repetitive"] = dropped.get("repetitive", 0) + 1
                    continue
                candidates.append((key_of(document.key), len(lengths), encoded.text_bytes))
                found = encoded.spans + np.array([position, 0, 0, 0])
                is_image = found[:, 2] == IMAGE
                found[is_image, 3] = images + np.arange(is_image.sum())
                spans.append(found)
                lengths.append(len(encoded.ids))
                ids_out.write(encoded.ids)
                position, images = position + len(encoded.ids), images + int(is_image.sum())
                text_bytes += encoded.text_bytes
                for latent in encoded.latents:
                    out.write(latent)
                    statistics.append(LatentStatistics.of(latent))
    all_spans = np.concatenate([np.empty((0, SPAN_COLUMNS), np.int64), *spans])
    has_latents = bool(out.size)
    if not has_latents:
        (folder / f"{name}.latents").unlink()
    ends = np.cumsum(np.array(lengths, np.int64), dtype=np.int64)
    shard = Shard(
        ids=f"{name}.ids",
        ends=f"{name}.ends",
        dtype=encoder.vocabulary.dtype.str,
        offset=0,
        tokens=position,
        documents=len(ends),
        bytes=text_bytes,
        file_bytes=ids_out.size,
        ids_sha256=ids_out.sha256,
        ends_sha256=write_hashed(folder / f"{name}.ends", ends.astype("<i8").tobytes()),
        spans=f"{name}.spans",
        spans_sha256=write_hashed(folder / f"{name}.spans", all_spans.astype("<i8").tobytes()),
        span_count=len(all_spans),
        latents=f"{name}.latents" if has_latents else "",
        latents_sha256=out.sha256 if has_latents else "",
        latent_bytes=out.size,
        images=images,
    )
    more = {
        "modalities": sorted({int(code) for code in np.unique(all_spans[:, 2])}),
        "image": encoder.image_record(LatentStatistics.join(statistics)),
        "files": {
            label: write_hashed(folder / label, content) for label, content in files().items()
        },
    }
    return Found(shard, candidates, dropped, more)


def _documents(job: UnitJob, unit: Unit) -> tuple[Iterator[InterleavedDocument], Any]:
    """Documents of a unit, and what gives the files to keep beside them once they were read."""
    assert job.interleaved is not None
    if job.kind != "builtin":
        return read_interleaved(job.kind, unit), dict
    made = open_builtin(unit.files[0].path)
    return made.documents(unit.start, unit.stop, job.interleaved), made.files


def _batches(
    documents: Iterator[InterleavedDocument], dropped: dict[str, int]
) -> Iterator[list[InterleavedDocument]]:
    """Documents with anything in them, some at a time; counts the others."""
    batch: list[InterleavedDocument] = []
    for document in documents:
        if all(part.kind == "text" and not part.value for part in document.parts):
            dropped["empty"] = dropped.get("empty", 0) + 1
            continue
        batch.append(document)
        if len(batch) == DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


class _Encoded:
    """A document's ids and what in them is no text."""

    def __init__(self) -> None:
        self.pieces: list[NDArray[np.int64]] = []
        self.text_pieces: list[NDArray[np.int64]] = []
        self.stretches: list[tuple[int, int, int, int]] = []
        self.latents: list[NDArray[Any]] = []
        self.length = self.text_bytes = 0
        self.ids = self.text_ids = np.empty(0, np.int64)

    def add(self, ids: NDArray[Any]) -> None:
        self.pieces.append(ids.astype(np.int64))
        self.length += len(ids)

    def add_stretch(self, opens: int, ids: NDArray[np.int64], closes: int, modality: int) -> None:
        self.add(np.array([opens]))
        self.stretches.append((self.length, len(ids), modality, -1))
        self.add(ids)
        self.add(np.array([closes]))

    def close(self, dtype: np.dtype) -> _Encoded:
        self.ids = np.concatenate(self.pieces).astype(dtype)
        self.text_ids = np.concatenate([self.text_ids, *self.text_pieces])
        return self

    @property
    def spans(self) -> NDArray[np.int64]:
        return np.array(self.stretches, np.int64).reshape(-1, SPAN_COLUMNS)


@lru_cache(maxsize=2)
def _open_codec(config: ImageConfig) -> ImageCodec | None:
    return open_codec(config)


class _Encoder:
    """Turns documents into ids; remembers the shape of the first image, which all others must have."""

    def __init__(self, vocabulary: str, config: InterleavedConfig) -> None:
        self.config = config
        self.vocabulary = InterleavedVocabulary(open_vocabulary(vocabulary), config)
        self._codec = _open_codec(config.image) if "image" in config.modalities else None
        self._shape: tuple[int, ...] | None = self._codec.shape if self._codec else None
        self._example = f"codec {config.image.codec}" if self._codec else ""

    def image_record(self, statistics: LatentStatistics) -> dict[str, Any] | None:
        """JSON-able: what was found of images, and the first of them for messages; None without any."""
        if self._shape is None:
            return None
        image = self.config.image
        return {
            "kind": image.kind,
            "shape": list(self._shape),
            "grid": list(image_grid(image.kind, self._shape, image.patch_size, self._example)),
            "dtype": image.dtype if image.kind == "latents" else None,
            "codec": self._codec.identity if self._codec else None,
            "example": self._example,
            "statistics": statistics.dump() if statistics.count else None,
        }

    def encode(self, documents: list[InterleavedDocument]) -> list[_Encoded]:
        parts = [part for document in documents for part in document.parts]
        for part in parts:
            self._check_modality(part)
        texts = [part for part in parts if part.kind == "text"]
        encoded = self.vocabulary.encode_texts([part.value for part in texts])
        text_ids = dict(zip(map(id, texts), encoded, strict=True))
        pictures = [part for part in parts if part.kind == "image"]
        images = dict(zip(map(id, pictures), self._encode_images(pictures), strict=True))
        return [self._document(document, text_ids, images) for document in documents]

    def _check_modality(self, part: Part) -> None:
        if part.modality not in self.config.modalities:
            raise DataError(
                f"{part.name}: {part.kind} is {part.modality}, but data.interleaved.modalities is "
                f"[{', '.join(self.config.modalities)}]; add {part.modality} to it, or take the document out"
            )

    def _encode_images(self, parts: list[Part]) -> list[NDArray[Any]]:
        if not parts:
            return []
        if self._codec is None:
            raise DataError(
                f"{parts[0].name}: an image, and data.interleaved.image.codec is null; name a codec, or give latents or image_codes"
            )
        size, channels = self._codec.size, self._codec.channels
        return list(
            self._codec.encode(np.stack([fit_image(part.value, size, channels) for part in parts]))
        )

    def _document(
        self,
        document: InterleavedDocument,
        text_ids: dict[int, NDArray[Any]],
        images: dict[int, NDArray[Any]],
    ) -> _Encoded:
        vocabulary, made = self.vocabulary, _Encoded()
        if vocabulary.bos_id is not None:
            made.add(np.array([vocabulary.bos_id]))
        for part in document.parts:
            if part.kind == "text":
                made.add(text_ids[id(part)])
                made.text_pieces.append(text_ids[id(part)].astype(np.int64))
                made.text_bytes += len(part.value)
            elif part.kind == "speech_codes":
                codes = self._codes(part.value, part, "speech", vocabulary.speech_codes)
                ids = codes + vocabulary.first_speech_code
                made.add_stretch(vocabulary.bos_speech_id, ids, vocabulary.eos_speech_id, SPEECH)
            else:
                self._add_image(made, part, images.get(id(part), part.value))
        made.add(np.array([vocabulary.eos_id]))
        return made.close(vocabulary.dtype)

    def _add_image(self, made: _Encoded, part: Part, value: NDArray[Any]) -> None:
        image, vocabulary = self.config.image, self.vocabulary
        wanted = "image_codes" if image.kind == "codes" else "latent"
        if part.kind not in ("image", wanted):
            raise DataError(
                f"{part.name}: {part.kind}, but data.interleaved.image.kind is {image.kind}; give {wanted} or image, or set the kind"
            )
        if image.kind == "codes":
            codes = self._codes(value, part, "image", vocabulary.image_codes)
            self._check_shape(part, (len(codes),))
            ids = codes + vocabulary.first_image_code
        else:
            self._check_shape(part, value.shape)
            assert self._shape is not None
            grid = image_grid("latents", self._shape, image.patch_size, part.name)
            ids = np.full(grid[0] * grid[1], vocabulary.boi_id, np.int64)
            made.latents.append(self._stored(part, value))
        made.add_stretch(vocabulary.boi_id, ids, vocabulary.eoi_id, IMAGE)

    def _codes(
        self, codes: NDArray[np.int64], part: Part, modality: str, count: int
    ) -> NDArray[np.int64]:
        if codes.min() < 0 or codes.max() >= count:
            bad = int(codes.min()) if codes.min() < 0 else int(codes.max())
            raise DataError(
                f"{part.name}: code {bad} is outside 0 to {count - 1}; check data.interleaved.{modality}.codes"
            )
        return codes

    def _check_shape(self, part: Part, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            self._shape = shape if len(shape) == 3 else _square(shape[0])
            self._example = part.name
        same = shape == self._shape if len(shape) == 3 else shape[0] == int(np.prod(self._shape))
        if not same:
            raise DataError(
                f"{part.name} has {_words(shape)}, but {self._example} has {_words(self._shape)}; all images of a source need one shape"
            )

    def _stored(self, part: Part, latent: NDArray[Any]) -> NDArray[Any]:
        dtype = np.dtype(self.config.image.dtype).newbyteorder("<")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(latent, dtype)
        if not np.isfinite(stored).all():
            raise DataError(
                f"{part.name}: latents up to {np.abs(latent).max():g} do not fit {self.config.image.dtype}; set "
                "data.interleaved.image.dtype=float32, or mend what is not finite"
            )
        return stored


def _square(count: int) -> tuple[int, int]:
    """(h, w) of so many codes: a square where they make one, else a single row."""
    side = int(np.sqrt(count))
    return (side, side) if side * side == count else (1, count)


def _words(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return f"latents of shape {' x '.join(map(str, shape))}"
    return f"{int(np.prod(shape))} codes"
