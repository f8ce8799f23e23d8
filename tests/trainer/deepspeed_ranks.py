"""What the tests of `weft convert` do with the real DeepSpeed, on ranks of their own: write checkpoints, load them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from packing import packed
from safetensors.torch import save_file
from torch import Tensor
from weft.models import build_model
from weft.models.transformer.config import Config
from weft.trainer.distributed import Topology

MODEL: dict[str, Any] = {
    "vocab_size": 260,
    "n_layers": 2,
    "d_model": 9,
    "n_heads": 2,
    "head_dim": 4,
    "d_ff": 7,
}
"""Odd sizes, so that no parameter divides by two ranks."""
STEPS = 3
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
CASES: dict[str, dict[str, Any]] = {
    "zero 1": {"stage": 1},
    "zero 2 bf16": {"stage": 2, "bf16": True},
    "zero 3": {"stage": 3},
    "zero 3 frozen": {"stage": 3, "frozen": "norm.weight"},
}


def build_engine(
    stage: int, bf16: bool = False, frozen: str = "", universal: bool = False, seed: int = 0
) -> Any:
    """A DeepSpeed engine around a Weft network, as somebody who does not use Weft's trainer has it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(seed)
    model = build_model(Config(**MODEL, init_std=0.2))
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name != frozen)
    trained = [p for n, p in named.items() if n != frozen]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "sub_group_size": 1000},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 8, "warmup_type": "linear"},
        },
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def train(engine: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 * step + engine.global_rank)
        tokens = torch.randint(0, 260, (12,), generator=generator)
        logits = engine(packed(tokens, [12], 12), output="logits")
        engine.backward(torch.nn.functional.cross_entropy(logits.float(), tokens.roll(-1)))
        engine.step()


def state_of(engine: Any) -> dict[str, Tensor]:
    """Collective: whole fp32 weights and moments, as DeepSpeed itself gives them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19.8 links moments after its first group's first step, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[f"fp32/{name}"] = safe_get_full_fp32_param(parameter)
            for kind in KINDS[1:]:
                found[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind)
    return {name: tensor.detach().float().clone() for name, tensor in found.items()}


def write_checkpoints(topology: Topology, folder: str) -> dict[str, int]:
    """Each case after three steps, with its state then and one step later; and DeepSpeed's own universal versions."""
    positions = {}
    for number, (case, settings) in enumerate(CASES.items()):
        engine = build_engine(**settings, seed=number)
        train(engine, 0, STEPS)
        engine.save_checkpoint(f"{folder}/{case}")
        positions[case] = engine.lr_scheduler.last_batch_iteration
        _keep(topology, Path(folder) / f"{case}.safetensors", state_of(engine))
        train(engine, STEPS, 1)
        _keep(topology, Path(folder) / f"{case} later.safetensors", state_of(engine))
        if topology.is_main and not settings.get("frozen"):
            _make_universal(Path(folder) / case)
    return positions


def _keep(topology: Topology, path: Path, state: dict[str, Tensor]) -> None:
    if topology.is_main:
        save_file(state, path)


def _make_universal(folder: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    source = folder / f"global_step{STEPS}"
    main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=f"{source}_universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def load_universal(topology: Topology, folder: str, output: str) -> dict[str, list[int]]:
    """An exported checkpoint into every stage, then one step; both states are written down."""
    found = {}
    for stage in (1, 2, 3):
        engine = build_engine(stage, universal=True, seed=77)
        engine.load_checkpoint(folder)
        _keep(topology, Path(output) / f"loaded {stage}.safetensors", state_of(engine))
        found[str(stage)] = [engine.global_steps, engine.lr_scheduler.last_batch_iteration]
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        assert decays == [0.1, 0.0]
        if stage == 3:
            # DeepSpeed 0.19.8 gives one counter to all groups, which torch's AdamW then counts up once for each.
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        train(engine, STEPS, 1)
        _keep(topology, Path(output) / f"later {stage}.safetensors", state_of(engine))
    return found
