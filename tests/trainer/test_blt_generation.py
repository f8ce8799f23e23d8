"""`generate` with a BLT: greedy against the full forward, ragged batches, sampling with hooks, and its latent steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packing import packed
from ranks import run_ranks
from test_blt_cache import networks_of, with_rule
from torch import nn
from weft.models.blt.config import Config
from weft.models.blt.generation import BLTGenerator
from weft.models.blt.patching import make_patches
from weft.models.build import build_task
from weft.trainer import generation
from weft.trainer.data.vocabulary import ByteVocabulary
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig
from weft.trainer.generation import GenerationState, generate
from weft.trainer.optimization.config import OptimizerConfig

BYTES = ByteVocabulary()
PROMPTS = ["a", "the quick brown fox\njumps", "", "import numpy as np\n", "zz"]
RULES = ["stride", "space", "rise", "lines"]


def generator_of(rule: str) -> tuple[BLTGenerator, dict[str, nn.Module]]:
    networks = networks_of(with_rule(rule))
    if rule == "lines":
        patching = networks["model"].config.patching.model_copy(update={"threshold": 4.6})  # type: ignore[union-attr]
        networks["model"].config = networks["model"].config.model_copy(update={"patching": patching})  # type: ignore[union-attr]  # fmt: skip
    return BLTGenerator(networks["model"], networks.get("entropy")), networks  # type: ignore[arg-type]


@torch.no_grad()
def full(networks: dict[str, nn.Module], ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Logits after `ids` by the packed forward, and the places that start a patch, the one to come among them."""
    model: Any = networks["model"]
    batch = packed(torch.tensor(ids), [len(ids)], len(ids))
    patches = make_patches(batch, model.config.patching, networks.get("entropy"), len(ids))
    starts = patches.is_start.nonzero()[:, 0].tolist()
    opens_next = int(patches.decoder_ids[-1]) == int(patches.patch_ids[-1])
    return model(batch, patches, output="logits")[-1], [*starts, *([len(ids)] if opens_next else [])]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_that_of_the_full_forward_and_so_are_the_patches(rule: str) -> None:
    generator, networks = generator_of(rule)
    for done in generate(generator, BYTES, PROMPTS, max_new_tokens=14, ignore_eos=True):
        ids = list(done.prompt_ids)
        for found in done.token_ids:
            logits, starts = full(networks, ids)
            assert found == int(logits.argmax())
            ids.append(found)
        assert done.patch_starts == [start for start in starts if start < len(ids)]
        generated = [start for start in done.patch_starts if start >= len(done.prompt_ids)]
        assert done.latent_steps == len(generated) <= len(done.token_ids)


@pytest.mark.parametrize("rule", RULES)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, _ = generator_of(rule)
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.95, "seed": 3}
    together = generate(generator, BYTES, PROMPTS, **settings)
    assert [generate(generator, BYTES, [p], **settings)[0] for p in PROMPTS] == together
    monkeypatch.setattr(generation, "PREFILL_POSITIONS", 35)
    assert generate(generator, BYTES, PROMPTS, **settings) == together


def test_rewinding_goes_on_as_if_nothing_had_been_said() -> None:
    generator, _ = generator_of("lines")

    def hook(state: GenerationState) -> None:
        if state.step in (3, 6):
            state.rewind(1, len(state.generated[1]) if state.step == 3 else 2)

    settings: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True}
    prompts = ["abcdefg", "hello"]
    plain = generate(generator, BYTES, prompts, **settings)
    assert generate(generator, BYTES, prompts, on_token=hook, **settings) == plain


def test_a_row_that_a_hook_ends_has_no_patch_start_beyond_its_text() -> None:
    generator, _ = generator_of("space")

    def hook(state: GenerationState) -> None:
        if state.step == 0:
            state.force(0, BYTES.encode("ab cd ").tolist())
        if state.step == 3:
            state.finish(0)

    (done,) = generate(generator, BYTES, ["x"], on_token=hook, ignore_eos=True)
    assert BYTES.decode(done.token_ids) == "ab "
    assert done.patch_starts == [0, 1]
    assert done.latent_steps == 0


def generate_on_rank(topology: Topology, settings: dict[str, Any]) -> list[list[int]]:
    """Greedy ids of a BLT and an entropy model that an engine holds; the latter's weights are all alike, patches are cut."""
    model = with_rule("entropy").model_dump()
    model["patching"] |= {"threshold": 9.0, "max_length": 3}
    config = SimpleNamespace(
        parallel=ParallelConfig(**settings),
        precision=PrecisionConfig(),
        optimizer=OptimizerConfig(),
        run=SimpleNamespace(seed=5),
    )
    task = build_task(Config(**model))
    engine = build_engine(task, config, topology)
    networks = {name: engine.network_for_generation(name) for name in engine.networks}
    network = task.network_for_generation(networks)
    done = generate(network, BYTES, PROMPTS, max_new_tokens=9, ignore_eos=True)
    assert all(one.latent_steps == 3 for one in done)
    return [one.token_ids for one in done]


def test_sharded_over_two_ranks_like_alone() -> None:
    where = "test_blt_generation:generate_on_rank"
    (alone,) = run_ranks(1, where, {"strategy": "single"})
    assert run_ranks(2, where, {"strategy": "fsdp"}) == [alone, alone]
