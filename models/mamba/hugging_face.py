"""Names, shapes and settings of Hugging Face's Mamba checkpoints, both ways; mamba-ssm's on import.

Imports no torch and no transformers. No weight is changed on the way. A Mixture-of-Mamba has no class there: it is exported as one
dense model for each modality of ids, which is what it is to inputs of that modality alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..hugging_face_plain import arrange, companion_runs, companions, with_companions
from .config import Config

if TYPE_CHECKING:
    pass

__all__ = [
    "CONFIG_KEYS",
    "MODEL_TYPES",
    "READS_BYTES",
    "arrange",
    "check_exportable",
    "companion_runs",
    "companions",
    "export_forms",
    "from_hugging_face_config",
    "from_hugging_face_name",
    "longest_positions",
    "parameter_shapes",
    "to_hugging_face_config",
    "to_hugging_face_name",
    "with_companions",
]

MODEL_TYPES = ("mamba",)
CONFIG_KEYS = ("d_model", "n_layer", "ssm_cfg")
"""Of mamba-ssm's config.json, which names no model type."""
READS_BYTES = False

_OUTSIDE = {
    "embedding.tokens.weight": "backbone.embeddings.weight",
    "backbone.norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
_SSM_OUTSIDE = {"backbone.embedding.weight": "embedding.tokens.weight"}
_INSIDE = {
    "norm.weight": "norm.weight",
    "in_proj.weight": "mixer.in_proj.weight",
    "conv1d.weight": "mixer.conv1d.weight",
    "conv1d.bias": "mixer.conv1d.bias",
    "x_proj.weight": "mixer.x_proj.weight",
    "dt_proj.weight": "mixer.dt_proj.weight",
    "ssm.dt_bias": "mixer.dt_proj.bias",
    "ssm.A_log": "mixer.A_log",
    "ssm.D": "mixer.D",
    "out_proj.weight": "mixer.out_proj.weight",
}
# Parameters of a block -> the name in `split` that gives each modality its own.
_SPLIT = {
    "norm.weight": "norm",
    "in_proj.weight": "in_proj",
    "x_proj.weight": "x_proj",
    "dt_proj.weight": "dt_proj",
    "ssm.dt_bias": "dt_proj",
    "out_proj.weight": "out_proj",
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
# What a config.json leaves out has the value of its class.
_CLASS_DEFAULTS: dict[str, Any] = {
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": "auto",
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "tie_word_embeddings": True,
    "rescale_prenorm_residual": False,
    "time_step_min": 1e-3,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
}
# Settings that would change the function, with the one value that ours has.
_FIXED = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}
_SSM_SIZES = ("vocab_size", "d_model", "n_layer")
_SSM_LAYER = {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank"}
_SSM_FIXED: dict[str, Any] = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}


def longest_positions(theirs: Mapping[str, Any]) -> int | None:
    """Tokens their model is said to take: they do not say."""
    return None


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of a dense model by our name, in the model's order, without building it."""
    d, inner, rank = config.d_model, config.d_inner, config.rank
    block: dict[str, tuple[int, ...]] = {
        "norm.weight": (d,),
        "in_proj.weight": (2 * inner, d),
        "conv1d.weight": (inner, 1, config.d_conv),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * config.d_state, inner),
        "dt_proj.weight": (inner, rank),
        "ssm.A_log": (inner, config.d_state),
        "ssm.D": (inner,),
        "ssm.dt_bias": (inner,),
        "out_proj.weight": (d, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (config.vocab_size, d)}
    for layer in range(config.n_blocks):
        shapes |= {f"backbone.blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes["backbone.norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, d)
    return shapes


def export_forms(config: Config) -> dict[str, tuple[Config, Callable[[str], str]]]:
    """Folder inside the export -> the dense model there, and the run's name of each of its parameters."""
    if len(config.modalities) == 1:
        return {"": (config, str)}
    return {
        modality: (config.dense(), functools.partial(_stored_name, config, modality))
        for modality in config.id_modalities
    }


def _stored_name(config: Config, modality: str, name: str) -> str:
    found = re.fullmatch(r"backbone\.blocks\.\d+\.(.+)", name)
    part = _SPLIT.get(found.group(1)) if found else None
    return f"{name}.{modality}" if part and getattr(config.splits, part) else name


def to_hugging_face_name(name: str, config: Config) -> str:
    """Their name of our parameter.

    Raises:
        ConfigError: the layout has no place for it.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = re.fullmatch(r"backbone\.blocks\.(\d+)\.(.+)", name)
    if found is None or found.group(2) not in _INSIDE:
        raise ConfigError(f"{name} has no place in a Hugging Face Mamba checkpoint")
    return f"backbone.layers.{found.group(1)}.{_INSIDE[found.group(2)]}"


def from_hugging_face_name(name: str, config: Config) -> str | None:
    """Our name of their parameter, in Hugging Face's or mamba-ssm's naming; None for what is not a parameter.

    Raises:
        ConfigError: an unknown name.
    """
    if name == "lm_head.weight" and config.tie_embeddings:
        return None
    outside = {**{theirs: ours for ours, theirs in _OUTSIDE.items()}, **_SSM_OUTSIDE}
    if name in outside:
        return outside[name]
    inside = {theirs: ours for ours, theirs in _INSIDE.items()}
    found = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)
    if found and found.group(2) in inside:
        return f"backbone.blocks.{found.group(1)}.{inside[found.group(2)]}"
    raise ConfigError(
        f"tensor {name!r} is not one a Mamba checkpoint has; is config.json of the same model?"
    )


def check_exportable(config: Config) -> str:
    """The Hugging Face family that has this function.

    Raises:
        ConfigError: it cannot express the configuration.
    """
    if not config.has_dt_bias:
        raise ConfigError(
            "model.compat_drop_dt_bias leaves out a bias that Hugging Face's Mamba has; it cannot be exported"
        )
    if config.special_ids:
        raise ConfigError(
            "model.special_ids have embeddings beside the table, which Hugging Face's Mamba has no place for; it cannot be exported"
        )
    return "Mamba"


def to_hugging_face_config(
    config: Config,
    *,
    max_positions: int,
    eos_id: int | None,
    bos_id: int | None,
    pad_id: int | None,
    dtype: str,
) -> dict[str, Any]:
    """A complete config.json of a dense model; any number of positions is fine, so `max_positions` is not said.

    Raises:
        ConfigError: their class cannot express the configuration.
    """
    check_exportable(config)
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "bos_token_id": bos_id,
        "conv_kernel": config.d_conv,
        "dtype": dtype,
        "eos_token_id": eos_id,
        "expand": config.expand,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.d_inner,
        "layer_norm_epsilon": config.norm_eps,
        "num_hidden_layers": config.n_blocks,
        "pad_token_id": pad_id,
        "rescale_prenorm_residual": config.rescale_out,
        "residual_in_fp32": config.residual_fp32,
        "state_size": config.d_state,
        "tie_word_embeddings": config.tie_embeddings,
        "time_step_floor": config.dt_floor,
        "time_step_max": config.dt_max,
        "time_step_min": config.dt_min,
        "time_step_rank": config.rank,
        "torch_dtype": dtype,
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": config.vocab_size,
    }


def from_hugging_face_config(theirs: Mapping[str, Any]) -> Config:
    """Our settings for their config.json, of transformers or of mamba-ssm.

    Raises:
        ConfigError: another architecture, a setting ours does not have, or one that is missing.
    """
    if theirs.get("model_type") is None and "ssm_cfg" in theirs:
        return _from_mamba_ssm(theirs)
    if theirs.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"config.json has model_type {theirs.get('model_type')!r}; only mamba can be imported"
        )
    _refuse_others(theirs, _FIXED)
    _refuse_missing(theirs, _SIZES)
    theirs = {**_CLASS_DEFAULTS, **{k: v for k, v in theirs.items() if v is not None}}
    width, rank = theirs["hidden_size"], theirs["time_step_rank"]
    inner = theirs.get("intermediate_size", theirs["expand"] * width)
    if inner != theirs["expand"] * width:
        raise ConfigError(
            f"config.json has intermediate_size={inner}; only expand * hidden_size = {theirs['expand'] * width} can be imported"
        )
    return _validated(
        {
            "vocab_size": theirs["vocab_size"],
            "n_layers": theirs["num_hidden_layers"],
            "d_model": width,
            "d_state": theirs["state_size"],
            "d_conv": theirs["conv_kernel"],
            "expand": theirs["expand"],
            "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
            "norm_eps": theirs["layer_norm_epsilon"],
            "residual_fp32": theirs["residual_in_fp32"],
            "tie_embeddings": theirs["tie_word_embeddings"],
            "rescale_out": theirs["rescale_prenorm_residual"],
            "dt_min": theirs["time_step_min"],
            "dt_max": theirs["time_step_max"],
            "dt_floor": theirs["time_step_floor"],
        }
    )


def _from_mamba_ssm(theirs: Mapping[str, Any]) -> Config:
    _refuse_missing(theirs, _SSM_SIZES)
    _refuse_others(theirs, _SSM_FIXED)
    layer = dict(theirs.get("ssm_cfg") or {})
    kind = layer.pop("layer", "Mamba1")
    unknown = sorted(layer.keys() - _SSM_LAYER.keys())
    if kind != "Mamba1" or unknown:
        found = f"layer={kind!r}" if kind != "Mamba1" else f"{unknown[0]}={layer[unknown[0]]!r}"
        raise ConfigError(f"config.json's ssm_cfg has {found}; only Mamba1 can be imported")
    multiple = theirs.get("pad_vocab_size_multiple", 8)
    return _validated(
        {
            "vocab_size": -(-theirs["vocab_size"] // multiple) * multiple,
            "n_layers": theirs["n_layer"],
            "d_model": theirs["d_model"],
            "residual_fp32": theirs.get("residual_in_fp32", True),
            "tie_embeddings": theirs.get("tie_embeddings", True),
            **{_SSM_LAYER[key]: value for key, value in layer.items()},
        }
    )


def _refuse_others(theirs: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, wanted in fixed.items():
        found = theirs.get(key)
        if found is not None and found != wanted:
            raise ConfigError(f"config.json has {key}={found!r}; only {wanted!r} can be imported")


def _refuse_missing(theirs: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if theirs.get(key) is None]
    if missing:
        raise ConfigError(
            f"config.json does not say {missing[0]}; is it the model's own config.json?"
        )


def _validated(ours: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(ours)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where}: {first['msg']}, found {first['input']!r}" if where else first["msg"]
        raise ConfigError(f"config.json cannot be imported: {what}") from error
