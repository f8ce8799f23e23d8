"""A source of images as a prepared folder, wherever it is named: itself, or in the cache."""

from __future__ import annotations

from pathlib import Path

from ....models.errors import DataError
from ..config import DataConfig, HeldOutConfig, SourceConfig
from ..dataset import cache_folder
from ..prepare import plan_preparation, prepare_source
from ..sources import is_prepared_source
from .config import ImagesConfig
from .encoded_format import is_encoded

__all__ = ["prepared_images"]


def prepared_images(path: str, name: str, held_out: int, images: ImagesConfig) -> Path:
    """The folder of a source's prepared images; raw ones are prepared into the cache, where a run with the same settings
    finds them.

    Args:
        held_out: images kept for evaluation, where they are prepared.

    Raises:
        DataError: no images there.
    """
    source = SourceConfig(name=name, path=path)
    if is_prepared_source(source):
        folder = Path(path).expanduser()
        if is_encoded(folder):
            raise DataError(f"{folder} holds encoded images; name the images they were made of")
        return folder
    config = HeldOutConfig(documents=held_out)
    preparation = plan_preparation(
        source, "", held_out=config, repeats=DataConfig().repeat_filter, images=images
    )
    folder = cache_folder(DataConfig()).absolute() / f"{name}-{preparation.key[:16]}"
    prepare_source(preparation, folder)
    return folder
