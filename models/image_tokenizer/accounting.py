"""Parameters, FLOPs and activations of image tokenizers by arithmetic alone; imports no torch.

The networks are walked as they are built: each layer says how many weights it multiplies at each place, at what stride it runs,
and for the images of which ratios. One FLOP is a multiplication or an addition; norms and activations are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .config import Config

__all__ = ["Layer", "count_parameters", "forward_flops", "layers", "training_flops"]

PATCH_KERNEL = 16
"""Weights of the discriminator's 4x4 kernels."""
VGG_CHANNELS: tuple[int, ...] = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_STRIDES: tuple[int, ...] = (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16)
RANDOM_CHANNELS = (3, 32, 64, 128)


@dataclass(frozen=True)
class Layer:
    """One convolution, norm or attention.

    Args:
        part: encoder or decoder.
        unit: of sharding and recomputation; "" is in none.
        parameters: all it has.
        multiplied: of them, those that each place is multiplied by.
        stride: pixels a side of a place it gives; None: as many as the image's ratio.
        ratios: of the images that pass it.
        attention: width of an attention over all places, 0 of other layers.
        kept: values a place that autograd keeps of its inputs.
    """

    part: str
    unit: str
    parameters: int
    multiplied: int
    stride: int | None
    ratios: tuple[int, ...]
    attention: int = 0
    kept: int = 0


@dataclass(frozen=True)
class _Place:
    part: str
    unit: str
    stride: int | None
    ratios: tuple[int, ...]

    def conv(self, inputs: int, outputs: int, kernel: int = 3) -> Layer:
        weights = inputs * outputs * kernel**2
        p = self
        return Layer(p.part, p.unit, weights + outputs, weights, p.stride, p.ratios, 0, inputs)

    def norm(self, channels: int) -> Layer:
        # The activation after it keeps its input too.
        p = self
        return Layer(p.part, p.unit, 2 * channels, 0, p.stride, p.ratios, 0, 2 * channels)

    def block(self, inputs: int, outputs: int) -> Iterator[Layer]:
        yield self.norm(inputs)
        yield self.conv(inputs, outputs)
        yield self.norm(outputs)
        yield self.conv(outputs, outputs)
        if inputs != outputs:
            yield self.conv(inputs, outputs, 1)

    def attention(self, c: int) -> Iterator[Layer]:
        yield self.norm(c)
        p, weights = self, 4 * c * c
        yield Layer(p.part, p.unit, weights + 4 * c, weights, p.stride, p.ratios, c, 5 * c)


def layers(config: Config) -> Iterator[Layer]:
    """Encoder and decoder, in the order of the forward pass, without the bottleneck's 1x1 convolutions."""
    yield from _encoder(config)
    yield from _decoder(config)


def _passing(config: Config, level: int) -> tuple[int, ...]:
    return tuple(ratio for ratio in config.all_ratios if ratio >= 2**level)


def _encoder(config: Config) -> Iterator[Layer]:
    widths, last = config.channels, len(config.channels) - 1
    yield _Place("encoder", "", 1, config.all_ratios).conv(config.in_channels, widths[0])
    before = widths[0]
    for level, width in enumerate(widths):
        place = _Place("encoder", f"level {level}", 2**level, _passing(config, level))
        for _ in range(config.encoder_blocks):
            yield from place.block(before, width)
            before = width
            if config.lowest_attention and level == last:
                yield from place.attention(width)
        if level < last:
            below = _passing(config, level + 1)
            yield _Place("encoder", "", 2 ** (level + 1), below).conv(width, width)
    for ratio in config.ratios or ():
        level = ratio.bit_length() - 1
        place = _Place("encoder", f"adapter {ratio}", ratio, (ratio,))
        yield from place.block(widths[level], widths[-1])
    yield from _middle(config, "encoder")
    end = _Place("encoder", "", None, config.all_ratios)
    yield end.norm(widths[-1])
    yield end.conv(widths[-1], config.moments)


def _middle(config: Config, part: str) -> Iterator[Layer]:
    place = _Place(part, "middle", None, config.all_ratios)
    for number in range(config.middle_blocks):
        yield from place.block(config.channels[-1], config.channels[-1])
        if number == 0 and config.middle_attention:
            yield from place.attention(config.channels[-1])


def _decoder(config: Config) -> Iterator[Layer]:
    widths, last = config.channels, len(config.channels) - 1
    everyone = config.all_ratios
    yield _Place("decoder", "", None, everyone).conv(config.latent_channels, widths[-1])
    yield from _middle(config, "decoder")
    for ratio in config.ratios or ():
        entered = widths[min(ratio.bit_length(), last)]
        place = _Place("decoder", f"adapter {ratio}", ratio, (ratio,))
        yield from place.block(widths[-1], entered)
    before = widths[-1]
    for level in reversed(range(last + 1)):
        place = _Place("decoder", f"level {level}", 2**level, _passing(config, level))
        for _ in range(config.decoder_blocks):
            yield from place.block(before, widths[level])
            before = widths[level]
            if config.lowest_attention and level == last:
                yield from place.attention(before)
        if level:
            above = _Place("decoder", "", 2 ** (level - 1), _passing(config, level))
            yield above.conv(before, before)
    end = _Place("decoder", "", 1, everyone)
    yield end.norm(widths[0])
    yield end.conv(widths[0], config.in_channels)


def count_parameters(config: Config) -> dict[str, int]:
    """By part, all that is trained; `head` is the decoder's last convolution, of `blocks` the rest of encoder and decoder."""
    found = list(layers(config))
    # Planning wants equal blocks; what is outside of units is small and goes with them.
    head = found[-1].parameters
    sizes = {"blocks": sum(layer.parameters for layer in found) - head, "head": head}
    sizes["bottleneck"] = sum(count for count, _ in _bottleneck(config))
    if config.kind == "vq":
        sizes["codebook"] = config.quantizer.codes * config.quantizer.width
    sizes["predictor"] = predictor_parameters(config)
    sizes["discriminator"] = sum(count for count, *_ in _discriminator(config))
    return {name: count for name, count in sizes.items() if count}


def _bottleneck(config: Config) -> Iterator[tuple[int, int]]:
    """(parameters, of them multiplied) of both 1x1 convolutions."""
    if not config.quant_conv:
        return
    z = config.latent_channels
    inner = config.quantizer.width if config.kind == "vq" else config.moments
    outer = config.quantizer.width if config.kind == "vq" else z
    for inputs, outputs in ((config.moments, inner), (outer, z)):
        yield inputs * outputs + outputs, inputs * outputs


def predictor_parameters(config: Config) -> int:
    crt = config.crt
    if crt is None:
        return 0
    d, w = config.quantizer.width, crt.width
    ends = (d * w + w) + (w * d + d) + w + d + config.tokens * w
    return ends + crt.layers * (_predictor_weights(config) + 2 * w)


def _predictor_weights(config: Config) -> int:
    assert config.crt is not None
    return 4 * config.crt.width**2 + 3 * config.crt.width * config.crt.ffn


def _discriminator(config: Config) -> Iterator[tuple[int, int, float]]:
    """(parameters, of them multiplied, places) of each layer."""
    gan = config.adversarial
    if gan is None:
        return
    side, inputs = config.size, config.in_channels
    widths = [gan.width * min(2**layer, 8) for layer in range(gan.layers + 1)]
    for place, width in enumerate([*widths, 1]):
        is_first, is_last = place == 0, place == len(widths)
        side = side // 2 if place < gan.layers else side - 1
        weights = inputs * width * PATCH_KERNEL
        # A bias, or a norm's scale and shift.
        extra = width if is_first or is_last else 2 * width
        yield weights + extra, weights, float(max(side, 0) ** 2)
        inputs = width


def forward_flops(config: Config, ratio: int | None = None) -> dict[str, float]:
    """FLOPs of one picture's forward pass, by part.

    Args:
        ratio: of nested; None is the mean of all.
    """
    ratios = (ratio,) if ratio is not None else config.all_ratios
    found = {"encoder": 0.0, "decoder": 0.0}
    for r in ratios:
        for layer in layers(config):
            if r in layer.ratios:
                found[layer.part] += _layer_flops(config, layer, r) / len(ratios)
    places = sum(config.side(r) ** 2 for r in ratios) / len(ratios)
    bottleneck = [weights for _, weights in _bottleneck(config)]
    if bottleneck:
        found["encoder"] += 2.0 * bottleneck[0] * places
        found["decoder"] += 2.0 * bottleneck[1] * places
    if config.kind == "vq":
        found["codebook"] = 2.0 * config.quantizer.codes * config.quantizer.width * places
    if config.crt is not None:
        n, d, w = config.tokens, config.quantizer.width, config.crt.width
        attention = config.crt.layers * 4.0 * n * n * w
        products = config.crt.layers * _predictor_weights(config) + 2 * d * w
        found["predictor"] = 2.0 * products * n + attention
    if config.adversarial is not None:
        found["discriminator"] = sum(2.0 * weights * n for _, weights, n in _discriminator(config))
    found["perceptual"] = _perceptual_flops(config)
    return {name: flops for name, flops in found.items() if flops}


def _layer_flops(config: Config, layer: Layer, ratio: int) -> float:
    places = (config.padded_size // (layer.stride or ratio)) ** 2
    return 2.0 * layer.multiplied * places + 4.0 * layer.attention * places**2


def _perceptual_flops(config: Config) -> float:
    """Of one picture through the network that compares features."""
    kind = config.reconstruction.perceptual
    if kind.startswith("file:"):
        widths, strides = VGG_CHANNELS, VGG_STRIDES
    elif kind == "random_features":
        widths, strides = RANDOM_CHANNELS, (1, 2, 4)
    else:
        return 0.0
    pairs = zip(itertools.pairwise(widths), strides, strict=True)
    return sum(2.0 * a * b * 9 * (config.size / stride) ** 2 for (a, b), stride in pairs)


def training_flops(config: Config) -> float:
    """FLOPs a picture of a step in which all networks are trained.

    Encoder, decoder and predictor: 3 forward passes' worth; the codebook is searched once. Perceptual features: both pictures,
    and back through the made one. Discriminator: in the generator's phase one picture there and back, in its own two of 3.
    """
    times = {"codebook": 1.0, "perceptual": 3.0, "discriminator": 2.0 + 6.0}
    return sum(times.get(name, 3.0) * flops for name, flops in forward_flops(config).items())
