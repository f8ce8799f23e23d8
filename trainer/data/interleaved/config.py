"""Settings of data.interleaved; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ....models.modalities import Modality
from ....models.section import Section

__all__ = ["ImageConfig", "InterleavedConfig", "SpeechConfig"]

SPECIAL_IDS = ("boi_id", "eoi_id", "bos_speech_id", "eos_speech_id")
CODEC_KINDS = {"pixels": "latents", "gray-codes": "codes", "vae": "latents", "vq": "codes"}
FOLDER_CODECS = ("vae", "vq", "tokenizer")
"""Those of a folder; what a tokenizer makes is known when its run is opened."""


class ImageConfig(Section):
    """What images become before a model sees them."""

    kind: Literal["latents", "codes"] = Field(
        "latents",
        description="latents (continuous, for diffusion) or codes (ids of one vocabulary with the text)",
    )
    codec: str | None = Field(
        "pixels",
        description="pixels, gray-codes, vae:FOLDER or vq:FOLDER (diffusers, local), tokenizer:RUN (Weft's own); null where the data bring latents or codes",
    )
    size: int | None = Field(
        None,
        ge=1,
        description="pixels a side, after a centre crop; null is the size that a codec's folder names",
    )
    channels: Literal[1, 3] = Field(
        3, description="of codec pixels: 1 is greyscale; the others have their own"
    )
    codes: int = Field(8192, ge=2, description="of kind codes: how many there are")
    patch_size: int = Field(
        2,
        ge=1,
        description="of kind latents: a position is a square of so many latents a side; the model's stem has to agree",
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="of kind latents: how they are stored"
    )
    scale: float | None = Field(
        None,
        gt=0,
        description="what (latent - shift) is multiplied by; null is 1 / the standard deviation of all sources",
    )
    shift: float | None = Field(
        None, description="what is taken off a latent; null is the mean of all sources"
    )
    clip: tuple[float, float] | None = Field(
        None,
        description="lowest and highest latent a model sees, to which sampling clips; null is what all sources have",
    )

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name, _, folder = value.partition(":")
        if name not in {*CODEC_KINDS, *FOLDER_CODECS} or (name in FOLDER_CODECS) != bool(folder):
            raise ValueError(
                f"{value!r} is none of pixels, gray-codes, vae:FOLDER, vq:FOLDER, tokenizer:RUN, null"
            )
        return value

    @model_validator(mode="after")
    def _codec_of_kind(self) -> ImageConfig:
        if self.codec is not None:
            makes = CODEC_KINDS.get(self.codec.partition(":")[0], self.kind)
            if makes != self.kind:
                raise ValueError(f"codec {self.codec} makes {makes}, not {self.kind}")
        return self


class SpeechConfig(Section):
    """What speech becomes before a model sees it."""

    codes: int = Field(500, ge=2, description="how many speech codes there are")


class InterleavedConfig(Section):
    """Documents of text, images and speech. Null is plain text."""

    modalities: tuple[Modality, ...] = Field(
        ("text", "image"),
        description="what documents may hold, text first; the model's list has to be the same",
    )
    image: ImageConfig = Field(ImageConfig(), description="images")
    speech: SpeechConfig = Field(SpeechConfig(), description="speech")
    image_first: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the documents of one image and one text whose image comes first",
    )
    caption_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the documents with the text first that lose it, for classifier-free guidance",
    )
    score_boi: bool = Field(
        True,
        description="whether the id that opens an image is predicted; false where the text's head is frozen (LMFusion)",
    )
    boi_id: int | None = Field(
        None, ge=0, description="a reserved id of the vocabulary that opens images; null adds one"
    )
    eoi_id: int | None = Field(
        None, ge=0, description="a reserved id that closes images; null adds one"
    )
    bos_speech_id: int | None = Field(
        None, ge=0, description="a reserved id that opens speech; null adds one"
    )
    eos_speech_id: int | None = Field(
        None, ge=0, description="a reserved id that closes speech; null adds one"
    )

    @field_validator("modalities")
    @classmethod
    def _text_first(cls, value: tuple[Modality, ...]) -> tuple[Modality, ...]:
        if not value or value[0] != "text" or len(set(value)) != len(value):
            raise ValueError(
                f"[{', '.join(value)}] must begin with text and name nothing twice, such as [text, image]"
            )
        return value

    @model_validator(mode="after")
    def _ids_differ(self) -> InterleavedConfig:
        given = [value for value in self.special_ids().values() if value is not None]
        if len(set(given)) != len(given):
            raise ValueError("boi_id, eoi_id, bos_speech_id and eos_speech_id must differ")
        return self

    def special_ids(self) -> dict[str, int | None]:
        """Ids that open and close what is no text, as given."""
        return {name: getattr(self, name) for name in SPECIAL_IDS}

    @property
    def image_codes(self) -> int:
        """Ids of images in the vocabulary."""
        return self.image.codes if "image" in self.modalities and self.image.kind == "codes" else 0

    @property
    def speech_codes(self) -> int:
        """Ids of speech in the vocabulary."""
        return self.speech.codes if "speech" in self.modalities else 0

    @property
    def added_ids(self) -> int:
        """Ids behind those of the text, see `vocabulary.py`."""
        needed = [
            self.special_ids()[name]
            for name in SPECIAL_IDS
            if ("speech" if "speech" in name else "image") in self.modalities
        ]
        specials = len(SPECIAL_IDS) if any(value is None for value in needed) else 0
        return specials + self.image_codes + self.speech_codes

    def order_settings(self) -> dict[str, Any]:
        """JSON-able: what changes samples without changing prepared data."""
        return {
            "modalities": list(self.modalities),
            "image_first": self.image_first,
            "caption_dropout": self.caption_dropout,
            "score_boi": self.score_boi,
        }
