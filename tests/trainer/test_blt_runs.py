"""BLT in the trainer: sharded like alone, from and to Hugging Face, started from a transformer, and learning."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packing import packed
from ranks import run_ranks
from tiny_run import write_recipe
from weft.launch.options import RECIPES
from weft.models.blt.config import Config
from weft.models.build import build_task
from weft.models.errors import CheckpointError
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_tensor
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.convert import export_run, import_folder
from weft.trainer.data.vocabulary import ByteVocabulary
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig
from weft.trainer.optimization.config import OptimizerConfig
from weft.trainer.train import train

TINY: dict[str, Any] = {
    "family": "blt",
    "window": 8,
    "patching": {"scheme": "space"},
    "ngram": {"sizes": [2, 3], "rows": 101},
    "encoder": {"d_model": 16, "n_heads": 2, "d_ff": 24},
    "latent": {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48},
    "decoder": {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24},
}
STEPS, ROWS, LENGTH = 3, 4, 24


def train_on_rank(topology: Topology, settings: dict[str, Any]) -> list[list[float]]:
    """(loss, gradient norm) of some steps over random bytes, with uneven numbers of patches a rank."""
    config = SimpleNamespace(
        parallel=ParallelConfig(**settings),
        precision=PrecisionConfig(),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-6),
        run=SimpleNamespace(seed=5),
    )
    engine = build_engine(build_task(Config(**TINY)), config, topology)
    values = []
    for step in range(STEPS):
        share = ROWS // engine.data_ranks
        batches = []
        for row in range(share):
            seed = step * ROWS + engine.data_rank * share + row
            generator = torch.Generator().manual_seed(seed)
            few = torch.tensor(list(b" a"[: 1 + seed % 2] + b"bcde"))
            ids = few[torch.randint(0, len(few), (LENGTH,), generator=generator)] + 4
            batches.append(packed(ids, [LENGTH], LENGTH))
        counts = {"tokens": ROWS * (LENGTH - 1), "positions": ROWS * LENGTH}
        sums = engine.sum_over_ranks(engine.forward_backward("train", batches, counts))
        loss = sums["cross_entropy"] / counts["tokens"]
        result = engine.step("train", 1e-2, loss)
        values.append([loss.item(), result.grad_norm.item(), sums["patches"].item()])
    return values


def test_sharded_over_two_ranks_like_alone() -> None:
    (alone,) = run_ranks(1, "test_blt_runs:train_on_rank", {"strategy": "single"})
    for settings in (
        {"strategy": "fsdp", "activation_checkpointing": "block"},
        {"strategy": "ddp"},
    ):
        for found in run_ranks(2, "test_blt_runs:train_on_rank", settings):
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(alone), atol=1e-5, rtol=1e-5
            )


def test_to_and_from_hugging_face(tmp_path: Path) -> None:
    """What transformers saves becomes a run and the entropy model's run in it, and goes back to the bit."""
    import transformers
    from safetensors.torch import load_file

    sizes = {"num_attention_heads": 2, "intermediate_size": 24}
    local = {**sizes, "hidden_size": 16, "cross_attn_k": 2, "hidden_size_global": 32}
    settings = transformers.BltConfig(
        encoder_config={**local, "num_hidden_layers": 1},
        decoder_config={**local, "num_hidden_layers": 2},
        global_config={**sizes, "hidden_size": 32, "num_hidden_layers": 2},
        patcher_config={**sizes, "hidden_size": 16, "num_hidden_layers": 1},
        encoder_hash_byte_group_vocab=101,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.BltForCausalLM(settings)
    model.save_pretrained(tmp_path / "hf")
    made = import_folder(tmp_path / "hf", tmp_path / "run")
    assert made.parameters == sum(p.numel() for p in model.parameters())
    config = load_run_config(tmp_path / "run", []).config
    assert isinstance(config.model, Config)
    assert config.model.patching.entropy_model == str(tmp_path / "run" / "entropy")
    entropy = load_run_config(tmp_path / "run" / "entropy", []).config
    assert entropy.model == config.model.patching.entropy
    norm = read_tensor(step_folder(tmp_path / "run" / "entropy", 0), "parameters/model/norm.weight")
    assert torch.equal(norm, model.model.patcher.norm.weight)
    export_run(config, tmp_path / "run", tmp_path / "back")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    (tmp_path / "run" / "entropy").rename(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match="no complete checkpoint of the model's entropy network"
    ):
        export_run(config, tmp_path / "run", tmp_path / "again")


def test_latent_starts_as_a_transformers_blocks(tmp_path: Path) -> None:
    """Byte-ifying: blocks of an OLMo 2 that another run trained, and a tenth of the rate for them."""
    olmo = {
        "vocab_size": 260,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_ff": 48,
        "ngram": None,
    }
    short = {"train__steps": 2, "checkpoint__every": 2, "schedule__warmup_steps": 1}
    (tmp_path / "base").mkdir()
    recipe = write_recipe(tmp_path / "base", model=olmo, **short)
    assert train(load_config(str(recipe), [], RECIPES).config) == 0
    base = tmp_path / "base" / "run"
    latent = {**TINY["latent"], "norm": "reordered", "qk_norm": "full", "norm_eps": 1e-6}
    latent |= {"start_from": str(base), "lr_scale": 0.1}
    (tmp_path / "blt").mkdir()
    recipe = write_recipe(tmp_path / "blt", model={**TINY, "latent": latent}, **short)
    config = load_config(
        str(recipe), ["optimizer.lr=1e-4", "optimizer.weight_decay=0"], RECIPES
    ).config
    assert train(config) == 0
    name = "blocks.1.mlp.down_proj.weight"
    start = read_tensor(step_folder(base, 2), f"parameters/model/{name}")
    end = read_tensor(step_folder(tmp_path / "blt" / "run", 2), f"parameters/model/latent.{name}")
    moved = (end - start).abs().max().item()
    assert 0 < moved <= 2 * 1.1e-5


def test_latent_from_a_hugging_face_folder_says_to_import_it(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    latent = {**TINY["latent"], "start_from": str(tmp_path / "llama")}
    recipe = write_recipe(tmp_path, model={**TINY, "latent": latent})
    with pytest.raises(
        CheckpointError, match=r"start_from: .*; import it first: weft convert import"
    ):
        train(load_config(str(recipe), [], RECIPES).config)


def test_learns_more_than_how_often_bytes_are(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=TINY, train__steps=60, checkpoint__every=60)
    config = load_config(str(recipe), ["optimizer.lr=2e-2"], RECIPES).config
    assert train(config) == 0
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [record["loss"] for record in records if "loss" in record]
    text = "".join(p.read_text() for s in ("tales", "sums") for p in (tmp_path / s).glob("*.txt"))
    counts = np.bincount(ByteVocabulary().encode(text)).astype(float)
    shares = counts[counts > 0] / counts.sum()
    unigram = float(-(shares * np.log(shares)).sum())
    assert losses[0] > unigram + 1
    assert sum(losses[-5:]) / 5 < unigram - 0.5
    assert 2 < next(r["patch_size"] for r in records if "patch_size" in r) < 8
