"""Every recipe that ships loads, and the published ones have the published numbers."""

from __future__ import annotations

import pytest
from weft.launch.options import RECIPES, load_recipe
from weft.trainer.configuration.checks import check_against_world
from weft.trainer.configuration.recipes import list_recipes
from weft.trainer.configuration.schema import TrainingConfig

NAMES = list_recipes(RECIPES)

# Billions that a position meets, and in all but the stem.
MIXTURES = {
    "transfusion-163m": (0.1624, 0.2757),
    "transfusion-760m": (0.7779, 1.4578),
    "transfusion-1.4b": (1.3643, 2.5981),
    "transfusion-7b": (6.738, 13.215),
    "chameleon-443m": (0.4425, 0.7509),
    "chameleon-1.5b": (1.5017, 2.7349),
    "chameleon-7b": (7.013, 13.489),
    "speech-443m": (0.4425, 1.0592),
    "speech-1.5b": (1.5017, 3.9681),
    "speech-7b": (7.013, 19.966),
}

# All but the stem and the four ids beside Llama 2's, dense and with what each modality has for itself.
MAMBA_MIXTURES = {
    "transfusion-163m": (169_845_504, 289_432_320),
    "transfusion-760m": (814_278_144, 1_526_932_992),
    "transfusion-1.4b": (1_400_276_992, 2_665_056_256),
    "chameleon-37m": (37_058_816, 40_470_784),
    "chameleon-94m": (94_233_088, 120_988_160),
    "chameleon-443m": (454_247_424, 772_064_256),
    "chameleon-880m": (917_300_736, 1_629_955_584),
    "chameleon-1.5b": (1_537_640_448, 2_802_419_712),
    "speech-443m": (454_247_424, 1_089_881_088),
    "speech-880m": (917_300_736, 2_342_610_432),
    "speech-1.5b": (1_537_640_448, 4_067_198_976),
}
DENSE_MAMBA = [f"model.split.{name}=false" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]

# OLMo 2 (arXiv 2501.00656) and its released configurations.
PARAMETERS = {
    "olmo2/1b": 1_484_916_736,
    "olmo2/7b": 7_298_617_344,
    "olmo2/13b": 13_716_198_400,
    "olmo2/32b": 32_234_279_936,
    "llama3/8b": 8_030_261_248,
    "mamba/130m": 129_135_360,
    "mamba/370m": 371_516_416,
    "mamba/790m": 793_204_224,
    "mamba/1.4b": 1_372_178_432,
    "mamba/2.8b": 2_768_345_600,
}
WITHOUT_INPUT_EMBEDDING = {
    "olmo2/1b": 1_279_395_840,
    "olmo2/7b": 6_887_575_552,
    "olmo2/13b": 13_202_396_160,
    "olmo2/32b": 31_720_477_696,
}
GIGAFLOPS_A_TOKEN = {
    "olmo2/1b": 9.287,
    "olmo2/7b": 47.768,
    "olmo2/13b": 89.281,
    "olmo2/32b": 206.429,
}
# Sequences of a batch, peak rate, last step of stage 1, trillions of tokens by then.
RUNS = {
    "olmo2/1b": (512, 4e-4, 1_907_359, 4.00),
    "olmo2/7b": (1024, 3e-4, 928_646, 3.90),
    "olmo2/13b": (2048, 9e-4, 596_057, 5.00),
    "olmo2/32b": (2048, 6e-4, 721_901, 6.06),
}


def load(name: str) -> TrainingConfig:
    return load_recipe(name).config


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_runs_on_some_world(name: str) -> None:
    config = load(name)
    assert config.run.name == name.replace("/", "-")
    assert config.data.sources
    check_against_world(config, config.parallel.shard_ranks or 1)


def test_all_recipes_are_there() -> None:
    sizes = {"debug", "quickstart", "190m", "1b", "7b", "13b", "32b"}
    blt = {"debug", "400m", "1b", "2b", "4b", "8b", "8b-from-llama"}
    blt |= {"entropy-debug", "entropy-100m", "bpe-470m", "bpe-3.6b"}
    blt |= {"quickstart", "quickstart-entropy"}
    assert set(NAMES) == {
        *(f"olmo2/{size}" for size in sizes),
        *(f"blt/{name}" for name in blt),
        *(f"mamba/{size}" for size in ("debug", "130m", "370m", "790m", "1.4b", "2.8b")),
        "llama3/debug",
        "llama3/8b",
        *(f"mixture-of-transformers/{name}" for name in MIXTURES),
        *(f"image-ar/{name}" for name in ("b", "l", "xl", "xl-131k", "xxl", "3b")),
        *(f"dit/{name}-2" for name in ("s", "b", "l", "xl", "cat-ref-s", "cat-ref-xl")),
        *(f"mixture-of-transformers/debug-{name}" for name in ("transfusion", "chameleon")),
        *(f"mixture-of-mamba/{name}" for name in MAMBA_MIXTURES),
        *(f"mixture-of-mamba/debug-{name}" for name in ("transfusion", "chameleon", "speech")),
        *(f"lmfusion/{name}" for name in ("debug", "debug-base", "8b", "8b-ablation")),
        "lmfusion/llava-next-8b",
        *(f"crt/{name}" for name in ("vq16", "vq8", "baseline", "debug")),
        *(f"cat/{name}" for name in ("ref", "debug")),
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_transformers_have_the_published_sizes(name: str) -> None:
    config = load(f"mixture-of-transformers/{name}")
    met, total = MIXTURES[name]
    assert sum(config.model.dense.count_parameters().values()) / 1e9 == pytest.approx(met, abs=5e-4)
    counts = config.model.count_parameters()
    own = sum(counts.values()) - counts.get("image_stem", 0)
    assert own / 1e9 == pytest.approx(total, abs=5e-3)
    assert config.model.modalities == config.data.interleaved.modalities
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.1)


@pytest.mark.parametrize("name", MAMBA_MIXTURES)
def test_mixtures_of_mamba_have_the_published_sizes(name: str) -> None:
    recipe = f"mixture-of-mamba/{name}"
    config, dense = load(recipe), load_recipe(recipe, DENSE_MAMBA).config
    assert config.model.blocks_per_layer == 2
    assert config.model.modalities == config.data.interleaved.modalities
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    for model, wanted in zip((dense.model, config.model), MAMBA_MIXTURES[name], strict=True):
        counts = model.count_parameters()
        added_ids = model.vocab_size - (32_000 if model.image else 65_536)
        found = sum(counts.values()) - counts.get("image_stem", 0) - 2 * added_ids * model.d_model
        assert found == wanted
    assert dense.model.flops_per_token(4096) == config.model.flops_per_token(4096)


@pytest.mark.parametrize("name", ["8b", "8b-ablation", "llava-next-8b"])
def test_lmfusion_has_the_papers_settings(name: str) -> None:
    config = load(f"lmfusion/{name}")
    assert (config.optimizer.lr, config.schedule.warmup_steps) == (1e-4, 4000)
    assert config.optimizer.lr * config.schedule.final_fraction == pytest.approx(1.5e-5)
    assert config.data.sequence_length == 4096
    interleaved = config.data.interleaved
    assert config.model.special_ids == (interleaved.boi_id, interleaved.eoi_id)
    assert not interleaved.score_boi
    tokens = config.train.steps * config.train.batch_tokens
    assert tokens == pytest.approx(0.25e12 if name != "8b-ablation" else 62.5e9, rel=0.05)
    assert config.model.base.freeze


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    counts = load(name).model.count_parameters()
    assert sum(counts.values()) == PARAMETERS[name]
    if name in WITHOUT_INPUT_EMBEDDING:
        assert sum(counts.values()) - counts["embedding"] == WITHOUT_INPUT_EMBEDDING[name]


@pytest.mark.parametrize("name", GIGAFLOPS_A_TOKEN)
def test_published_flops_per_token(name: str) -> None:
    config = load(name)
    assert config.data.sequence_length == 4096
    flops = config.model.flops_per_token(4096)
    assert flops / 1e9 == pytest.approx(GIGAFLOPS_A_TOKEN[name], abs=6e-4)


@pytest.mark.parametrize("name", RUNS)
def test_published_settings(name: str) -> None:
    config = load(name)
    sequences, peak, steps, trillions = RUNS[name]
    assert config.batch_rows == sequences
    assert config.optimizer.lr == peak
    assert config.train.steps == steps
    assert steps * config.train.batch_tokens / 1e12 == pytest.approx(trillions, abs=0.006)
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (1e-8, 0.1)
    assert config.optimizer.clip_grad_norm == 1.0
    assert config.optimizer.skip_step == (name == "olmo2/32b")
    assert (config.model.z_loss, config.model.norm_eps) == (1e-5, 1e-6)
    assert config.precision.compute == "bf16"
    repeats = config.data.repeat_filter
    assert repeats.enabled
    assert (repeats.min_period, repeats.max_period, repeats.max_count) == (1, 13, 32)


@pytest.mark.parametrize(
    "name",
    [
        *("olmo2/debug", "olmo2/quickstart", "llama3/debug", "blt/debug", "blt/entropy-debug"),
        *("blt/quickstart-entropy", "mamba/debug"),
    ],
)
def test_small_recipes_need_nothing_but_the_install(name: str) -> None:
    config = load(name)
    assert config.data.vocabulary == "bytes"
    assert [source.path for source in config.data.sources] == ["builtin:python-stdlib"]


@pytest.mark.parametrize("name", [name for name in NAMES if "/debug-" in name and "-of-" in name])
def test_debug_recipes_of_modalities_make_their_data(name: str) -> None:
    config = load(name)
    assert config.data.vocabulary == "bytes"
    assert all(source.path.startswith("builtin:") for source in config.data.sources)
    assert config.model.vocab_size == 260 + config.data.interleaved.added_ids


def test_the_quickstarts_differ_in_the_model_alone() -> None:
    blt, entropy, plain = map(
        load, ("blt/quickstart", "blt/quickstart-entropy", "olmo2/quickstart")
    )
    assert blt.model.patching.entropy == entropy.model
    for ngram in (blt.model.ngram, plain.model.ngram):
        assert ngram is not None
        assert (ngram.sizes, ngram.rows) == ((2, 3, 4, 5, 6, 7), 65_536)
    held_out = {"sources", "vocabulary", "held_out", "repeat_filter"}
    for other in (entropy, plain):
        assert other.data.model_dump(include=held_out) == blt.data.model_dump(include=held_out)


@pytest.mark.parametrize("name", ["400m", "1b", "2b", "4b", "8b", "8b-from-llama"])
def test_blt_has_the_papers_settings(name: str) -> None:
    config = load(f"blt/{name}")
    optimizer, model = config.optimizer, config.model
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (4e-4, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad_norm) == (0.1, 1.0)
    assert (config.schedule.warmup_steps, config.schedule.final_fraction) == (2000, 0.0)
    assert config.train.batch_tokens == 2**24
    assert (model.ngram.sizes, model.ngram.rows, model.window) == ((3, 4, 5, 6, 7, 8), 500_002, 512)
    assert model.formulation == "parity"
    assert sum(model.patching.entropy.count_parameters().values()) == 99_512_064
    assert model.patching.entropy == load("blt/entropy-100m").model.model_copy(
        update={"init_std": model.patching.entropy.init_std}
    )
