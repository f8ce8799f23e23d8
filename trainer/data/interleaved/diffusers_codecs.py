"""diffusers' AutoencoderKL and VQModel from a local folder as image codecs. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import ConfigError, DataError, LaunchError
from .config import ImageConfig

__all__ = ["open_vae", "open_vq"]

IMAGES_AT_ONCE = 16
BLOCK_BYTES = 1 << 22


class _FolderCodec:
    """What both have in common: pictures from -1 to 1 through a frozen network, some at a time."""

    channels = 3

    def __init__(self, model: Any, folder: Path, size: int, name: str) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().requires_grad_(False).to(self._device)
        self.size = size
        self._name, self._sha256 = name, _sha256_of(folder)

    @property
    def identity(self) -> dict[str, Any]:
        return {"codec": self._name, "size": self.size, "sha256": self._sha256}

    def _latents(self, pixels: NDArray[np.uint8]) -> Any:
        """(N, C, h, w) tensor that the encoder gives."""
        import torch

        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(self._device)
        return self._model.encode(images.float() / 127.5 - 1)

    def _run(self, values: NDArray[Any], one: Any) -> NDArray[Any]:
        import torch

        with torch.inference_mode():
            parts = [
                one(values[first : first + IMAGES_AT_ONCE])
                for first in range(0, len(values), IMAGES_AT_ONCE)
            ]
        return np.concatenate([part.cpu().numpy() for part in parts])

    def _pictures(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        pixels = (values.clip(-1, 1) + 1) * 127.5
        return np.rint(pixels).astype(np.uint8).transpose(0, 2, 3, 1)


class VAECodec(_FolderCodec):
    """Latents: the mean of AutoencoderKL's posterior, before its own scaling factor (data measure theirs)."""

    kind = "latents"

    def __init__(self, model: Any, folder: Path, size: int) -> None:
        super().__init__(model, folder, size, "vae")
        side = size // 2 ** (len(model.config.block_out_channels) - 1)
        self.shape: tuple[int, ...] = (int(model.config.latent_channels), side, side)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        return self._run(pixels, lambda part: self._latents(part).latent_dist.mode())

    def decode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        def one(part: NDArray[Any]) -> Any:
            import torch

            latents = torch.from_numpy(np.asarray(part, np.float32)).to(self._device)
            return self._model.decode(latents).sample

        return self._pictures(self._run(values, one))


class VQCodec(_FolderCodec):
    """Codes: the nearest entries of VQModel's codebook, in raster order."""

    kind = "codes"

    def __init__(self, model: Any, folder: Path, size: int) -> None:
        super().__init__(model, folder, size, "vq")
        side = size // 2 ** (len(model.config.block_out_channels) - 1)
        self.shape: tuple[int, ...] = (side, side)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        def one(part: NDArray[np.uint8]) -> Any:
            _, _, (_, _, codes) = self._model.quantize(self._latents(part).latents)
            return codes.reshape(len(part), -1)

        return self._run(pixels, one).astype(np.int64)

    def decode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        def one(part: NDArray[Any]) -> Any:
            import torch

            codes = torch.from_numpy(np.asarray(part, np.int64)).to(self._device)
            width = self._model.quantize.vq_embed_dim
            shape = (len(part), *self.shape, width)
            entries = self._model.quantize.get_codebook_entry(codes.reshape(-1), shape)
            return self._model.decode(entries, force_not_quantize=True).sample

        return self._pictures(self._run(values, one))


def open_vae(folder: Path, config: ImageConfig) -> VAECodec:
    """AutoencoderKL of a folder.

    Raises:
        ConfigError: a size it cannot halve as often as it has to.
        DataError: no AutoencoderKL there.
        LaunchError: diffusers is missing.
    """
    model = _load("AutoencoderKL", folder)
    return VAECodec(model, folder, _size_of(model, config))


def open_vq(folder: Path, config: ImageConfig) -> VQCodec:
    """VQModel of a folder.

    Raises:
        ConfigError: another number of codes than the configuration's, or a size that does not divide.
        DataError: no VQModel there.
        LaunchError: diffusers is missing.
    """
    model = _load("VQModel", folder)
    codes = int(model.config.num_vq_embeddings)
    if codes != config.codes:
        raise ConfigError(
            f"data.interleaved.image.codes: {config.codes}, but the codebook of {folder} has {codes}; set it to {codes}"
        )
    return VQCodec(model, folder, _size_of(model, config))


def _load(name: str, folder: Path) -> Any:
    found = json.loads((folder / "config.json").read_bytes()).get("_class_name")
    if found != name:
        raise DataError(
            f"data.interleaved.image.codec: {folder} holds a {found}, not a {name}; vae: takes AutoencoderKL, vq: VQModel"
        )
    try:
        import diffusers
    except ImportError as error:
        raise LaunchError(
            "codecs from a folder need the diffusers package; install it with: pip install diffusers"
        ) from error
    try:
        return getattr(diffusers, name).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{folder} cannot be opened as {name}: {reason}") from error


def _size_of(model: Any, config: ImageConfig) -> int:
    size = int(config.size or model.config.sample_size)
    halvings = len(model.config.block_out_channels) - 1
    if size % 2**halvings:
        raise ConfigError(
            f"data.interleaved.image.size: {size} does not divide by {2**halvings}, by which this codec makes images smaller"
        )
    return size


def _sha256_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(path.name.encode())
            with open(path, "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    digest.update(block)
    return digest.hexdigest()
