"""Both directions of `weft convert`, against transformers' own models and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import packed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from weft.models import build_model
from weft.models.errors import CheckpointError, ConfigError
from weft.models.transformer.config import Config, NgramConfig
from weft.models.transformer.hugging_face import (
    from_hugging_face_config,
    parameter_shapes,
    to_hugging_face_name,
)
from weft.trainer.checkpoint.reading import read_tensor
from weft.trainer.checkpoint.writing import write_checkpoint
from weft.trainer.configuration.load import load_run_config
from weft.trainer.convert import Exported, export_run, import_folder
from weft.trainer.files import write_text

BYTES = 260
COMMON: dict[str, Any] = {
    "vocab_size": BYTES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 3,
}
STRETCH = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("Olmo2", {"rope_parameters": PLAIN, "rms_norm_eps": 1e-6}),
    "llama": ("Llama", {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}),
    "llama tied": ("Llama", {"rope_parameters": STRETCH, "tie_word_embeddings": True}),
}


def their_model(name: str) -> nn.Module:
    """A randomly started transformers model whose logits are well above rounding."""
    import transformers

    kind, settings = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**COMMON, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model


def their_vision_language_model() -> nn.Module:
    import transformers

    text = transformers.LlamaConfig(**COMMON, rope_parameters=PLAIN, rms_norm_eps=1e-5)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("is_new", [False, True])
def test_the_language_model_of_a_llava_is_imported(tmp_path: Path, is_new: bool) -> None:
    theirs = their_vision_language_model()
    theirs.save_pretrained(tmp_path / "llava")
    path = tmp_path / "llava" / "model.safetensors"
    saved = load_file(path)
    assert "language_model.model.embed_tokens.weight" in saved
    if is_new:
        # As the classes of transformers 5 call them, which it turns back when it saves.
        renamed = {
            ("" if n.startswith("language_model.lm_head") else "model.")
            + n.replace("language_model.model.", "language_model.").replace(
                "language_model.lm_head", "lm_head"
            ): t
            for n, t in saved.items()
        }
        save_file({**renamed, "model.image_newline": torch.zeros(32)}, path)
    import_folder(tmp_path / "llava", tmp_path / "run", [])
    config, model = our_model(tmp_path / "run")
    assert (config.norm, config.n_kv_heads) == ("pre", 2)
    tokens = torch.arange(20) + 30
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=1e-4, atol=1e-4)


def test_what_a_text_config_leaves_out_is_llama_7b() -> None:
    theirs = {"model_type": "llava", "text_config": {"vocab_size": 32064, "rms_norm_eps": 1e-5}}
    config = from_hugging_face_config(theirs)
    assert (config.d_model, config.n_layers, config.d_ff) == (4096, 32, 11008)
    assert (config.vocab_size, config.norm_eps) == (32064, 1e-5)
    with pytest.raises(ConfigError, match="model_type 'qwen2'"):
        from_hugging_face_config({**theirs, "text_config": {"model_type": "qwen2"}})


def our_model(run: Path) -> tuple[Config, nn.Module]:
    """The network of a run's step 0, read through the checkpoint."""
    config = load_run_config(run, []).config.model
    assert isinstance(config, Config)
    model = build_model(config)
    checkpoint = run / "checkpoints" / "step_00000000"
    weights = {
        n: read_tensor(checkpoint, f"parameters/model/{n}") for n in parameter_shapes(config)
    }
    model.load_state_dict(weights)
    return config, model


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        if hasattr(model, "generation_config"):
            return model(tokens[None]).logits[0]
        return model(packed(tokens, [len(tokens)], len(tokens)), output="logits")


def make_run(folder: Path, model: dict[str, Any], **weights: Any) -> dict[str, Tensor]:
    """A run folder with one checkpoint; returns its weights by our names."""
    config = Config(vocab_size=BYTES, n_layers=2, d_model=32, n_heads=4, d_ff=48, **model)
    folder.mkdir()
    lines = "\n".join(f"  {k}: {json.dumps(v)}" for k, v in config.model_dump(mode="json").items())
    write_text(folder / "config.yaml", f"model:\n{lines}\ndata:\n  sequence_length: 64\n")
    state = {
        name: parameter.detach()
        for name, parameter in build_model(
            config.model_copy(update={"init_std": 0.2})
        ).named_parameters()
    }
    for step, factor in {5: 1.0, **weights}.items():
        tensors = {f"parameters/model/{name}": tensor * factor for name, tensor in state.items()}
        write_checkpoint(
            folder / "checkpoints" / f"step_{int(step):08}", tensors, {"step": int(step)}
        )
    return state


def export(run: Path, target: Path, **settings: Any) -> Exported:
    return export_run(load_run_config(run, []).config, run, target, **settings)


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("name", THEIRS)
def test_import_of_what_transformers_saves(tmp_path: Path, name: str, shard: str | None) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "hf", **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == bool(shard)
    import_folder(tmp_path / "hf", tmp_path / "run")
    _, ours = our_model(tmp_path / "run")
    tokens = torch.randint(0, BYTES, (96,))
    expected = logits(theirs, tokens)
    assert expected.abs().max() > 2
    assert (logits(ours, tokens) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("largest", [10**9, 20_000])
@pytest.mark.parametrize("name", THEIRS)
def test_export_is_read_by_transformers(tmp_path: Path, name: str, largest: int) -> None:
    import transformers

    their_model(name).save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    made = export(tmp_path / "run", tmp_path / "back", max_shard_bytes=largest)
    assert (len(made.files) > 1) == (largest < 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == f"{THEIRS[name][0]}ForCausalLM"
    _, ours = our_model(tmp_path / "run")
    tokens = torch.randint(0, BYTES, (96,))
    expected = logits(ours, tokens)
    assert expected.abs().max() > 2
    assert (logits(theirs.eval(), tokens) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("variant", [{}, {"n_kv_heads": 2}, {"norm": "pre", "qk_norm": "none"}])
def test_round_trip_is_bit_equal(tmp_path: Path, variant: dict[str, Any]) -> None:
    weights = make_run(tmp_path / "run", variant)
    export(tmp_path / "run", tmp_path / "hf", max_shard_bytes=20_000)
    import_folder(tmp_path / "hf", tmp_path / "again")
    before, after = (load_run_config(tmp_path / run, []).config.model for run in ("run", "again"))
    same = {"z_loss", "n_kv_heads", "head_dim"}
    assert before.model_dump(exclude=same) == after.model_dump(exclude=same)
    _, ours = our_model(tmp_path / "again")
    loaded = dict(ours.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_half_precision_weights_come_back_as_they_were(tmp_path: Path) -> None:
    theirs = their_model("olmo2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "back", dtype="bf16")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        after[n].dtype == torch.bfloat16 and torch.equal(after[n], before[n]) for n in before
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


CORE = {
    "model.embed_tokens": "embeddings",
    "lm_head": "lm_head.w_out",
    "model.norm": "lm_head.norm",
    "model.layers": "blocks",
    "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k",
    "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_out",
    "self_attn": "attention",
    "post_attention_layernorm": "attention_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "post_feedforward_layernorm": "feed_forward_norm",
}


def test_olmo_core_names_are_accepted(tmp_path: Path) -> None:
    theirs = their_model("olmo2")
    theirs.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    renamed = {}
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        core = name
        for old, new in CORE.items():
            core = core.replace(old, new)
        renamed[core] = tensor
    assert "blocks.1.attention.w_out.weight" in renamed
    assert not any("proj" in name or "model" in name for name in renamed)
    (tmp_path / "hf" / "model.safetensors").unlink()
    save_file(renamed, tmp_path / "hf" / "core.safetensors")
    import_folder(tmp_path / "hf", tmp_path / "core")
    first, second = our_model(tmp_path / "run")[1], our_model(tmp_path / "core")[1]
    other = dict(second.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in first.named_parameters())


def test_the_imported_run_is_complete(tmp_path: Path) -> None:
    their_model("llama tied").save_pretrained(tmp_path / "hf")
    overrides = ["data.sequence_length=64", "train.batch_tokens=640"]
    import_folder(tmp_path / "hf", tmp_path / "run", overrides)
    loaded = load_run_config(tmp_path / "run", [])
    assert {origin.partition(":")[0] for origin in loaded.origins.values()} == {
        "config.yaml",
        "run folder",
    }
    config = loaded.config
    assert config.data.vocabulary == "bytes"
    assert config.data.sequence_length == 64
    assert config.run.dir == str(tmp_path / "run")
    assert (config.model.tie_embeddings, config.model.z_loss) == (True, 0.0)
    export(tmp_path / "run", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["max_position_embeddings"] == 256
    assert (back["bos_token_id"], back["eos_token_id"], back["pad_token_id"]) == (1, 2, 3)
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<eos>": 26}
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<eos>", "id": 26}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    their_model("olmo2").save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    config = load_run_config(tmp_path / "run", []).config
    assert config.data.vocabulary == f"hf:{tmp_path / 'run' / 'tokenizer'}"
    export(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["bos_token_id"]) == (26, None)


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    model = their_model("olmo2")
    model.resize_token_embeddings(128)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json beside the weights, and 128 ids"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in"):
        import_folder(tmp_path / "hf", tmp_path / "run", tokenizer=tmp_path / "hf")
    write_tokenizer(tmp_path / "other")
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer=tmp_path / "other")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()


def test_the_step_that_is_asked_for(tmp_path: Path) -> None:
    weights = make_run(tmp_path / "run", {}, **{"7": 2.0})
    name = "blocks.1.mlp.up_proj.weight"
    theirs = to_hugging_face_name(name, Config())
    for step, factor in ((None, 2.0), (7, 2.0), (5, 1.0)):
        made = export(tmp_path / "run", tmp_path / f"hf{step}", step=step)
        assert made.checkpoint.name == f"step_{step or 7:08}"
        exported = load_file(tmp_path / f"hf{step}" / "model.safetensors")[theirs]
        assert torch.equal(exported, weights[name] * factor)
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; it has 5, 7"):
        export(tmp_path / "run", tmp_path / "hf6", step=6)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def shrink(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


def add_layer(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)


def add_unknown(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def add_twice(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.norm.weight"] = torch.ones(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 of 25 parameters are missing, the first is model\.layers\.1\.mlp\.up_proj"),
        (shrink, r"model\.norm\.weight has shape \[31\], but config\.json's model has \[32\]"),
        (add_layer, r"model\.layers\.2\.mlp\.up_proj\.weight does not exist"),
        (add_unknown, r"q_proj\.bias' is not one"),
        (add_twice, "are the same parameter"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(
    tmp_path: Path, change: Any, message: str
) -> None:
    their_model("olmo2").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises((CheckpointError, ConfigError), match=message) as raised:
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    make_run(tmp_path / "tables", {"ngram": NgramConfig(rows=50).model_dump()})
    with pytest.raises(ConfigError, match=r"model\.ngram"):
        export(tmp_path / "tables", tmp_path / "hf")
    make_run(tmp_path / "heads", {"qk_norm": "head"})
    with pytest.raises(ConfigError, match="qk_norm=head"):
        export(tmp_path / "heads", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_failure_while_reading_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", {})
    seen = []

    def fail(checkpoint: Path, name: str) -> Tensor:
        seen.append(name)
        if len(seen) == 9:
            raise CheckpointError(f"{name} is damaged")
        return read_tensor(checkpoint, name)

    monkeypatch.setattr("weft.trainer.convert.read_tensor", fail)
    with pytest.raises(CheckpointError, match="is damaged"):
        export(tmp_path / "run", tmp_path / "hf", max_shard_bytes=5000)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_trained_is_never_replaced(tmp_path: Path) -> None:
    their_model("olmo2").save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match="--overwrite"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    import_folder(tmp_path / "hf", tmp_path / "run", overwrite=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="has trained"):
        import_folder(tmp_path / "hf", tmp_path / "run", overwrite=True)


def test_no_more_than_one_file_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors read for an export, those of earlier files are gone when the next file's are read."""
    import weakref

    make_run(tmp_path / "run", {})
    alive: list[Any] = []
    most = 0

    def watch(checkpoint: Path, name: str) -> Tensor:
        nonlocal most
        tensor = read_tensor(checkpoint, name)
        alive.append((weakref.ref(tensor), tensor.nbytes))
        most = max(most, sum(size for ref, size in alive if ref() is not None))
        return tensor

    monkeypatch.setattr("weft.trainer.convert.read_tensor", watch)
    export(tmp_path / "run", tmp_path / "hf", max_shard_bytes=40_000)
    assert len(alive) == 25
    assert most <= 40_000 < sum(size for _, size in alive)
