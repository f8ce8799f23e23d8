"""Samples of models of text, images and speech: who sees what, what depends on what, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from weft.models import build_model
from weft.models.errors import ConfigError
from weft.models.mixture_of_transformers.config import Config
from weft.trainer.data.interleaved.codecs import GrayCodes, PixelCodec
from weft.trainer.data.interleaved.config import InterleavedConfig
from weft.trainer.data.interleaved.layout import ImageLayout, image_grid
from weft.trainer.data.interleaved.vocabulary import InterleavedVocabulary
from weft.trainer.data.vocabulary import ByteVocabulary
from weft.trainer.interleaved_generation import ImageSampling, InterleavedGenerator
from weft.trainer.sampling import Sampling

WARM = Sampling(temperature=1.0)
SHAPE = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 24}


def latents() -> InterleavedGenerator:
    """Continuous images of 4 x 4 pixels, 4 positions each."""
    data = InterleavedConfig(
        image={"codec": "pixels", "size": 4, "channels": 1, "patch_size": 2}  # type: ignore[arg-type]
    )
    vocabulary = InterleavedVocabulary(ByteVocabulary(), data)
    image = {"channels": 1, "size": 4, "patch": 2, "time_width": 8, "prediction": "v"}
    config = Config(
        vocab_size=vocabulary.size, modalities=("text", "image"), image=image, **SHAPE  # type: ignore[arg-type]
    )  # fmt: skip
    model = build_model(config, seed=2)
    torch.nn.init.normal_(model.stem.output.weight, std=0.3)
    codec = PixelCodec(4, 1)
    grid = image_grid("latents", codec.shape, 2, "images")
    layout = ImageLayout("latents", codec.shape, grid, scale=1.3, shift=0.2, minimum=-2, maximum=2)
    return InterleavedGenerator(model, vocabulary, layout, codec)  # type: ignore[arg-type]


def codes() -> InterleavedGenerator:
    """Images of 3 x 3 brightness codes, and speech."""
    data = InterleavedConfig(
        modalities=("text", "image", "speech"),
        image={"kind": "codes", "codec": "gray-codes", "size": 3, "codes": 5, "channels": 1},  # type: ignore[arg-type]
        speech={"codes": 7},  # type: ignore[arg-type]
    )
    vocabulary = InterleavedVocabulary(ByteVocabulary(), data)
    config = Config(vocab_size=vocabulary.size, modalities=data.modalities, **SHAPE)  # type: ignore[arg-type]
    model = build_model(config, seed=2)
    codec = GrayCodes(3, 5)
    grid = image_grid("codes", codec.shape, 1, "images")
    layout = ImageLayout("codes", codec.shape, grid)
    return InterleavedGenerator(model, vocabulary, layout, codec)  # type: ignore[arg-type]


BOTH = pytest.mark.parametrize("make", [latents, codes], ids=["latents", "codes"])
FEW = ImageSampling(steps=4)


def image_of(made: Any) -> np.ndarray:
    (picture,) = made.images
    return picture


@BOTH
def test_an_image_does_not_depend_on_its_neighbours(make: Any) -> None:
    generator = make()
    prompts = [["one"], ["two"], ["one"]]
    together = generator(prompts, make="image", sampling=WARM, images=FEW)
    alone = generator([["two"]], make="image", sampling=WARM, images=FEW)
    assert np.array_equal(image_of(together[1]), image_of(alone[0]))
    assert not np.array_equal(image_of(together[0]), image_of(together[2]))
    again = generator(prompts, make="image", sampling=WARM, images=FEW, batch_size=1)
    for a, b in zip(together, again, strict=True):
        assert np.array_equal(image_of(a), image_of(b))
    other = generator(prompts, make="image", sampling=WARM, images=FEW, seed=1)
    assert not np.array_equal(image_of(together[1]), image_of(other[1]))


@BOTH
def test_guidance_leads_away_from_what_no_prompt_gives(make: Any) -> None:
    generator = make()

    def image(guidance: float, *prompt: str) -> np.ndarray:
        settings = ImageSampling(steps=4, guidance=guidance)
        return image_of(generator([prompt], make="image", sampling=WARM, images=settings)[0])

    assert not np.array_equal(image(1.0, "one"), image(80.0, "one"))
    # Where nothing comes before the image, there is nothing to lead away from.
    assert np.array_equal(image(1.0), image(80.0))


def test_fewer_steps_are_taken_as_asked() -> None:
    generator = latents()
    calls = []
    denoise = generator.network.denoise

    def counted(x: torch.Tensor, t: torch.Tensor, cache: Any) -> torch.Tensor:
        calls.append(int(t[0]))
        return denoise(x, t, cache)

    generator.network.denoise = counted  # type: ignore[method-assign]
    generator([["a"]], make="image", images=ImageSampling(steps=3, guidance=2.0))
    assert calls == [999, 999, 500, 500, 0, 0]


@BOTH
def test_text_after_a_picture_depends_on_the_picture_and_on_no_neighbour(make: Any) -> None:
    generator = make()
    side = generator.codec.size
    picture = (np.arange(side * side).reshape(side, side, 1) * 255 // side**2).astype(np.uint8)
    first, second = [picture, "x"], [255 - picture, "x"]
    settings = {"make": "text", "max_new_tokens": 8, "sampling": WARM}
    together = generator([first, second], **settings)
    assert generator([second], **settings)[0].text == together[1].text
    logits = []
    read = generator.network.forward_cached

    def kept(*arguments: Any) -> torch.Tensor:
        logits.append(read(*arguments))
        return logits[-1]

    generator.network.forward_cached = kept
    generator([first, second], make="text", max_new_tokens=1)
    assert not torch.allclose(logits[-1][0], logits[-1][1])


def test_codes_stay_among_their_own() -> None:
    generator = codes()
    made = generator([["a"], ["b"]], make="speech", max_new_tokens=6, sampling=WARM)
    for one in made:
        (speech,) = one.parts
        assert isinstance(speech, list)
        assert len(speech) <= 6
        assert all(0 <= code < 7 for code in speech)
    pictures = generator([["a"]], make="image", sampling=WARM)
    assert set(np.unique(image_of(pictures[0]))) <= {0, 64, 128, 191, 255}
    text = generator([["a"]] * 3, make="text", max_new_tokens=20, sampling=WARM)
    assert all(isinstance(part, str) for one in text for part in one.parts)


@BOTH
def test_the_model_may_open_images_itself(make: Any) -> None:
    generator = make()
    v, read = generator.vocabulary, generator.network.forward_cached
    wanted = {ord("a") + 4: ord("b") + 4, ord("b") + 4: v.boi_id, v.eoi_id: v.eos_id}
    seen = []

    def scripted(tokens: torch.Tensor, lengths: Any, cache: Any, modality: torch.Tensor) -> torch.Tensor:  # fmt: skip
        seen.extend(tokens[0].tolist())
        logits = read(tokens, lengths, cache, modality)
        if int(tokens[0, -1]) in wanted and not modality.any():
            logits[0, -1, wanted[int(tokens[0, -1])]] = 1e9
        return logits

    generator.network.forward_cached = scripted
    (made,) = generator([["a"]], make="any", max_new_tokens=12, images=FEW)
    assert made.finish_reason == "eos"
    text, picture = made.parts
    assert text == "b"
    assert isinstance(picture, np.ndarray)
    opening = [1, ord("a") + 4, ord("b") + 4, v.boi_id]
    codes_read = [] if make is latents else seen[4:-1]
    assert seen == [*opening, *codes_read, v.eoi_id]
    # All codes are read: the ones that were drawn, and once more for what comes after the image.
    assert make is latents or len(codes_read) == 9


def test_what_is_refused() -> None:
    generator = latents()
    with pytest.raises(ConfigError, match="this run has no speech: its modalities are text, image"):
        generator([["a"]], make="speech")
    generator.codec = None
    with pytest.raises(ConfigError, match="came without a codec"):
        generator([["a"]], make="image")
    with pytest.raises(ConfigError, match="steps are 1 or more"):
        ImageSampling(steps=0)
