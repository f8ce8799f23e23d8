"""Trained image tokenizers opened from their runs: what they make of pictures, their fingerprints, and as codecs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weft.models import build_task
from weft.models.errors import ConfigError, DataError
from weft.models.image_tokenizer.autoencoder import Autoencoder
from weft.models.image_tokenizer.config import Config
from weft.models.initialise import initialise_module
from weft.trainer.checkpoint.manager import CheckpointManager
from weft.trainer.configuration.load import dump_config, load_config
from weft.trainer.data.interleaved.codecs import open_codec
from weft.trainer.data.interleaved.config import ImageConfig
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.opening import restore
from weft.trainer.seeding import rng_state
from weft.trainer.tokenizer import IMAGES_AT_ONCE, Tokenizer, TokenizerCodec, open_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from pictures import NESTED, SMALL, pictures, small

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def built(config: Config, seed: int = 0) -> Autoencoder:
    task = build_task(config)
    model = task.build_networks()["model"]
    assert isinstance(model, Autoencoder)
    initialise_module(model, "model", task, seed)
    return model


def pixels(count: int) -> np.ndarray[Any, Any]:
    return pictures(range(count)).side["pixels"].permute(0, 2, 3, 1).numpy()


def test_codes_do_not_depend_on_what_is_encoded_beside_a_picture() -> None:
    tokenizer = Tokenizer(built(small()))
    images = pixels(IMAGES_AT_ONCE + 3)
    codes = tokenizer.encode(images)
    assert codes.shape == (len(images), 16)
    assert codes.dtype == np.int64
    for place in (0, IMAGES_AT_ONCE - 1, IMAGES_AT_ONCE + 2):
        assert np.array_equal(tokenizer.encode(images[place : place + 1])[0], codes[place])
    made = tokenizer.decode(codes)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = ((built(small())(x, [len(x)]).pixels.clamp(-1, 1) + 1) * 127.5).round()
    assert np.abs(made.astype(int) - wanted.detach().permute(0, 2, 3, 1).numpy()).max() <= 1
    with pytest.raises(
        DataError, match="pictures of 8 x 8 x 3, and this tokenizer takes 16 x 16 x 3"
    ):
        tokenizer.encode(images[:, :8, :8])


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_moments_of_every_ratio(ratio: int) -> None:
    tokenizer = Tokenizer(built(small(NESTED)))
    images = pixels(2)
    moments = tokenizer.encode(images, ratio)
    assert moments.shape == (2, 8, 16 // ratio, 16 // ratio)
    codec = TokenizerCodec(tokenizer, ratio)
    assert codec.shape == (4, 16 // ratio, 16 // ratio)
    assert np.array_equal(codec.encode(images), moments[:, :4])
    assert codec.decode(codec.encode(images)).shape == images.shape
    with pytest.raises(ConfigError, match=r"no ratio 16; it has \[2, 4, 8\]"):
        tokenizer.encode(images, 16)


def test_fingerprints_follow_what_decides_codes_and_nothing_else() -> None:
    def mark(model: Autoencoder, **options: Any) -> str:
        return str(Tokenizer(model, **options).identity["fingerprint"])

    plain = mark(built(small()))
    assert plain == mark(built(small()), run="elsewhere", step=7)
    model = built(small())
    model.decoder.output.weight.data += 1
    assert mark(model) == plain
    for name in ("encoder.input.weight", "quantizer.codebook", "quant_conv.bias"):
        model = built(small())
        model.get_parameter(name).data.view(-1)[0] += 1e-3
        assert mark(model) != plain, name
    assert mark(built(small()), weights="averages") != plain
    assert mark(built(small(quantizer={**SMALL["quantizer"], "normalise": False}))) != plain


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint whose averages are other than its weights."""
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    changes = [
        "model.size=16",
        "data.images.size=16",
        "model.crt=null",
        "optimizer.ema_decay=0.9",
        f"run.dir={folder}",
    ]
    changes += ["model.reconstruction.perceptual=random_features", "run.device=cpu"]
    config = load_config("crt/debug", changes, RECIPES).config
    topology = Topology(0, 1, 0, 1, torch.device("cpu"))
    task = build_task(config.model)
    engine = build_engine(task, config, topology)
    engine.start_averages()
    for shard in engine.state_shards():
        if shard.name.startswith("ema/") and "codebook" in shard.name:
            shard.tensor.copy_(shard.tensor.flip(0))
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    manager = CheckpointManager(folder, config.checkpoint, topology)
    state = {
        "step": 3,
        "train": {"step": 3},
        "engine": engine.scalar_state(),
        "facts": task.facts(),
    }
    state["data"] = {"fingerprint": "none", "seed": config.run.seed}
    manager.save(3, engine.state_shards(), state, rng_state(), kind="final")
    manager.wait()
    manager.close()
    return folder


def test_a_run_is_opened_with_its_averages_or_without(run: Path) -> None:
    averages, raw = open_tokenizer(run), open_tokenizer(run, averages=False)
    assert (averages.identity["weights"], raw.identity["weights"]) == ("averages", "raw")
    assert (averages.identity["step"], averages.codes, averages.ratios) == (3, 256, (4,))
    assert averages.identity["fingerprint"] != raw.identity["fingerprint"]
    assert np.array_equal(255 - averages.encode(pixels(3)), raw.encode(pixels(3)))


def test_a_run_is_a_codec_of_interleaved_data(run: Path) -> None:
    config = ImageConfig(kind="codes", codec=f"tokenizer:{run}", codes=256)
    codec = open_codec(config)
    assert codec is not None
    assert (codec.kind, codec.size, codec.channels, codec.shape) == ("codes", 16, 3, (4, 4))
    assert codec.identity["fingerprint"] == open_tokenizer(run).identity["fingerprint"]
    assert codec.decode(codec.encode(pixels(2))).shape == (2, 16, 16, 3)
    for changes, told in (
        ({"kind": "latents"}, "makes codes; set it to codes"),
        ({"codes": 512}, "has 256; set it to 256"),
        ({"size": 32}, "takes pictures of 16; leave it null"),
    ):
        with pytest.raises(ConfigError, match=told):
            open_codec(config.model_copy(update=changes))


class NoData:
    def check_fingerprint(self, fingerprint: Any) -> None:
        pass


def test_a_run_keeps_to_the_files_it_began_with(run: Path) -> None:
    config = load_config(str(run / "config.yaml"), [], run).config
    topology = Topology(0, 1, 0, 1, torch.device("cpu"))
    for perceptual, is_same in (("random_features", True), ("gradient", False)):
        losses = config.model.reconstruction.model_copy(update={"perceptual": perceptual})  # type: ignore[attr-defined]
        task = build_task(config.model.model_copy(update={"reconstruction": losses}))
        engine = build_engine(task, config, topology)
        manager = CheckpointManager(run, config.checkpoint, topology)
        try:
            if is_same:
                assert restore(engine, manager, NoData(), config, task=task) is not None  # type: ignore[arg-type]
            else:
                with pytest.raises(
                    ConfigError, match=r"depends on .*random_features.* and what is there now is"
                ):
                    restore(engine, manager, NoData(), config, task=task)  # type: ignore[arg-type]
        finally:
            manager.close()
