"""How different two pictures look, by features of a fixed network; its weights come from a local file or a seed.

Kinds: `lpips_vgg` (VGG16 with learned heads, arXiv 1801.03924) and `vgg_imagenet` (the same features, each channel alike) are read
from files; `random_features` (a small network that was never trained) and `gradient` (edges at three scales) need none. Nothing is
ever downloaded, and no kind stands in for another. The network is a constant of the run: it is in no checkpoint, on
every rank whole, in fp32, and never in training mode.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from ..errors import ConfigError
from .config import ReconstructionConfig

__all__ = ["Perceptual", "open_perceptual"]

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10
VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Places of the convolutions of each stage in torchvision's `features`."""
RANDOM_WIDTHS = (3, 32, 64, 128)
RANDOM_SEED = 0
SCALES = 3
KEY = "model.reconstruction.perceptual"


class Perceptual:
    """A distance of pictures.

    Args:
        kind: see the module.
        stages: convolutions (weight, bias) of each stage; features are compared at the end of each.
        heads: (C,) weights of the channels of each stage; None is 1 / C.
        facts: JSON-able, what the distance depends on.
    """

    def __init__(
        self,
        kind: str,
        stages: list[list[tuple[Tensor, Tensor]]],
        heads: list[Tensor] | None,
        facts: dict[str, Any],
    ) -> None:
        self.kind, self.stages, self.heads = kind, stages, heads
        self.facts = {"kind": kind, **facts}

    def to(self, device: torch.device) -> Perceptual:
        """The same on a device."""
        stages = [[(w.to(device), b.to(device)) for w, b in stage] for stage in self.stages]
        heads = None if self.heads is None else [head.to(device) for head in self.heads]
        return Perceptual(self.kind, stages, heads, self.facts)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """(n,) fp32 distances of pictures (n, 3 or 1, S, S) from -1 to 1."""
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.float(), y.float()
            if self.kind == "gradient":
                return _gradient_distance(x, y)
            return self._feature_distance(x, y)

    def _feature_distance(self, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(len(x), device=x.device)
        pairs = zip(self._features(x), self._features(y), strict=True)
        for stage, (a, b) in enumerate(pairs):
            difference = (_unit(a) - _unit(b)).square()
            if self.heads is None:
                total = total + difference.mean((1, 2, 3))
            else:
                weighted = difference * self.heads[stage][:, None, None]
                total = total + weighted.sum(1).mean((1, 2))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        h = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if self.kind != "random_features":
            h = (h - h.new_tensor(SHIFT)[:, None, None]) / h.new_tensor(SCALE)[:, None, None]
        found = []
        for number, stage in enumerate(self.stages):
            if number:
                pool = avg_pool2d if self.kind == "random_features" else max_pool2d
                h = pool(h, 2)
            for weight, bias in stage:
                h = conv2d(h, weight, bias, padding=1).relu()
            found.append(h)
        return found


def _unit(features: Tensor) -> Tensor:
    # The root's slope is endless where no feature fires; LPIPS adds its eps outside, which leaves that as it is.
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()


def _gradient_distance(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(len(x), device=x.device)
    for scale in range(SCALES):
        if scale:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        difference = x - y
        for axis in (2, 3):
            total = total + difference.diff(dim=axis).abs().mean((1, 2, 3))
    return total


def open_perceptual(config: ReconstructionConfig) -> Perceptual | None:
    """What a configuration names; None where it is off.

    Raises:
        ConfigError: weights asked for that are not there, or are none.
    """
    if config.perceptual == "off":
        return None
    if config.perceptual == "gradient":
        return Perceptual("gradient", [], None, {})
    if config.perceptual == "random_features":
        return Perceptual("random_features", _random_stages(), None, {"seed": RANDOM_SEED})
    path = Path(config.perceptual.removeprefix("file:")).expanduser()
    weights = _read(path, KEY)
    stages = _vgg_stages(weights, path)
    facts = {"sha256": _digest(path)}
    heads = None
    if config.perceptual_heads is not None:
        heads_path = Path(config.perceptual_heads).expanduser()
        heads = _heads(_read(heads_path, f"{KEY}_heads"), heads_path)
        facts["heads_sha256"] = _digest(heads_path)
    return Perceptual("vgg_imagenet" if heads is None else "lpips_vgg", stages, heads, facts)


def _random_stages() -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    found = []
    for inputs, outputs in itertools.pairwise(RANDOM_WIDTHS):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        found.append([(weight, torch.zeros(outputs))])
    return found


def _read(path: Path, key: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            f"{key}: there is no file {path}; put the weights there (Weft downloads none), or set {KEY}=off"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}: {path} holds no weights that can be read: {reason}") from None


def _vgg_stages(weights: Mapping[str, Tensor], path: Path) -> list[list[tuple[Tensor, Tensor]]]:
    try:
        return [
            [
                (weights[f"features.{n}.weight"].float(), weights[f"features.{n}.bias"].float())
                for n in stage
            ]
            for stage in VGG_STAGES
        ]
    except (KeyError, TypeError):
        raise ConfigError(
            f"{KEY}: {path} is no VGG16 as torchvision saves it (features.0.weight and so on); name one that is, or set {KEY}=off"
        ) from None


def _heads(weights: Mapping[str, Tensor], path: Path) -> list[Tensor]:
    """Of LPIPS: `lin0.model.1.weight` and so on, (1, C, 1, 1)."""
    try:
        return [weights[f"lin{n}.model.1.weight"].float().flatten() for n in range(len(VGG_STAGES))]
    except (KeyError, TypeError):
        raise ConfigError(
            f"{KEY}_heads: {path} holds no LPIPS heads (lin0.model.1.weight and so on); name a file that does, or leave it null"
        ) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
