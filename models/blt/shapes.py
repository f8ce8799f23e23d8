"""Names and shapes of BLT's parameters, in the network's order, without building it; imports no torch."""

from __future__ import annotations

from ..transformer.hugging_face import parameter_shapes as transformer_shapes
from .config import Config, LocalConfig

__all__ = ["parameter_shapes"]

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: Config) -> Shapes:
    """Every parameter of the network `model`."""
    h_e, h_g, h_d = config.encoder.d_model, config.latent.d_model, config.decoder.d_model
    encoder_cross, decoder_cross = config.cross_layers
    shapes = _named("", transformer_shapes(config.stack("encoder")), "embedding.")
    if encoder_cross and config.encoder.queries == "learned":
        shapes["encoder.queries"] = (config.patch_vectors, h_e)
    shapes |= _blocks(config, "encoder")
    shapes |= _cross(config.encoder, "encoder", encoder_cross)
    if encoder_cross and config.encoder.queries != "learned":
        shapes["encoder.query_proj.weight"] = (config.patch_vectors * h_e, config.pooled_width)
    if config.patch_width != h_g:
        shapes["latent.input_proj.weight"] = (h_g, config.patch_width)
    shapes |= _blocks(config, "latent")
    shapes["decoder.latent_proj.weight"] = (config.read_vectors * h_d, h_g)
    if h_e != h_d:
        shapes["decoder.input_proj.weight"] = (h_d, h_e)
    shapes |= _cross(config.decoder, "decoder", decoder_cross)
    shapes |= _blocks(config, "decoder")
    return shapes | {"decoder.norm.weight": (h_d,), "head.weight": (config.vocab_size, h_d)}


def _blocks(config: Config, stack: str) -> Shapes:
    return _named(f"{stack}.", transformer_shapes(config.stack(stack)), "blocks.")


def _named(prefix: str, shapes: Shapes, start: str) -> Shapes:
    return {f"{prefix}{name}": shape for name, shape in shapes.items() if name.startswith(start)}


def _cross(part: LocalConfig, stack: str, layers: int) -> Shapes:
    d, inner = part.d_model, part.cross_width
    one: Shapes = {
        "q_norm": (d,),
        "kv_norm": (d,),
        "q_proj": (inner, d),
        "k_proj": (inner, d),
        "v_proj": (inner, d),
        "o_proj": (d, inner),
    }
    return {
        f"{stack}.cross.{layer}.{name}.weight": shape
        for layer in range(layers)
        for name, shape in one.items()
    }
