"""LMFusion under the engines: the base stays what it is, to the bit; ranks and steps without images neither hang nor learn."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_resume import resume, run_new
from tiny_run import tensors, write_recipe
from weft.models.batch import PackedBatch
from weft.models.build import build_model, build_task
from weft.models.errors import ConfigError
from weft.models.mixture_of_transformers.config import Config
from weft.models.transformer.config import Config as TransformerConfig
from weft.trainer.base_weights import load_base_weights
from weft.trainer.checkpoint.config import CheckpointConfig
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.manager import CheckpointManager
from weft.trainer.checkpoint.reading import read_manifest, read_tensor
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig
from weft.trainer.engines.protocol import Engine
from weft.trainer.optimization.config import OptimizerConfig
from weft.trainer.train import train as train_run

sys.path.append(str(Path(__file__).parents[1] / "models"))

from interleaved import IMAGE, interleaved

V = 260
BASE: dict[str, Any] = {
    "vocab_size": V,
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 24,
    "init_std": 0.2,
    "norm": "pre",
    "qk_norm": "none",
}
IMAGE_SECTION = {"channels": 2, "size": 4, "patch": 2, "time_width": 8}
TEXT = ("tttttttt", "ttttt")
STEPS = (("ttt(i)tt", "(i)t(i)tt"), TEXT, ("(i)ttt",), ("t(i)", "tttt"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(
        tmp_path_factory.mktemp("base"), "train.steps=3", "schedule.horizon_steps=30", model=BASE
    )


def config(source: Path | str, **changes: Any) -> Config:
    base = {"source": str(source), "architecture": BASE, **changes.pop("base", {})}
    return Config(
        modalities=("text", "image"), image=IMAGE, special_ids=(V, V + 1), base=base, **changes
    )


def open_engine(topology: Topology, model: Config, **changes: Any) -> Engine:
    """With the base's weights."""
    parallel = {"engine": "torch", **changes.pop("parallel", {})}
    settings = SimpleNamespace(
        batch_rows=2,
        train=SimpleNamespace(micro_batch_tokens=32),
        data=SimpleNamespace(sequence_length=32),
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(**changes.pop("precision", {})),
        optimizer=OptimizerConfig(**{"lr": 1e-2, **changes.pop("optimizer", {})}),
        run=SimpleNamespace(seed=7),
    )
    task = build_task(model)
    engine = build_engine(task, settings, topology)
    manager = CheckpointManager(Path("nowhere"), CheckpointConfig(), topology)
    load_base_weights(task, engine, manager, is_new=True)
    return engine


def train(engine: Engine, steps: list[list[PackedBatch]]) -> list[list[float]]:
    """Losses and gradient norm of steps; each rank has the batches of its number."""
    found = []
    for batches in steps:
        mine = batches[engine.data_rank :: engine.data_ranks]
        counts: dict[str, int] = {}
        for batch in batches:
            for name, count in engine.task.counts(batch).items():
                counts[name] = counts.get(name, 0) + count
        sums = engine.sum_over_ranks(engine.forward_backward("train", mine, counts))
        result = engine.step("train", 1e-2, sums["cross_entropy"])
        found.append(
            [*(float(sums[n]) for n in ("cross_entropy", "denoising")), float(result.grad_norm)]
        )
    return found


def batches_of(step: int) -> list[PackedBatch]:
    """Two: the first has the step's documents, the second text alone, except in the last step."""
    documents = STEPS[step % len(STEPS)]
    other = documents if step % len(STEPS) == len(STEPS) - 1 else TEXT
    return [
        interleaved(d, vocabulary=V, seed=2 * step + i, sample=i)
        for i, d in enumerate((documents, other))
    ]


def stored(base: Path) -> dict[str, torch.Tensor]:
    folder = step_folder(base, 3)
    names = read_manifest(folder).tensors
    return {
        name.removeprefix("parameters/model/"): read_tensor(folder, name)
        for name in names
        if name.startswith("parameters/")
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer": {"weight_decay": 0.5, "clip_grad_norm": None, "betas": (0.5, 0.9)}},
    {"optimizer": {"skip_step": True, "skip_step_minimum": 4, "skip_step_window": 8}},
    {"precision": {"compute": "bf16"}, "parallel": {"strategy": "fsdp"}},
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_fifty_steps_leave_the_base_as_it_is(base: Path, settings: dict[str, Any]) -> None:
    """Levels W and F: its bytes, and the logits of text alone."""
    engine = open_engine(Topology(), config(base), **settings)
    before = {s.name: digest(s.tensor) for s in engine.state_shards()}
    losses = train(engine, [batches_of(step) for step in range(50)])
    theirs = stored(base)
    frozen = {s.name.removeprefix("parameters/model/"): s.tensor for s in engine.base_shards()}
    assert len(frozen) == len(theirs)
    for name, tensor in frozen.items():
        own = name.removeprefix("backbone.").removesuffix(".text")
        assert digest(tensor.view(-1)) == digest(theirs[own].view(-1)), name
    after = {s.name: digest(s.tensor) for s in engine.state_shards()}
    moved = {n for n in after if after[n] != before[n]}
    assert {n for n in after if ".image" in n or "stem." in n or "special" in n} <= moved
    assert losses[48][1] < losses[0][1]
    if "precision" not in settings:
        dense = build_model(TransformerConfig(**BASE))
        dense.load_state_dict(theirs)
        text = interleaved(TEXT, vocabulary=V, seed=99)
        with torch.no_grad():
            assert torch.equal(
                engine.networks["model"](text, "logits"), dense(text, output="logits")
            )


def test_images_start_as_the_base_and_the_special_table_does_not(base: Path) -> None:
    named = dict(open_engine(Topology(), config(base)).networks["model"].named_parameters())
    theirs = stored(base)
    for name, parameter in named.items():
        if name.endswith(".image"):
            own = name.removeprefix("backbone.").removesuffix(".image")
            assert torch.equal(parameter, theirs[own]), name
    fresh = config(base, base={"start_others": False})
    other = dict(open_engine(Topology(), fresh).networks["model"].named_parameters())
    name = "backbone.blocks.0.mlp.up_proj.weight.image"
    assert not torch.equal(other[name], named[name])
    assert torch.equal(other["backbone.norm.weight.text"], named["backbone.norm.weight.text"])


def test_an_unfrozen_base_learns_at_its_own_rate(base: Path) -> None:
    slow = open_engine(Topology(), config(base, base={"freeze": False, "lr_scale": 0.1}))
    start = {n: p.detach().clone() for n, p in slow.networks["model"].named_parameters()}
    train(slow, [batches_of(0)])
    moved = {
        n: (p.detach() - start[n]).abs().max().item()
        for n, p in slow.networks["model"].named_parameters()
    }
    # Adam's first step is the rate, and decay is a hundredth of it here.
    assert moved["backbone.blocks.0.mlp.up_proj.weight.image"] == pytest.approx(1e-2, rel=0.1)
    assert moved["backbone.blocks.0.mlp.up_proj.weight.text"] == pytest.approx(1e-3, rel=0.1)
    assert {s.name for s in slow.base_shards()} == set()


VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "free": {"base": {"freeze": False}},
    "shallow": {"split": {"norm": False, "qkv": False, "o": False}, "base": {"freeze": False}},
}


PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "recomputed": {"strategy": "fsdp", "activation_checkpointing": "block"},
}


def train_on_rank(
    topology: Topology, source: str, parallel: dict[str, dict[str, Any]]
) -> dict[str, list[list[float]]]:
    steps = [batches_of(step) for step in range(len(STEPS))]
    return {
        f"{name} {way}": train(open_engine(topology, config(source, **changes), parallel=p), steps)
        for name, changes in VARIANTS.items()
        for way, p in parallel.items()
    }


def test_a_rank_and_a_step_without_images(base: Path) -> None:
    """Rank 1 has none but in the last step, nobody in the second: the same numbers as in one process."""
    alone = train_on_rank(Topology(), str(base), {"single": {"strategy": "single"}})
    for found in run_ranks(2, "test_lmfusion:train_on_rank", str(base), PARALLEL):
        for name in VARIANTS:
            wanted = torch.tensor(alone[f"{name} single"])
            for way in PARALLEL:
                values = torch.tensor(found[f"{name} {way}"])
                torch.testing.assert_close(
                    values, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, w=way: f"{w}: {m}"
                )
    # With nothing but images to learn from, a step of text alone has no gradient.
    assert alone["frozen single"][1][1:] == [0.0, 0.0]
    assert alone["free single"][1][2] > 0


ZERO: dict[str, dict[str, Any]] = {
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "3 gathered late": {
        "zero_stage": 3,
        "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
}


def train_with_deepspeed(topology: Topology, source: str) -> dict[str, Any]:
    steps = [batches_of(step) for step in range(len(STEPS))]
    found: dict[str, Any] = {}
    for stage, settings in ZERO.items():
        parallel = {"engine": "deepspeed", "deepspeed": settings}
        engine = open_engine(topology, config(source), parallel=parallel)
        before = {s.name: digest(s.tensor) for s in engine.base_shards()}
        found[stage] = train(engine, steps)
        assert {s.name: digest(s.tensor) for s in engine.base_shards()} == before
    half = open_engine(topology, config(source), parallel=parallel, precision={"compute": "bf16"})
    assert {s.tensor.dtype for s in half.base_shards()} == {torch.bfloat16}
    found["bf16"] = train(half, steps)
    return found


def test_deepspeed_does_the_same(base: Path) -> None:
    alone = train(open_engine(Topology(), config(base)), [batches_of(s) for s in range(len(STEPS))])
    for found in run_ranks(2, "test_lmfusion:train_with_deepspeed", str(base)):
        for way, values in found.items():
            close = 3e-2 if way == "bf16" else 1e-4
            torch.testing.assert_close(
                torch.tensor(values),
                torch.tensor(alone),
                rtol=close,
                atol=close,
                msg=lambda m, w=way: f"{w}: {m}",
            )


def write_lmfusion(folder: Path, base: Path, **changes: Any) -> Path:
    model = {
        "family": "mixture_of_transformers",
        "modalities": ["text", "image"],
        "image": IMAGE_SECTION,
        "special_ids": [V, V + 1],
        "base": {"source": str(base)},
        **changes,
    }
    return write_recipe(folder, model=model)


def test_a_run_of_text_alone_takes_its_shape_from_the_base_and_learns_nothing(
    tmp_path: Path, base: Path
) -> None:
    recipe = write_lmfusion(tmp_path, base)
    found = load_config(str(recipe), ["train.steps=4"], tmp_path).config
    assert found.model.d_ff == 24
    assert found.model.n_kv_heads == 2
    assert train_run(found) == 0
    run = found.run_dir
    saved = tensors(run, 4)
    assert not [n for n in saved if n.endswith(".text") or "head" in n or "tokens" in n]
    assert [n for n in saved if n.endswith(".image")]
    manifest = read_manifest(step_folder(run, 4))
    assert list(manifest.state["base_weights"]) == ["model.base.source"]
    image = read_tensor(step_folder(run, 4), "parameters/model/backbone.norm.weight.image")
    assert torch.equal(image, stored(base)["norm.weight"])
    assert load_run_config(run, []).config.model == found.model
    assert resume(run, "train.steps=6") == 0
    later = tensors(run, 6)
    assert {n for n in later if later[n] != saved[n]} <= {n for n in saved if "skip_step" in n}


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    recipe = write_lmfusion(tmp_path, base)
    found = load_config(str(recipe), ["train.steps=4"], tmp_path).config
    assert train_run(found) == 0
    other = run_new(tmp_path / "other", "train.steps=4", "run.seed=5", model=BASE)
    with pytest.raises(ConfigError, match=r"model\.base\.source holds other weights"):
        resume(found.run_dir, "train.steps=6", f"model.base.source={other}")
