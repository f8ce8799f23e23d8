"""An image tokenizer's run as what encodes data. Its weights decide the fingerprint that all it makes carries."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ....models.errors import ConfigError
from ....models.section import Section

__all__ = ["RunTokenizer", "tokenizer_of"]

FAMILY = "image_tokenizer"
ENCODING_PARTS = ("encoder.", "quant_conv.", "quantizer.")
LOSSES = {"reconstruction", "adversarial", "crt", "every_ratio"}
"""Settings that change how it is trained, not what it makes of a picture."""


class RunTokenizer:
    """The network `model` of an image tokenizer's run, see `EncodingTokenizer`.

    Args:
        network: `Autoencoder`, on the device that it is to run on.
        config: its settings.
        about: for people: run and step.
    """

    def __init__(self, network: nn.Module, config: Section, about: dict[str, Any]) -> None:
        # What a family says of itself is its own; only the image tokenizers' is asked for here.
        settings: Any = config
        self._network: Any = network.eval().requires_grad_(False)
        self.kind: Literal["codes", "moments"] = "codes" if settings.kind == "vq" else "moments"
        self.size, self.channels = int(settings.size), int(settings.in_channels)
        self.ratios: tuple[int, ...] = tuple(settings.all_ratios)
        self.codes: int | None = settings.quantizer.codes if self.kind == "codes" else None
        self._about, self._fingerprint = about, _fingerprint(network, config)
        self._device = next(network.parameters()).device

    @property
    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, **self._about}

    def encode(self, pixels: NDArray[np.uint8], ratio: int) -> NDArray[Any]:
        """(N, size, size, channels) pictures to (N, n) int64 codes in raster order, or (N, 2C, h, w) float32 moments."""
        sizes = [len(pixels) if ratio == own else 0 for own in self.ratios]
        with torch.inference_mode():
            images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
            x = images.to(self._device).float() / 127.5 - 1
            encoded: Tensor = self._network.encode(x, sizes)[self.ratios.index(ratio)]
            if self.kind == "codes":
                codes: Tensor = self._network.quantizer(encoded).codes
                return codes.reshape(len(pixels), -1).cpu().numpy().astype(np.int64)
            return encoded.float().cpu().numpy()


def _fingerprint(network: nn.Module, config: Section) -> str:
    """SHA-256 of all that decides what a picture becomes: weights up to the codebook, and settings."""
    digest = hashlib.sha256()
    settings = config.model_dump(mode="json", exclude=LOSSES)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in sorted(network.state_dict().items()):
        if name.startswith(ENCODING_PARTS):
            values = parameter.detach().float().cpu().contiguous().numpy()
            digest.update(f"{name} {values.shape}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()


def tokenizer_of(network: nn.Module, config: Section, run: str, step: int) -> RunTokenizer:
    """The tokenizer of a run that was opened.

    Raises:
        ConfigError: the run is of another family.
    """
    family = getattr(config, "family", None)
    if family != FAMILY:
        raise ConfigError(
            f"{run} is a run of family {family}, which encodes no images; name the run of an {FAMILY}"
        )
    return RunTokenizer(network, config, {"run": run, "step": step})
