"""Hugging Face's and mamba-ssm's checkpoints: names, settings, and logits against transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mamba_oracle import THREE
from safetensors.torch import load_file, save_file
from weft.launch.options import load_recipe
from weft.models import build_model, build_task
from weft.models.errors import ConfigError
from weft.models.hugging_face import layout_for
from weft.models.mamba.config import Config
from weft.models.mamba.hugging_face import (
    from_hugging_face_config,
    from_hugging_face_name,
    parameter_shapes,
    to_hugging_face_config,
    to_hugging_face_name,
)
from weft.trainer.checkpoint.writing import write_checkpoint
from weft.trainer.configuration.dump import dump_config
from weft.trainer.configuration.load import load_run_config
from weft.trainer.convert import export_run, import_folder

TINY: dict[str, Any] = {"vocab_size": 260, "d_model": 32, "n_layers": 3, "d_state": 4}
CONFIGS = {
    "tied": Config(**TINY, tie_embeddings=True),
    "odd": Config(**TINY, d_conv=3, expand=3, dt_rank=5, norm_eps=1e-6, rescale_out=False),
    "two blocks a layer": Config(**TINY, blocks_per_layer=2),
}
PUBLISHED = ["130m", "370m", "790m", "1.4b", "2.8b"]


def to_theirs(config: Config) -> dict[str, Any]:
    return to_hugging_face_config(
        config, max_positions=64, eos_id=2, bos_id=1, pad_id=0, dtype="float32"
    )


def their_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**settings)
        )
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_settings_are_transformers_own(name: str) -> None:
    import transformers

    config = CONFIGS[name]
    mapped = {to_hugging_face_name(k, config): v for k, v in parameter_shapes(config).items()}
    assert mapped == their_shapes(to_theirs(config))
    for ours in parameter_shapes(config):
        assert from_hugging_face_name(to_hugging_face_name(ours, config), config) == ours
    network = build_task(config).build_networks()["model"]
    assert parameter_shapes(config).keys() == dict(network.named_parameters()).keys()
    through = transformers.AutoConfig.for_model(**to_theirs(config)).to_dict()
    changed = {"n_layers": config.n_blocks, "blocks_per_layer": 1}
    assert from_hugging_face_config(through) == config.model_copy(update=changed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_names_and_shapes_of_their_checkpoints(name: str) -> None:
    config = load_recipe(f"mamba/{name}").config.model
    # As the files of the released models say it.
    theirs = {
        "model_type": "mamba",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": 50280,
    }
    shapes = their_shapes(theirs)
    ours = parameter_shapes(from_hugging_face_config(theirs))
    assert {from_hugging_face_name(k, config): v for k, v in shapes.items()} == ours
    ssm = {"d_model": config.d_model, "n_layer": config.n_layers, "vocab_size": 50277}
    ssm |= {"ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    assert parameter_shapes(from_hugging_face_config({**ssm, "pad_vocab_size_multiple": 8})) == ours


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    import transformers

    torch.manual_seed(0)
    settings = transformers.MambaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=3, state_size=4, layer_norm_epsilon=1e-5
    )
    model = transformers.MambaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return folder


def logits_of_run(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """(T, V) of one document, by the run's own weights."""
    from packing import packed
    from weft.trainer.checkpoint.reading import read_tensor

    config = load_run_config(run, []).config.model
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            folder = run / "checkpoints" / "step_00000000"
            parameter.copy_(read_tensor(folder, f"parameters/model/{name}"))
        return model(packed(ids, [len(ids)], len(ids)), output="logits")


def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


IDS = torch.randint(0, 256, (37,), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_transformers_both_ways(theirs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = import_folder(theirs, run)
    expected = their_logits(theirs, IDS)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of_run(run, IDS), expected, rtol=0, atol=1e-4)
    export_run(made.config, run, tmp_path / "out")
    torch.testing.assert_close(their_logits(tmp_path / "out", IDS), expected, rtol=0, atol=1e-5)


def test_mamba_ssms_names_are_read(theirs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ssm"
    folder.mkdir()
    tensors = load_file(theirs / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "d_model": 32,
        "n_layer": 3,
        "vocab_size": 259,
        "ssm_cfg": {"d_state": 4},
        "rms_norm": True,
        "pad_vocab_size_multiple": 4,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    import_folder(folder, tmp_path / "run")
    found = logits_of_run(tmp_path / "run", IDS)
    torch.testing.assert_close(found, their_logits(theirs, IDS), rtol=0, atol=1e-4)


def test_a_mixture_is_exported_as_a_dense_model_for_each_modality(
    theirs: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    config = import_folder(theirs, dense).config
    model = config.model.model_copy(
        update={"modalities": THREE[:2], "upcycle_from": str(dense), "split": None}
    )
    run = tmp_path / "mixture"
    mixture = build_model(model, seed=3)
    weights = {f"parameters/model/{n}": p.detach() for n, p in mixture.named_parameters()}
    write_checkpoint(run / "checkpoints" / "step_00000000", weights, {"step": 0})
    config = config.model_copy(update={"model": model})
    (run / "config.yaml").write_text(dump_config(config))
    made = export_run(config, run, tmp_path / "out")
    assert made.files == ("text/model.safetensors", "image/model.safetensors")
    from mamba_oracle import mixed

    for modality, name in enumerate(THREE[:2]):
        batch = mixed([len(IDS)], [modality] * len(IDS), len(IDS), THREE[:2])
        batch.tokens.copy_(IDS)
        with torch.no_grad():
            expected = mixture(batch, output="logits")
        found = their_logits(tmp_path / "out" / name, IDS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    export_run(config, run, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bias": True}, "use_bias=True; only False"),
        ({"intermediate_size": 100}, "intermediate_size=100; only expand"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"conv_kernel": 7}, "cannot be imported: d_conv"),
        ({"model_type": "mamba3"}, "only blt, llama, llava, llava_next, mamba and olmo2"),
        ({"model_type": None, "ssm_cfg": {"layer": "Mamba2"}}, "layer='Mamba2'; only Mamba1"),
        ({"model_type": None, "ssm_cfg": {}, "rms_norm": False}, "rms_norm=False; only True"),
        ({"model_type": None, "ssm_cfg": {"d_inner": 3}}, "d_inner=3; only Mamba1"),
    ],
)
def test_what_cannot_be_imported(changes: dict[str, Any], said: str) -> None:
    settings = {**to_theirs(CONFIGS["tied"]), "d_model": 32, "n_layer": 3, **changes}
    with pytest.raises(ConfigError, match=said):
        layout_for(settings).from_hugging_face_config(settings)


def test_what_cannot_be_exported() -> None:
    split = {"dt_proj": False}
    config = Config(**TINY, modalities=THREE[:2], split=split, compat_drop_dt_bias=True)
    with pytest.raises(ConfigError, match="compat_drop_dt_bias leaves out a bias"):
        to_theirs(config)
    with pytest.raises(ConfigError, match=r"special_ids .* cannot be exported"):
        to_theirs(Config(**TINY, special_ids=(258, 259)))
