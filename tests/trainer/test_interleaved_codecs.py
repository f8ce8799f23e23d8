"""Images from files to latents or codes and back, and the documents that are made on the machine."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from weft.models.errors import ConfigError, DataError, LaunchError
from weft.trainer.data.config import DataConfig
from weft.trainer.data.dataset import open_data
from weft.trainer.data.interleaved import speech
from weft.trainer.data.interleaved.builtin import DIGIT_NAMES, open_builtin
from weft.trainer.data.interleaved.codecs import GrayCodes, PixelCodec, open_codec
from weft.trainer.data.interleaved.config import ImageConfig, InterleavedConfig
from weft.trainer.data.interleaved.images import decode_image, fit_image, write_image_grid
from weft.trainer.data.interleaved.layout import LatentStatistics


def encoded(image: Image.Image, kind: str = "PNG", **rest: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **rest)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("LA", (50, 255), (50, 50, 50)),
        ("I;16", 257 * 90, (90, 90, 90)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(mode: str, colour: object, expected: tuple) -> None:
    pixels = decode_image(encoded(Image.new(mode, (3, 2), colour)), "x")
    assert pixels.shape == (2, 3, 3)
    assert (pixels == expected).all()


def test_print_colours_palettes_and_turned_pictures() -> None:
    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")
    assert cmyk[0, 0, 0] > 200 > 60 > cmyk[0, 0, 1]
    palette = Image.new("RGB", (4, 4), (9, 99, 199)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode_image(encoded(palette), "x")[0, 0].tolist() == [9, 99, 199]
    lying = Image.new("RGB", (4, 2), (0, 0, 0))
    exif = lying.getexif()
    exif[0x0112] = 6
    assert decode_image(encoded(lying, exif=exif), "x").shape == (4, 2, 3)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"a\.png is not an image that can be read: no known image format; fetch"
    ):
        decode_image(b"hello", "a.png")


def test_the_middle_is_kept() -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 100
    assert (fit_image(wide, 4, 3) == 100).all()
    assert fit_image(wide, 2, 1).shape == (2, 2, 1)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    assert np.array_equal(fit_image(grey, 4, 1), grey)
    assert fit_image(grey, 4, 3).shape == (4, 4, 3)


def test_pixels_come_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8)
    codec = PixelCodec(6, 3)
    latents = codec.encode(pixels)
    assert (latents.shape, latents.dtype) == ((5, 3, 6, 6), np.float32)
    assert (float(latents.min()), float(latents.max())) == (-1, 1)
    assert np.array_equal(codec.decode(latents), pixels)
    assert np.array_equal(codec.decode(latents.astype(np.float16)), pixels)


def test_gray_codes_come_back() -> None:
    levels = np.arange(17)
    codec = GrayCodes(1, 17)
    pixels = np.rint(levels * 255 / 16).astype(np.uint8).reshape(17, 1, 1, 1)
    codes = codec.encode(pixels)
    assert codes[:, 0].tolist() == levels.tolist()
    assert np.array_equal(codec.decode(codes), pixels)


def test_codecs_are_refused_where_settings_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no size of its own"):
        open_codec(ImageConfig())
    with pytest.raises(ValueError, match="codec gray-codes makes codes, not latents"):
        ImageConfig(codec="gray-codes")
    with pytest.raises(ValueError, match="is none of pixels, gray-codes"):
        ImageConfig(codec="jpeg")
    with pytest.raises(DataError, match=r"has no config\.json; name a local folder"):
        open_codec(ImageConfig(codec=f"vae:{tmp_path}"))
    assert open_codec(ImageConfig(codec=None)) is None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny AutoencoderKL and VQModel with random weights, as diffusers saves them."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shared = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    diffusers.AutoencoderKL(latent_channels=4, **shared).save_pretrained(folder / "vae")
    vq = diffusers.VQModel(latent_channels=3, num_vq_embeddings=12, **shared)
    vq.save_pretrained(folder / "vq")
    return folder


def test_latents_of_a_diffusers_vae(models: Path) -> None:
    codec = open_codec(ImageConfig(codec=f"vae:{models / 'vae'}"))
    assert (codec.size, codec.channels, codec.shape) == (16, 3, (4, 8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (18, 16, 16, 3)).astype(np.uint8)
    latents = codec.encode(pixels)
    assert latents.shape == (18, 4, 8, 8)
    assert np.allclose(codec.encode(pixels[17:]), latents[17:], atol=1e-5)
    assert codec.decode(latents).shape == pixels.shape
    assert codec.decode(latents).dtype == np.uint8
    with pytest.raises(ConfigError, match="15 does not divide by 2"):
        open_codec(ImageConfig(codec=f"vae:{models / 'vae'}", size=15))
    with pytest.raises(DataError, match="holds a VQModel, not a AutoencoderKL"):
        open_codec(ImageConfig(codec=f"vae:{models / 'vq'}"))


def test_codes_of_a_diffusers_vq_model(models: Path) -> None:
    config = ImageConfig(kind="codes", codec=f"vq:{models / 'vq'}", codes=12)
    codec = open_codec(config)
    assert (codec.kind, codec.shape) == ("codes", (8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    codes = codec.encode(pixels)
    assert (codes.shape, codes.dtype) == ((3, 64), np.int64)
    assert 0 <= codes.min() <= codes.max() < 12
    assert codec.decode(codes).shape == pixels.shape
    with pytest.raises(
        ConfigError, match=r"codes: 8192, but the codebook of .* has 12; set it to 12"
    ):
        open_codec(config.model_copy(update={"codes": 8192}))


def test_a_dataset_of_vae_latents(models: Path, tmp_path: Path) -> None:
    settings = {"image": {"codec": f"vae:{models / 'vae'}"}}
    source = {"name": "shapes", "path": "builtin:shapes:size=16,images=20"}
    data = open_data(
        DataConfig(
            sources=[source], sequence_length=64, cache_dir=str(tmp_path), interleaved=settings
        )
    )
    assert data.images.grid == (4, 4)
    moved = shutil.copytree(models / "vae", tmp_path / "elsewhere")
    other = {"image": {"codec": f"vae:{moved}"}}
    again = open_data(
        DataConfig(sources=[source], sequence_length=64, cache_dir=str(tmp_path), interleaved=other)
    )
    assert again.sources[0].folder == data.sources[0].folder


def test_statistics_join_in_any_order() -> None:
    values = np.random.default_rng(0).normal(2, 3, (10, 4)).astype(np.float32)
    parts = [LatentStatistics.of(part) for part in values]
    whole, back = LatentStatistics.join(parts), LatentStatistics.join(parts[::-1])
    assert whole == back == LatentStatistics.load(whole.dump())
    assert whole.mean == pytest.approx(values.mean(dtype=np.float64))
    assert whole.std == pytest.approx(values.std(dtype=np.float64))


def test_digits_match_their_captions() -> None:
    import sklearn.datasets

    made = open_builtin("builtin:digits-captions")
    documents = list(made.documents(0, made.count, InterleavedConfig()))
    found = sklearn.datasets.load_digits()
    assert len(documents) == 1797
    assert [d.parts[0].value.decode() for d in documents] == [DIGIT_NAMES[t] for t in found.target]
    pixels = np.stack([d.parts[1].value for d in documents])[..., 0]
    assert np.array_equal(np.rint(pixels * (16 / 255)), found.images)


def test_shapes_are_where_their_captions_say() -> None:
    made = open_builtin("builtin:shapes:images=200,size=12,noise=0")
    documents = list(made.documents(0, 200, InterleavedConfig()))
    again = list(
        open_builtin("builtin:shapes:images=90,size=12,noise=0").documents(
            80, 90, InterleavedConfig()
        )
    )
    for document, same in zip(documents[80:90], again, strict=True):
        assert np.array_equal(document.parts[1].value, same.parts[1].value)
    for document in documents:
        words, pixels = document.parts[0].value.decode().split(), document.parts[1].value[..., 0]
        rows, columns = np.nonzero(pixels)
        assert (rows.mean() < 5.5) == (words[2] == "top")
        assert (columns.mean() < 5.5) == (words[3] == "left")
        assert pixels.max() == round({"dim": 3, "mid": 5, "bright": 6}[words[0]] * 255 / 7)
    assert {d.parts[0].value.decode().split()[1] for d in documents} == {
        "disc",
        "box",
        "cross",
        "stripe",
    }
    with pytest.raises(DataError, match="no parameter 'colour'; shapes has size, images"):
        open_builtin("builtin:shapes:colour=1")
    with pytest.raises(DataError, match="size is 'big', not a number"):
        open_builtin("builtin:shapes:size=big")


def test_frames_follow_time_and_pitch() -> None:
    time = np.arange(speech.SAMPLE_RATE) / speech.SAMPLE_RATE
    low, high = (np.sin(2 * np.pi * f * time).astype(np.float32) for f in (300, 3000))
    frames = speech.log_mel_frames(low)
    assert frames.shape == (26, speech.MEL_BANDS)
    assert frames[12].argmax() < speech.log_mel_frames(high)[12].argmax()


def test_no_synthesiser_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match="needs the program espeak-ng"):
        open_builtin("builtin:spoken-digits")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")
def test_spoken_digits_have_three_modalities(tmp_path: Path) -> None:
    settings = {
        "modalities": ["text", "image", "speech"],
        "image": {"size": 8, "channels": 1},
        "speech": {"codes": 8},
    }
    source = {"name": "spoken", "path": "builtin:spoken-digits:images=20,utterances=2"}
    data = open_data(
        DataConfig(
            sources=[source], sequence_length=128, cache_dir=str(tmp_path), interleaved=settings
        )
    )
    found = data.sources[0]
    assert found.manifest.interleaved["modalities"] == ["text", "image", "speech"]
    centres = np.load(found.folder / "speech_codebook.npy")
    assert centres.shape == (8, speech.MEL_BANDS)
    spans = found.manifest.shards[0].open_spans(found.folder)
    spoken = spans[spans[:, 2] == 2]
    assert len(spoken) == 20
    assert 3 < spoken[:, 1].mean() < 40


def test_a_grid_holds_every_picture(tmp_path: Path) -> None:
    images = np.stack([np.full((4, 4, 1), 40 * i, np.uint8) for i in range(5)])
    write_image_grid(images, tmp_path / "a" / "grid.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert [int(sheet[30 + 66 * (i // 3), 30 + 66 * (i % 3), 0]) for i in range(5)] == [
        0,
        40,
        80,
        120,
        160,
    ]
