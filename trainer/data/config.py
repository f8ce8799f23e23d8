"""Settings of the data section; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ...models.section import Section
from .images.config import ImagesConfig
from .interleaved.config import InterleavedConfig

__all__ = ["DataConfig", "HeldOutConfig", "RepeatFilterConfig", "SourceConfig"]

SourceFormat = Literal[
    "auto", "text", "jsonl", "parquet", "tokens", "interleaved", "webdataset", "prepared"
]


class SourceConfig(Section):
    """One named source of a mixture."""

    name: str = Field(
        ..., min_length=1, pattern=r"^[\w.-]+$", description="appears in metrics and evaluations"
    )
    path: str = Field(
        ...,
        min_length=1,
        description="file, folder, glob, prepared dataset, or builtin:NAME (python-stdlib, digits-captions, shapes, spoken-digits; of images digits, photos, shapes-images)",
    )
    format: SourceFormat = Field("auto", description="how to read it; auto goes by the file names")
    text_key: str = Field(
        "text", min_length=1, description="field that holds the text in JSONL and Parquet"
    )
    extensions: tuple[str, ...] = Field(
        (), description="file endings a folder of text is limited to; empty is all text"
    )
    token_dtype: Literal["uint16", "uint32"] = Field(
        "uint32", description="type of headerless token files"
    )
    weight: float | None = Field(
        None, gt=0, description="share of the samples; null is in proportion to size"
    )
    max_epochs: float | None = Field(
        None, gt=0, description="refuse to repeat the source more often than this"
    )


class HeldOutConfig(Section):
    """Documents kept out of training, chosen by a hash of their name (files) or their text
    (records).
    """

    documents: int = Field(
        20,
        ge=0,
        le=4096,
        description="documents held out of a source, at most a tenth; prepared datasets bring theirs",
    )
    min_bytes: int = Field(
        0, ge=0, description="only documents of at least this many bytes are held out"
    )
    max_bytes: int | None = Field(
        None, gt=0, description="only documents of at most this many bytes are held out"
    )


class RepeatFilterConfig(Section):
    """Sequences with long runs of a repeated n-gram carry no loss (OLMo 2, section 3.3.1)."""

    enabled: bool = Field(
        True, description="mask the targets of such sequences; they keep their place in the order"
    )
    min_period: int = Field(1, ge=1, description="shortest repeated n-gram, in tokens")
    max_period: int = Field(13, ge=1, description="longest repeated n-gram, in tokens")
    max_count: int = Field(32, ge=2, description="repeats that trigger the filter")

    @model_validator(mode="after")
    def _periods_in_order(self) -> RepeatFilterConfig:
        if self.min_period > self.max_period:
            raise ValueError(f"min_period {self.min_period} is above max_period {self.max_period}")
        return self


class DataConfig(Section):
    """What is trained on, and in which pieces."""

    sources: tuple[SourceConfig, ...] = Field((), description="sources of the mixture")
    vocabulary: str = Field(
        "bytes", description="bytes, or hf:PATH of a folder with tokenizer.json"
    )
    sequence_length: int = Field(
        4096,
        ge=1,
        description="positions of one sample, in tokens; 1 for images, of codes as many as an image has",
    )
    interleaved: InterleavedConfig | None = Field(
        None, description="documents of text, images and speech; null is text alone"
    )
    images: ImagesConfig | None = Field(
        None, description="images with class labels; null is text, or data.interleaved"
    )
    packing: Literal["auto", "stream", "documents"] = Field(
        "auto",
        description="stream: samples are cut from all ids laid end to end; documents: a sample holds whole documents and "
        "ends in padding; auto is documents for interleaved data, else stream",
    )
    held_out: HeldOutConfig = Field(HeldOutConfig(), description="documents kept for evaluation")
    repeat_filter: RepeatFilterConfig = Field(
        RepeatFilterConfig(), description="instance filter in the loader"
    )
    drop_repetitive_documents: bool = Field(
        False,
        description="leave documents with such runs out when preparing (OLMo 2's curation filter)",
    )
    cache_dir: str | None = Field(
        None, description="where prepared sources are kept; null is WEFT_CACHE or ~/.cache/weft"
    )
    prepare_workers: int | None = Field(
        None, ge=1, description="processes that prepare; null is one a core"
    )
    prefetch_steps: int = Field(8, ge=1, description="steps assembled ahead in the background")
    allow_changed: bool = Field(
        False, description="resume although a dataset's fingerprint changed"
    )

    @property
    def packs_documents(self) -> bool:
        """Whether samples hold whole documents."""
        return self.packing == "documents" or (
            self.packing == "auto" and self.interleaved is not None
        )

    @model_validator(mode="after")
    def _samples_fit(self) -> DataConfig:
        if self.images is None:
            if self.sequence_length < 2:
                raise ValueError(
                    f"sequence_length {self.sequence_length} leaves text no target; it is at least 2, or 1 with data.images"
                )
            return self
        if self.interleaved is not None:
            raise ValueError("set data.images or data.interleaved, not both; the other is null")
        if self.images.kind != "codes" and self.sequence_length != 1:
            raise ValueError(
                f"sequence_length {self.sequence_length}: a sample of data.images is one image; set data.sequence_length=1 "
                "(train.batch_tokens then counts images)"
            )
        return self

    @model_validator(mode="after")
    def _images_in_documents(self) -> DataConfig:
        if self.interleaved is not None and self.packing == "stream":
            raise ValueError(
                "packing stream would cut images; leave data.packing at auto with data.interleaved"
            )
        return self

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; names must differ")
        return sources

    @field_validator("sources")
    @classmethod
    def _all_or_no_weights(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        bare = [source.name for source in sources if source.weight is None]
        if bare and len(bare) < len(sources):
            raise ValueError(
                f"some sources have a weight and {bare[0]!r} has none; give all of them one, or "
                "none"
            )
        return sources

    @field_validator("vocabulary")
    @classmethod
    def _known_vocabulary(cls, value: str) -> str:
        if value != "bytes" and not value.startswith("hf:"):
            raise ValueError(f"{value!r} is neither 'bytes' nor 'hf:PATH'")
        return value
