"""What preparing a source of images will do, worked out without reading any of them."""

from __future__ import annotations

import hashlib
import json

from ..config import HeldOutConfig, SourceConfig
from ..prepare import IMAGE_IDENTITY, Preparation
from ..shard_writer import UnitJob
from ..shards import FORMAT_VERSION
from .config import ImagesConfig
from .job import ImageJob
from .reading import list_images, plan_image_units

__all__ = ["plan_images"]


def plan_images(source: SourceConfig, held_out: HeldOutConfig, images: ImagesConfig) -> Preparation:
    """List the images of a source and cut them into units.

    Raises:
        DataError: nothing to read, or a class without images.
    """
    found = list_images(source)
    listing = found.listing
    job = UnitJob(
        kind=listing.kind,
        text_key="",
        token_dtype="",
        vocabulary="",
        vocabulary_identity=IMAGE_IDENTITY,
        repeats=None,
        held_out=held_out,
        images=ImageJob(
            found.classes,
            images.image_key,
            images.label_key,
            images.caption_key,
            held_out.documents,
        ),
    )
    inputs = [[file.name, file.size, file.mtime_ns] for file in listing.files]
    payload = json.dumps([FORMAT_VERSION, job.identity(), inputs], sort_keys=True)
    key = hashlib.sha256(payload.encode()).hexdigest()
    return Preparation(
        listing, plan_image_units(listing), job, key, max_bad_share=images.max_bad_share
    )
