"""A trained image tokenizer, opened from its run: pictures to codes or moments, and back.

Everything is fp32, and pictures go in batches of one size, the last one filled up: another batch may take another
algorithm, and with it another code for a picture that lies between two. `Tokenizer` is what data are encoded with;
`TokenizerCodec` is one of its ratios as a codec of interleaved data (`tokenizer:RUN`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.errors import ConfigError, DataError
from ..models.image_tokenizer.autoencoder import Autoencoder
from ..models.image_tokenizer.config import Config
from .trained import open_trained

__all__ = ["Tokenizer", "TokenizerCodec", "fingerprint_of", "open_tokenizer"]

IMAGES_AT_ONCE = 16
PREPROCESSING = "pixel / 127.5 - 1; mirrored at the right and the bottom"


class Tokenizer:
    """See the module.

    Args:
        model: its weights are not trained any more.
        weights: whether they are the run's averages or its raw weights.
        run, step: what they are of, for messages; no part of the fingerprint.

    Attributes:
        kind: `codes`, or `moments` (means and log-variances).
        ratios: pixels a side of one code or latent, finest first.
        codes: how many there are, of kind codes.
    """

    def __init__(
        self,
        model: Autoencoder,
        *,
        weights: Literal["averages", "raw"] = "raw",
        run: str = "",
        step: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False).float()
        config: Config = model.config
        self.config = config
        self.kind: Literal["codes", "moments"] = "codes" if config.kind == "vq" else "moments"
        self.size, self.channels = config.size, config.in_channels
        self.ratios = config.all_ratios
        self.codes = config.quantizer.codes if config.kind == "vq" else None
        self._device = next(model.parameters()).device
        self.identity: dict[str, Any] = {
            "fingerprint": fingerprint_of(model, weights),
            "kind": self.kind,
            "weights": weights,
            "run": run,
            "step": step,
        }

    def encode(self, pixels: NDArray[np.uint8], ratio: int | None = None) -> NDArray[Any]:
        """(N, size, size, channels) pictures to (N, h * w) int64 codes in raster order, or (N, 2C, h, w) fp32 moments.

        Args:
            ratio: of nested; None is the coarsest.

        Raises:
            DataError: pictures of another shape.
        """
        self._check(pixels)
        sizes = self._sizes(ratio)
        place = next(i for i, size in enumerate(sizes) if size)

        def one(part: Tensor) -> Tensor:
            x = part.permute(0, 3, 1, 2).float() / 127.5 - 1
            found = self.model.encode(x, sizes)[place]
            if self.model.quantizer is None:
                return found.float()
            return self.model.quantizer(found).codes.flatten(1)

        side = self.config.side(self.ratios[place])
        shape = (side * side,) if self.kind == "codes" else (self.config.moments, side, side)
        return self._run(pixels, one, shape, np.int64 if self.kind == "codes" else np.float32)

    def decode(self, values: NDArray[Any], ratio: int | None = None) -> NDArray[np.uint8]:
        """(N, h * w) codes, or (N, C, h, w) latents, to (N, size, size, channels) pictures."""
        sizes = self._sizes(ratio)
        place = next(i for i, size in enumerate(sizes) if size)
        size, side = self.size, self.config.side(self.ratios[place])

        def one(part: Tensor) -> Tensor:
            if self.model.quantizer is not None:
                part = self.model.quantizer.lookup(part.view(-1, side, side))
            empty = [
                part.new_zeros((0, part.shape[1], self.config.side(r), self.config.side(r)))
                for r in self.ratios
            ]
            made, _ = self.model.decode([*empty[:place], part, *empty[place + 1 :]])
            bytes_ = ((made.float().clamp(-1, 1) + 1) * 127.5).round()
            return bytes_[:, :, :size, :size].permute(0, 2, 3, 1).to(torch.uint8)

        given = np.asarray(values, np.int64 if self.kind == "codes" else np.float32)
        return self._run(given, one, (size, size, self.channels), np.uint8)

    def _check(self, pixels: NDArray[np.uint8]) -> None:
        wanted = (self.size, self.size, self.channels)
        if pixels.shape[1:] != wanted:
            found, expected = (" x ".join(map(str, s)) for s in (pixels.shape[1:], wanted))
            raise DataError(
                f"pictures of {found}, and this tokenizer takes {expected}; resize them first"
            )

    def _sizes(self, ratio: int | None) -> list[int]:
        wanted = self.ratios[-1] if ratio is None else ratio
        if wanted not in self.ratios:
            raise ConfigError(f"this tokenizer has no ratio {wanted}; it has {list(self.ratios)}")
        return [IMAGES_AT_ONCE * (r == wanted) for r in self.ratios]

    @torch.no_grad()
    def _run(
        self,
        values: NDArray[Any],
        one: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        dtype: Any,
    ) -> NDArray[Any]:
        found = np.empty((len(values), *shape), dtype)
        for first in range(0, len(values), IMAGES_AT_ONCE):
            part = values[first : first + IMAGES_AT_ONCE]
            filled = np.resize(part, (IMAGES_AT_ONCE, *part.shape[1:]))
            made = one(torch.from_numpy(filled).to(self._device))[: len(part)]
            found[first : first + len(part)] = made.cpu().numpy()
        return found


class TokenizerCodec:
    """One ratio of a tokenizer as an `ImageCodec`: codes, or the means of latents."""

    def __init__(self, tokenizer: Tokenizer, ratio: int | None = None) -> None:
        self._tokenizer, self._ratio = tokenizer, ratio or tokenizer.ratios[-1]
        self.kind = "codes" if tokenizer.kind == "codes" else "latents"
        self.size, self.channels = tokenizer.size, tokenizer.channels
        side = tokenizer.config.side(self._ratio)
        depth = () if self.kind == "codes" else (tokenizer.config.latent_channels,)
        self.shape: tuple[int, ...] = (*depth, side, side)

    @property
    def identity(self) -> dict[str, Any]:
        """Of what it makes: where the run lies is not told."""
        fingerprint = self._tokenizer.identity["fingerprint"]
        return {"codec": "tokenizer", "ratio": self._ratio, "fingerprint": fingerprint}

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        found = self._tokenizer.encode(pixels, self._ratio)
        return found if self.kind == "codes" else np.split(found, 2, axis=1)[0]

    def decode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        return self._tokenizer.decode(values, self._ratio)


def fingerprint_of(model: Autoencoder, weights: str) -> str:
    """SHA-256 of all that decides what a picture becomes: encoder, bottleneck, preprocessing, kind of weights.

    The decoder is no part of it: codes stay what they are when it alone is trained on.
    """
    c = model.config
    settings = {
        "kind": c.kind,
        "size": c.size,
        "channels": c.in_channels,
        "ratios": c.all_ratios,
        "groups": c.groups,
        "normalise": c.quantizer.normalise if c.kind == "vq" else None,
        "preprocessing": PREPROCESSING,
        "weights": weights,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, values in _encoding_weights(model):
        digest.update(f"{name} {list(values.shape)}".encode())
        digest.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encoding_weights(model: Autoencoder) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(("encoder.", "quant_conv.", "quantizer.")):
            yield name, parameter


def open_tokenizer(
    run_dir: Path | str, step: int | None = None, *, averages: bool = True
) -> Tokenizer:
    """A run's tokenizer.

    Args:
        step: of the checkpoint; None is the newest that is whole.
        averages: of the weights, where the run keeps them; False takes the weights as they are.

    Raises:
        ConfigError: a run of another family.
        CheckpointError: no such checkpoint.
    """
    with open_trained(run_dir, step, [f"eval.ema={str(averages).lower()}"]) as trained:
        config = trained.config
        if not isinstance(config.model, Config):
            raise ConfigError(
                f"{run_dir} is a run of family {config.model.family}, not image_tokenizer; name one that is"  # type: ignore[attr-defined]
            )
        model = trained.engine.network_for_generation("model")
        assert isinstance(model, Autoencoder)
        has_averages = averages and config.optimizer.ema_decay is not None
        return Tokenizer(
            model,
            weights="averages" if has_averages else "raw",
            run=str(run_dir),
            step=trained.step,
        )
