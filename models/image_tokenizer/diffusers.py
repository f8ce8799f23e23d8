"""Weights of diffusers' VQModel and AutoencoderKL, where their layouts agree with ours: settings, and names of tensors.

Reads a folder that diffusers saved (`config.json` and a safetensors file); needs no diffusers. What theirs has and ours does not is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .autoencoder import Autoencoder
from .config import Config

__all__ = ["config_from_diffusers", "import_diffusers", "names_in_diffusers"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
OF_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "output": "to_out.0"}


def config_from_diffusers(settings: Mapping[str, Any]) -> Config:
    """The same model in our words.

    Args:
        settings: their `config.json`.

    Raises:
        ConfigError: another class, or a layout that ours does not have.
    """
    kind = {"VQModel": "vq", "AutoencoderKL": "kl"}.get(settings.get("_class_name", ""))
    if kind is None:
        raise ConfigError(
            f"{settings.get('_class_name', 'a model without a class')} is no image tokenizer that can be read; expected VQModel or AutoencoderKL"
        )
    attention = _lowest_attention(settings)
    if settings.get("act_fn", "silu") != "silu" or settings.get("norm_type", "group") != "group":
        raise ConfigError(
            f"its act_fn is {settings.get('act_fn')} and its norm_type {settings.get('norm_type')}; expected silu and group"
        )
    if settings["in_channels"] != settings["out_channels"]:
        raise ConfigError(
            f"it takes {settings['in_channels']} channels and gives {settings['out_channels']}; expected as many"
        )
    blocks, latent = settings["layers_per_block"], settings["latent_channels"]
    common: dict[str, Any] = {
        "kind": kind,
        "size": settings.get("sample_size") or 256,
        "in_channels": settings["in_channels"],
        "channels": tuple(settings["block_out_channels"]),
        "latent_channels": latent,
        "encoder_blocks": blocks,
        "decoder_blocks": blocks + 1,
        "middle_attention": settings.get("mid_block_add_attention", True),
        "lowest_attention": attention,
        "groups": settings.get("norm_num_groups", 32),
    }
    if kind == "vq":
        codes, width = settings["num_vq_embeddings"], settings.get("vq_embed_dim") or latent
        # Theirs looks up by distance.
        common["quantizer"] = {"codes": codes, "width": width, "normalise": False}
    else:
        pair = settings.get("use_quant_conv", True), settings.get("use_post_quant_conv", True)
        if pair[0] != pair[1]:
            raise ConfigError("it has one of quant_conv and post_quant_conv; expected both or none")
        common["quant_conv"] = pair[0]
    return Config(**common)


def _lowest_attention(settings: Mapping[str, Any]) -> bool:
    """Whether the coarsest level has attention, which no other may have."""
    down, up = list(settings["down_block_types"]), list(settings["up_block_types"])
    for has in (False, True):
        rest = len(down) - 1
        if down == [DOWN[0]] * rest + [DOWN[has]] and up == [UP[has]] + [UP[0]] * rest:
            return has
    raise ConfigError(
        f"its levels are {', '.join(down)} and {', '.join(up)}; expected plain ones, with attention at the coarsest or nowhere"
    )


def names_in_diffusers(config: Config) -> dict[str, str]:
    """Our names of parameters to theirs."""
    found = {}
    last = len(config.channels) - 1
    for side in ("encoder", "decoder"):
        theirs = "down_blocks" if side == "encoder" else "up_blocks"
        for level in range(last + 1):
            # Theirs counts the decoder's levels from the coarsest.
            place = level if side == "encoder" else last - level
            found[f"{side}.levels.{level}"] = f"{side}.{theirs}.{place}"
        found[f"{side}.middle"] = f"{side}.mid_block"
    for level in range(last):
        found[f"encoder.downs.{level}"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        found[f"decoder.ups.{level}"] = f"decoder.up_blocks.{last - level - 1}.upsamplers.0.conv"
    with torch.device("meta"):
        parameters = Autoencoder(config).named_parameters()
    return {name: _renamed(name, found) for name, _ in parameters}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    if name == "quantizer.codebook":
        return "quantize.embedding.weight"
    parts = name.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return name
    side, kind, *rest = parts
    plain = {"input": "conv_in", "output": "conv_out", "norm": "conv_norm_out"}
    if kind in plain:
        return ".".join((side, plain[kind], *rest))
    depth = 2 if kind == "middle" else 3
    prefix, rest = prefixes[".".join(parts[:depth])], parts[depth:]
    if kind in ("downs", "ups"):
        return ".".join((prefix, *rest))
    return ".".join((prefix, *_inside(rest)))


def _inside(rest: list[str]) -> Iterator[str]:
    """`blocks.J.conv1.weight` and `attentions.J.q.weight` of a level, `attention.q.weight` of the middle."""
    if rest[0] == "blocks":
        layer = {"shortcut": "conv_shortcut"}.get(rest[2], rest[2])
        yield from ("resnets", rest[1], layer, *rest[3:])
        return
    number = rest[1] if rest[0] == "attentions" else "0"
    yield from ("attentions", number, OF_ATTENTION[rest[-2]], rest[-1])


def import_diffusers(folder: Path | str) -> tuple[Config, dict[str, Tensor]]:
    """A folder that diffusers saved: our settings, and weights under the names of our network `model`.

    Raises:
        DataError: it holds no such model, or tensors are missing.
        ConfigError: a layout that ours does not have.
    """
    from safetensors.torch import load_file

    where = Path(folder)
    missing = next((n for n in ("config.json", WEIGHTS) if not (where / n).is_file()), None)
    if missing is not None:
        raise DataError(f"{where} has no {missing}; name a folder that diffusers saved")
    config = config_from_diffusers(json.loads((where / "config.json").read_text()))
    theirs = load_file(where / WEIGHTS)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Autoencoder(config).named_parameters()}
    found = {}
    for ours, name in names_in_diffusers(config).items():
        if name not in theirs:
            raise DataError(f"{where / WEIGHTS} has no {name}; its config.json is of another model")
        # Older files hold the attention's linear layers as 1x1 convolutions.
        found[ours] = theirs.pop(name).float().reshape(shapes[ours])
    if theirs:
        raise ConfigError(
            f"{where / WEIGHTS} has {next(iter(theirs))}, which nothing here corresponds to"
        )
    return config, found
