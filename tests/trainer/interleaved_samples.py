"""Small interleaved documents, and the slow definition of the batch they become."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from weft.trainer.data.document_order import RowOf
from weft.trainer.data.document_packing import DocumentAssembler
from weft.trainer.data.document_rows import DocumentRows, ShardArrays
from weft.trainer.data.interleaved.config import InterleavedConfig
from weft.trainer.data.interleaved.layout import ImageLayout
from weft.trainer.data.interleaved.vocabulary import InterleavedVocabulary
from weft.trainer.data.vocabulary import ByteVocabulary

IMAGE_POSITIONS = 4


@dataclass
class Item:
    """One id: of which modality it is, and of which image."""

    id: int
    modality: int = 0
    image: int = -1


@dataclass
class Sample:
    """Documents of one source, stored in shards."""

    config: InterleavedConfig
    vocabulary: InterleavedVocabulary
    documents: list[list[Item]] = field(default_factory=list)
    shards: list[ShardArrays] = field(default_factory=list)

    @property
    def layout(self) -> ImageLayout:
        if self.config.image.kind == "codes":
            return ImageLayout("codes", (2, 2), (2, 2))
        return ImageLayout("latents", (1, 4, 4), (2, 2), shift=1.0, scale=2.0)

    def rows(self, length: int) -> DocumentRows:
        wanted = [np.arange(len(shard.ends)) for shard in self.shards]
        return DocumentRows(self.shards, wanted, length, "s")

    def pack(self, length: int, seed: int | None = 0, samples: list[int] | None = None, **more):
        rows = self.rows(length)
        assembler = DocumentAssembler(
            self.vocabulary, length, self.config, self.layout, seed=seed, **more
        )
        which = list(range(rows.sequences)) if samples is None else samples
        return assembler.pack([RowOf(row, 0, rows, row) for row in which])


def make_sample(shards: list[list[str]], **settings) -> Sample:
    """Documents spelled as letters: `t` text, `i` an image, `s` speech.

    The number of an image in its shard is also in its latents.
    """
    settings.setdefault("modalities", ("text", "image", "speech"))
    settings.setdefault("speech", {"codes": 9})
    config = InterleavedConfig(**settings)
    vocabulary = InterleavedVocabulary(ByteVocabulary(), config)
    sample = Sample(config, vocabulary)
    is_codes = config.image.kind == "codes"
    text = 0
    for spelled in shards:
        ids, ends, spans, images = [], [], [], 0
        for letters in spelled:
            document = [Item(vocabulary.bos_id)]
            for letter in letters:
                if letter == "t":
                    document.append(Item(4 + text % 250))
                    text += 1
                    continue
                modality = 1 if letter == "i" else 2
                opens, closes = (
                    (vocabulary.boi_id, vocabulary.eoi_id)
                    if letter == "i"
                    else (vocabulary.bos_speech_id, vocabulary.eos_speech_id)
                )
                document.append(Item(opens))
                start = len(ids) + len(document)
                if letter == "i":
                    for place in range(IMAGE_POSITIONS):
                        code = vocabulary.first_image_code + (images + place) % 5
                        document.append(Item(code if is_codes else opens, 1, images))
                    spans.append((start, IMAGE_POSITIONS, modality, images))
                    images += 1
                else:
                    document += [
                        Item(vocabulary.first_speech_code + place, 2) for place in range(3)
                    ]
                    spans.append((start, 3, modality, -1))
                document.append(Item(closes))
            document.append(Item(vocabulary.eos_id))
            sample.documents.append(document)
            ids += [item.id for item in document]
            ends.append(len(ids))
        latents = np.arange(images, dtype=np.float32)[:, None, None, None] + np.zeros((1, 1, 4, 4))
        sample.shards.append(
            ShardArrays(
                np.array(ids, np.uint16),
                np.array(ends, np.int64),
                np.array(spans, np.int64).reshape(-1, 4),
                None if is_codes else latents.astype(np.float16),
            )
        )
    return sample


def spelled_documents() -> st.SearchStrategy[list[list[str]]]:
    """Shards of documents: captions with images, free mixtures, text alone, long ones."""
    caption = st.integers(1, 4).flatmap(lambda n: st.sampled_from(["t" * n + "i", "i" + "t" * n]))
    free = st.text(alphabet="ttis", max_size=12)
    long = st.integers(20, 60).map(lambda n: "t" * n)
    return st.lists(
        st.lists(st.one_of(caption, free, long), min_size=1, max_size=5), min_size=1, max_size=3
    )


def pieces_by_hand(document: list[Item], length: int) -> list[list[Item]]:
    """Pieces of a document; each has one id more than positions."""
    found, start = [], 0
    while len(document) - 1 - start > length:
        cut = start + length
        while not may_cut(document, cut):
            cut -= 1
        found.append(document[start : cut + 1])
        start = cut
    return [*found, document[start:]]


def may_cut(document: list[Item], cut: int) -> bool:
    """Whether a piece may begin with this id: not with one of an image, nor with what closes one."""
    return document[cut].modality != 1 and document[cut - 1].modality != 1


def rows_by_hand(sample: Sample, length: int) -> list[list[list[Item]]]:
    """Rows of pieces, next-fit in order."""
    rows: list[list[list[Item]]] = []
    room = -1
    for document in sample.documents:
        for piece in pieces_by_hand(document, length):
            if len(piece) - 1 > room:
                rows.append([])
                room = length
            rows[-1].append(piece)
            room -= len(piece) - 1
    return rows
