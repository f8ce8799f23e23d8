"""`weft convert` against checkpoints that the real DeepSpeed writes and loads, on two ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_ranks import CASES, KINDS, MODEL, STEPS
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_run import write_recipe
from torch import Tensor
from weft.models.errors import CheckpointError, ConfigError
from weft.trainer.checkpoint.reading import read_manifest, read_tensor
from weft.trainer.checkpoint.writing import write_checkpoint
from weft.trainer.configuration.load import load_config
from weft.trainer.configuration.schema import TrainingConfig
from weft.trainer.convert_deepspeed import import_deepspeed
from weft.trainer.deepspeed_folder import open_deepspeed, read_pickled
from weft.trainer.deepspeed_universal import export_deepspeed
from weft.trainer.optimization.schedule import learning_rate

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
WHOLE = [case for case, settings in CASES.items() if "frozen" not in settings]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every case, and beside them what DeepSpeed says is in them."""
    folder = tmp_path_factory.mktemp("written")
    run_ranks(2, "deepspeed_ranks:write_checkpoints", str(folder), timeout_s=400)
    return folder


@pytest.fixture(scope="module")
def loaded(written: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The first case, imported, exported, and loaded by DeepSpeed's three stages."""
    folder = tmp_path_factory.mktemp("loaded")
    config = make_config(folder)
    import_deepspeed(written / "zero 1", folder / "run", config)
    made = export_deepspeed(config, folder / "run", folder / "universal")
    assert (made.tag, made.updates) == (f"global_step{STEPS}_universal", STEPS)
    args = (str(folder / "universal"), str(folder))
    return folder, run_ranks(2, "deepspeed_ranks:load_universal", *args, timeout_s=400)


def make_config(folder: Path, **changes: Any) -> TrainingConfig:
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, model={**MODEL, **changes})
    return load_config(str(recipe), [], folder).config


def read_run(run: Path) -> dict[str, Tensor]:
    """What an imported run holds, under the names that `state_of` gives."""
    checkpoint = run / "checkpoints" / "step_00000000"
    found = {}
    for name in read_manifest(checkpoint).tensors:
        kind, _, rest = name.removeprefix("optimizer/").partition("/")
        key = f"{'fp32' if kind == 'parameters' else kind}/{rest.partition('/')[2]}"
        found[key] = read_tensor(checkpoint, name)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.view_as(found[name])), name


@needs_deepspeed
@pytest.mark.parametrize("layout", ["own", "universal"])
@pytest.mark.parametrize("case", WHOLE)
def test_what_deepspeed_writes_is_read(
    written: Path, tmp_path: Path, case: str, layout: str
) -> None:
    tag = None if layout == "own" else f"global_step{STEPS}_universal"
    made = import_deepspeed(written / case, tmp_path / "run", make_config(tmp_path), tag=tag)
    assert made.updates == STEPS
    stage = CASES[case]["stage"]
    assert made.layout == ("universal" if tag else f"ZeRO {stage} on 2 ranks")
    expected = load_file(written / f"{case}.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    assert_equal(read_run(tmp_path / "run"), expected)
    updates = read_manifest(tmp_path / "run" / "checkpoints" / "step_00000000").state["engine"]
    assert updates == {"updates": {"train": {"decay": STEPS, "no_decay": STEPS}}}


@needs_deepspeed
def test_stage_3_was_cut_into_several_groups(written: Path) -> None:
    place = written / "zero 3" / f"global_step{STEPS}"
    model = read_pickled(place / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert len(model["param_shapes"]) > 2


@needs_deepspeed
def test_frozen_parameters_have_no_moments(written: Path, tmp_path: Path) -> None:
    source, config = written / "zero 3 frozen", make_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"norm\.weight has no moments .*--weights-only"):
        import_deepspeed(source, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    made = import_deepspeed(source, tmp_path / "run", config, weights_only=True)
    assert made.updates is None
    expected = {
        name: tensor
        for name, tensor in load_file(written / "zero 3 frozen.safetensors").items()
        if name.startswith("fp32/")
    }
    found = read_run(tmp_path / "run")
    assert torch.equal(found["fp32/norm.weight"], torch.ones(MODEL["d_model"]))
    assert_equal(found, {**expected, "fp32/norm.weight": found["fp32/norm.weight"]})


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_loads_the_export(
    written: Path, loaded: tuple[Path, list[Any]], stage: int
) -> None:
    folder, answers = loaded
    assert [answer[str(stage)] for answer in answers] == [[STEPS, STEPS - 1]] * 2
    state = load_file(folder / f"loaded {stage}.safetensors")
    assert_equal(state, load_file(written / "zero 1.safetensors"))
    # The next step is the one DeepSpeed made without the detour: rate, decay and bias correction are where they were.
    later = load_file(folder / f"later {stage}.safetensors")
    expected = load_file(written / "zero 1 later.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(later[name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, state[name])


@needs_deepspeed
def test_training_goes_on_from_an_import(written: Path, tmp_path: Path, weft_command: Any) -> None:
    config = make_config(tmp_path)
    import_deepspeed(written / "zero 3", tmp_path / "first", config)
    start = [
        f"checkpoint.start_from={tmp_path / 'first'}",
        "checkpoint.start_from_parts=weights_and_optimizer",
        f"run.dir={tmp_path / 'second'}",
        "train.steps=1",
        "optimizer.lr=1e-30",
        "schedule.warmup_steps=0",
    ]
    code, _, error = weft_command("train", tmp_path / "first" / "config.yaml", *start)
    assert code == 0, error
    after = tmp_path / "second" / "checkpoints" / "step_00000001"
    updates = read_manifest(after).state["engine"]["updates"]
    assert updates == {"train": {"decay": STEPS + 1, "no_decay": STEPS + 1}}
    before = load_file(written / "zero 3.safetensors")
    for name in ("embedding.tokens.weight", "blocks.1.mlp.up_proj.weight"):
        assert torch.equal(read_tensor(after, f"parameters/model/{name}"), before[f"fp32/{name}"])
        moment = read_tensor(after, f"optimizer/exp_avg/model/{name}")
        assert not torch.equal(moment, before[f"exp_avg/{name}"])


@needs_deepspeed
def test_missing_ranks_and_damaged_files_are_named(written: Path, tmp_path: Path) -> None:
    for case, name in (("zero 1", "zero_pp_rank_1"), ("zero 3", "zero_pp_rank_1")):
        copy = tmp_path / case
        shutil.copytree(written / case / f"global_step{STEPS}", copy)
        (file,) = copy.glob(f"{name}_*optim_states.pt")
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=f"{file.name} is truncated"):
            open_deepspeed(copy)
        file.unlink()
        with pytest.raises(CheckpointError, match="of 1 ranks and was written by 2"):
            open_deepspeed(copy)


def model_state(**changes: Any) -> dict[str, Any]:
    return {"param_shapes": [], "module": {}, "global_steps": 1, **changes}


def save_minimal(folder: Path, client_state: Any) -> None:
    """One parameter as ZeRO 1 on one rank has it, with something of the user's beside it."""
    folder.mkdir()
    optimizer = {
        "zero_stage": 1,
        "partition_count": [1],
        "param_slice_mappings": [{}],
        "single_partition_of_fp32_groups": [torch.zeros(0)],
        "base_optimizer_state": {"state": {}, "param_groups": []},
    }
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": optimizer}, file)
    module = {"norm.weight": torch.arange(3.0, dtype=torch.bfloat16)}
    torch.save(model_state(module=module, mine=client_state), folder / "mp_rank_00_model_states.pt")


class Runs:
    """Leaves a file behind where it is unpickled by Python."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


class Evaluates:
    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (self.text,)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    command = f"echo > {proof}"
    pickle.loads(pickle.dumps(Runs(command)))
    assert proof.exists()
    proof.unlink()
    save_minimal(tmp_path / "system", Runs(command))
    with pytest.raises(CheckpointError, match=r"without running what is in it .*system") as raised:
        open_deepspeed(tmp_path / "system")
    assert "\n" not in str(raised.value)
    save_minimal(tmp_path / "eval", Evaluates(f"open({str(proof)!r}, 'w')"))
    opened = open_deepspeed(tmp_path / "eval")
    assert opened.read("fp32", "norm.weight").tolist() == [0, 1, 2]
    assert not proof.exists()


def test_what_is_no_checkpoint_of_zero(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        open_deepspeed(tmp_path / "absent")
    with pytest.raises(ConfigError, match="neither latest nor"):
        open_deepspeed(tmp_path)
    (tmp_path / "latest").write_text("../outside")
    with pytest.raises(ConfigError, match="is not the name of a tag"):
        open_deepspeed(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tag global_step9; it has none"):
        open_deepspeed(tmp_path, "global_step9")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match="was not written by ZeRO"):
        open_deepspeed(tmp_path, "plain")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallel ranks"),
        ("layer_00-model_00-model_states.pt", "pipeline stages"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
    ],
)
def test_model_parallel_checkpoints_are_made_universal_first(
    tmp_path: Path, file: str, message: str
) -> None:
    save_minimal(tmp_path / "source", None)
    (tmp_path / "source" / file).touch()
    with pytest.raises(ConfigError, match=f"{message}; make it universal first"):
        open_deepspeed(tmp_path / "source")


def make_run(folder: Path, moments: bool, **counts: int) -> tuple[TrainingConfig, Path]:
    """A run with one checkpoint of step 8."""
    config = make_config(folder)
    run = folder / "run"
    tensors = {}
    for name, parameter in named_parameters(config).items():
        for number, kind in enumerate(KINDS if moments else KINDS[:1], 1):
            key = f"parameters/model/{name}" if kind == "fp32" else f"optimizer/{kind}/model/{name}"
            tensors[key] = torch.full(parameter, float(number))
    updates = {"train": {"decay": 8, "no_decay": 8, **counts}}
    state = {"step": 8, "engine": {"updates": updates}}
    write_checkpoint(run / "checkpoints" / "step_00000008", tensors, state)
    return config, run


def named_parameters(config: TrainingConfig) -> dict[str, torch.Size]:
    from weft.models import build_model

    return {n: p.shape for n, p in build_model(config.model).named_parameters()}


def test_an_export_has_hugging_face_names_where_asked(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, moments=True)
    made = export_deepspeed(config, run, tmp_path / "out", names="hf", step_counter="int")
    place = tmp_path / "out" / made.tag / "zero"
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.load(place / name / "exp_avg.pt")["param"].unique().tolist() == [2]
    counter = torch.load(place / name / "step.pt")
    assert (type(counter), counter) == (int, 8)
    rate = learning_rate(config.schedule, config.optimizer.lr, 9, 256, 30)
    assert {g["lr"] for g in torch.load(place / "optimizer_state.pt")["param_groups"]} == {rate}
    # And such names are understood on the way back.
    import_deepspeed(tmp_path / "out", tmp_path / "back", config)
    assert set(read_run(tmp_path / "back")) == {
        f"{kind}/{n}" for kind in KINDS for n in named_parameters(config)
    }


def test_weights_alone_are_exported_with_fresh_moments(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, moments=False)
    made = export_deepspeed(config, run, tmp_path / "out")
    assert made.updates is None
    place = tmp_path / "out" / made.tag / "zero" / "norm.weight"
    assert torch.load(place / "fp32.pt")["param"].unique().tolist() == [1]
    assert torch.load(place / "exp_avg_sq.pt")["param"].unique().tolist() == [0]
    assert torch.load(place / "step.pt") == 0


def test_refused_exports_leave_nothing(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, moments=True, no_decay=7)
    with pytest.raises(CheckpointError, match=r"differently often \(decay 8, no_decay 7\)"):
        export_deepspeed(config, run, tmp_path / "out")
    tables = make_config(tmp_path / "tables", ngram={"sizes": [2], "rows": 50})
    with pytest.raises(ConfigError, match=r"model\.ngram"):
        export_deepspeed(tables, run, tmp_path / "out", names="hf")
    assert not (tmp_path / "out").exists()


def export_of(tmp_path: Path) -> tuple[TrainingConfig, Path]:
    config, run = make_run(tmp_path, moments=True)
    export_deepspeed(config, run, tmp_path / "out")
    return config, tmp_path / "out"


def test_the_wrong_model_is_refused(tmp_path: Path) -> None:
    _, source = export_of(tmp_path)
    for changes, message in (
        ({"d_ff": 8}, r"shape \[9, 7\], but --model's has \[9, 8\]"),
        ({"n_layers": 3}, r"holds no blocks\.2\..* of 36 parameters are missing"),
        ({"n_layers": 1}, r"blocks\.1\..* does not exist in a model of this size"),
    ):
        config = make_config(tmp_path / "other", **changes)
        with pytest.raises((CheckpointError, ConfigError), match=message) as raised:
            import_deepspeed(source, tmp_path / "run2", config)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run2").exists()


def test_a_prefix_is_taken_off(tmp_path: Path) -> None:
    config, source = export_of(tmp_path)
    for place in list((source / "global_step8_universal" / "zero").iterdir()):
        if place.is_dir():
            place.rename(place.with_name(f"wrapped.{place.name}"))
    with pytest.raises(ConfigError, match="--prefix"):
        import_deepspeed(source, tmp_path / "run2", config)
    import_deepspeed(source, tmp_path / "run2", config, prefix="wrapped.")
    assert read_run(tmp_path / "run2")["exp_avg/norm.weight"].unique().tolist() == [2]


def test_the_command_there_and_back(tmp_path: Path, weft_command: Any) -> None:
    _, run = make_run(tmp_path, moments=True)
    recipe = tmp_path / "tiny.yaml"
    shutil.copy(recipe, run / "config.yaml")
    code, out, _ = weft_command("convert", "export-deepspeed", run, tmp_path / "out")
    assert code == 0
    assert "moments after 8 updates" in out
    assert '{"load_universal": true}' in out
    back = tmp_path / "back"
    arguments = (tmp_path / "out", back, "--model", recipe, "train.steps=5")
    code, out, _ = weft_command("convert", "import-deepspeed", *arguments)
    assert code == 0
    assert "from universal" in out
    assert "start_from_parts=weights_and_optimizer" in out
    assert read_run(back)["exp_avg/norm.weight"].unique().tolist() == [2]
    assert "steps: 5" in (back / "config.yaml").read_text()
    code, _, error = weft_command("convert", "import-deepspeed", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert "already exists" in error


def test_the_command_takes_a_hugging_face_model(tmp_path: Path, weft_command: Any) -> None:
    from weft.models.transformer.config import Config
    from weft.models.transformer.hugging_face import to_hugging_face_config

    config, run = make_run(tmp_path, moments=True)
    export_deepspeed(config, run, tmp_path / "out", names="hf")
    settings = to_hugging_face_config(
        Config(**MODEL), max_positions=128, eos_id=2, bos_id=1, pad_id=3, dtype="float32"
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    arguments = (tmp_path / "out", tmp_path / "back", "--model", tmp_path / "hf")
    code, _, error = weft_command("convert", "import-deepspeed", *arguments)
    assert code == 0, error
    assert read_run(tmp_path / "back")["fp32/norm.weight"].unique().tolist() == [1]


@pytest.fixture
def weft_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives (exit code, standard output, standard error)."""
    from weft.launch.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["weft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    return run
