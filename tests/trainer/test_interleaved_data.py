"""Interleaved sources from files to batches: formats, preparation, mixtures, order, and every refusal."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from weft.models.batch import LATENTS, PackedBatch
from weft.models.errors import ConfigError, DataError
from weft.trainer.data.config import DataConfig, HeldOutConfig, RepeatFilterConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.interleaved.config import InterleavedConfig
from weft.trainer.data.loader import PackedLoader, held_out_batches
from weft.trainer.data.prepare import plan_preparation, prepare_source
from weft.trainer.data.shards import Manifest, read_manifest, verify_prepared

PIXELS = {"image": {"size": 4, "channels": 1}}
GIVEN_CODES = {
    "modalities": ["text", "image", "speech"],
    "image": {"kind": "codes", "codec": None, "codes": 20},
    "speech": {"codes": 9},
}


def write_pairs(root: Path, count: int = 30) -> Path:
    """Captions and 6 x 5 pictures whose brightness is their number."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        Image.new("RGB", (6, 5), (8 * i, 8 * i, 8 * i)).save(root / f"{i}.png")
        lines.append(json.dumps({"parts": [{"text": f"picture {i}"}, {"image": f"{i}.png"}]}))
    (root / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return root / "pairs.jsonl"


def write_lines(path: Path, *documents: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps({"parts": parts}) + "\n" for parts in documents))
    return path


def prepare(
    path: Path, out: Path, settings: dict, workers: int = 1, kind: str = "interleaved", **rest
) -> Manifest:
    plan = plan_preparation(
        SourceConfig(name="s", path=str(path), format=kind),
        "bytes",
        held_out=HeldOutConfig(documents=3),
        repeats=RepeatFilterConfig(),
        interleaved=InterleavedConfig(**settings),
        **rest,
    )
    return prepare_source(plan, out, workers=workers, quiet=True)


def open_pairs(tmp: Path, *sources: dict, interleaved: dict | None = PIXELS, **rest) -> Dataset:
    return open_data(
        DataConfig(
            sources=sources,
            sequence_length=rest.pop("sequence_length", 40),
            held_out={"documents": 3},
            cache_dir=str(tmp / "cache"),
            interleaved=interleaved,
            **rest,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root)
    (root / "plain").mkdir()
    for i in range(12):
        (root / "plain" / f"{i}.txt").write_text(f"plain text {i} " * (i + 1))
    return root


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return open_pairs(
        folder,
        {
            "name": "pairs",
            "path": str(folder / "pairs.jsonl"),
            "format": "interleaved",
            "weight": 0.7,
        },
        {"name": "plain", "path": str(folder / "plain"), "weight": 0.3},
    )


def rows_of(batches: list[PackedBatch]) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """(tokens, targets, latents of its images) of each row by sample."""
    found = {}
    for batch in batches:
        length = batch.row_length
        keys = batch.side["image_keys"][:, 0].tolist()
        for r, sample in enumerate(batch.sample_ids):
            part = slice(r * length, (r + 1) * length)
            mine = [k for k, key in enumerate(keys) if key == sample]
            found[sample] = (
                batch.tokens[part].tolist(),
                batch.targets[part].tolist(),
                batch.side[LATENTS][mine].flatten().tolist(),
            )
    return found


def take(data: Dataset, steps: int, ranks: int = 1, micro: int | None = None, start: int = 0):
    batches = []
    for rank in range(ranks):
        with PackedLoader(
            data, seed=1, batch_rows=4, micro_batch_rows=micro, data_rank=rank, data_ranks=ranks,
            start_sample=start, end_sample=start + 4 * steps,
        ) as loader:  # fmt: skip
            for _ in range(steps):
                batches += loader.next_step().micro_batches
    return rows_of(batches)


def test_captions_and_images_arrive_together(data: Dataset) -> None:
    assert data.images is not None
    assert (data.images.shape, data.images.grid, data.modalities) == (
        (1, 4, 4),
        (2, 2),
        ("text", "image"),
    )
    seen = 0
    with PackedLoader(data, seed=1, batch_rows=4, end_sample=40) as loader:
        for _ in range(10):
            batch = loader.next_step().micro_batches[0]
            latents = data.images.from_model(batch.side[LATENTS].numpy())
            for (start, stop), latent in zip(
                batch.side["image_spans"].tolist(), latents, strict=True
            ):
                borders = batch.cu_seqlens.tolist()
                first = max(b for b in borders if b <= start)
                last = min(b for b in borders if b >= stop)
                text = data.vocabulary.decode(batch.tokens[first:last].numpy())
                if text:
                    wanted = int(text.split()[1]) * 8 / 127.5 - 1
                    assert latent.mean() == pytest.approx(wanted, abs=2e-3)
                    seen += 1
    assert seen > 30


def test_latents_have_unit_variance(data: Dataset) -> None:
    with PackedLoader(data, seed=1, batch_rows=20, end_sample=20) as loader:
        latents = loader.next_step().micro_batches[0].side[LATENTS]
    assert abs(float(latents.mean())) < 0.3
    assert 0.7 < float(latents.std()) < 1.3
    assert data.images.minimum - 1e-5 <= float(latents.min())
    assert float(latents.max()) <= data.images.maximum + 1e-5


def test_text_sources_stand_beside_interleaved_ones(data: Dataset, folder: Path) -> None:
    counts = data.order(1).counts(10_000)
    assert counts["pairs"] == pytest.approx(7000, abs=2)
    with PackedLoader(data, seed=1, batch_rows=20, end_sample=20) as loader:
        batch = loader.next_step().micro_batches[0]
    rows = [r for r, source in enumerate(batch.source_ids) if source == 1]
    assert rows
    assert not batch.modality.view(20, -1)[rows].any()
    alone = open_pairs(folder, {"name": "plain", "path": str(folder / "plain")}, interleaved=None)
    assert alone.sources[0].folder == data.sources[1].folder
    assert "interleaved" not in json.loads((alone.sources[0].folder / "manifest.json").read_text())


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(done=st.integers(0, 5), ranks=st.sampled_from([1, 2, 4]), micro=st.sampled_from([None, 1]))
def test_ranks_micro_batches_and_restarts_change_nothing(data, done, ranks, micro) -> None:
    whole = take(data, 6)
    part = take(data, 6 - done, ranks=ranks, micro=micro, start=4 * done)
    assert part == {sample: row for sample, row in whole.items() if sample >= 4 * done}


def test_a_task_draws_in_the_loader(data: Dataset) -> None:
    class Task:
        def draw(self, batch: PackedBatch, seed: int) -> PackedBatch:
            return batch.map_tensors(lambda tensor: tensor * 0 + seed)

    with PackedLoader(data, seed=7, batch_rows=2, end_sample=2, task=Task()) as loader:  # type: ignore[arg-type]
        batch = loader.next_step().micro_batches[0]
    assert set(batch.tokens.tolist()) == {7}


def test_held_out_documents_are_given_once_on_any_ranks(data: Dataset) -> None:
    def images(ranks: int) -> list[float]:
        found = []
        for rank in range(ranks):
            for batch in held_out_batches(data, "pairs", 1, rank, ranks):
                found += batch.side[LATENTS].mean(dim=(1, 2, 3)).tolist()
        return sorted(found)

    assert len(images(1)) == 3
    assert images(1) == images(2) == images(4)
    assert len({len(held_out_batches(data, "pairs", 1, rank, 2)) for rank in range(2)}) == 1
    batches = list(held_out_batches(data, "pairs", 4))
    firsts = [bool(value) for batch in batches for value in batch.side["image_first"]]
    assert firsts == [False, True, False]
    assert len(held_out_batches(data, "pairs", 1, max_tokens=40)) == 1


def test_the_fingerprint_knows_order_and_images(
    data: Dataset, folder: Path, tmp_path: Path
) -> None:
    sources = [source.config.model_dump() for source in data.sources]
    same = open_pairs(folder, *sources)
    same.check_fingerprint(data.fingerprint)
    changed = open_pairs(folder, *sources, interleaved={**PIXELS, "image_first": 0.5})
    with pytest.raises(DataError, match=r"interleaved was .* and is"):
        changed.check_fingerprint(data.fingerprint)
    other = open_pairs(tmp_path, *sources, interleaved={"image": {"size": 4}})
    with pytest.raises(DataError, match="'pairs' has other content"):
        other.check_fingerprint(data.fingerprint)
    scaled = {**PIXELS, "image": {**PIXELS["image"], "scale": 2.0}}
    with pytest.raises(DataError, match=r"latents was scale .* and is scale 2\.0"):
        open_pairs(folder, *sources, interleaved=scaled).check_fingerprint(data.fingerprint)
    plain = open_pairs(folder, sources[1], interleaved=None)
    assert set(plain.fingerprint) == {"vocabulary", "sequence_length", "repeat_filter", "sources"}


def test_whole_documents_of_text_alone(folder: Path) -> None:
    source = {"name": "plain", "path": str(folder / "plain")}
    data = open_pairs(folder, source, interleaved=None, packing="documents", sequence_length=64)
    assert data.fingerprint["packing"] == "documents"
    with PackedLoader(data, seed=0, batch_rows=1, end_sample=data.sources[0].sequences) as loader:
        batches = [loader.next_step().micro_batches[0] for _ in range(data.sources[0].sequences)]
    targets = sum(batch.target_count for batch in batches)
    assert targets == data.sources[0].train.tokens - 11
    replaced = data.with_held_out({"plain": [b"one", b"three"]})
    (batch,) = held_out_batches(replaced, "plain", 4)
    assert (batch.target_count, batch.target_bytes) == (4 + 6, 8)
    with pytest.raises(DataError, match=r"data\.interleaved is set"):
        open_pairs(folder, source).with_held_out({})


def test_a_dataset_is_the_same_for_any_workers_and_restart(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "in", 25)
    for number in range(1, 4):
        (tmp_path / "in" / f"more{number}.jsonl").write_bytes(pairs.read_bytes())
    source = tmp_path / "in" / "*.jsonl"
    one = prepare(source, tmp_path / "one", PIXELS)
    two = prepare(source, tmp_path / "two", PIXELS, workers=2)
    assert len(one.shards) == 4
    assert [shard.images for shard in one.shards] == [25] * 4
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )
    assert one.fingerprint == two.fingerprint
    verify_prepared(tmp_path / "one")
    (tmp_path / "in" / "more2.jsonl").write_text("broken\n")
    with pytest.raises(DataError, match="is not JSON"):
        prepare(source, tmp_path / "three", PIXELS)
    kept = tmp_path / ".three.partial" / "shard_00000.latents"
    before = kept.stat().st_mtime_ns
    (tmp_path / "in" / "more2.jsonl").write_bytes(pairs.read_bytes())
    assert prepare(source, tmp_path / "three", PIXELS).fingerprint == one.fingerprint
    assert (tmp_path / "three" / "shard_00000.latents").stat().st_mtime_ns == before


def test_damage_is_found(tmp_path: Path) -> None:
    prepare(write_pairs(tmp_path / "in"), tmp_path / "out", PIXELS)
    latents = tmp_path / "out" / "shard_00000.latents"
    content = latents.read_bytes()
    latents.write_bytes(b"x" + content[1:])
    with pytest.raises(DataError, match=r"latents does not match its checksum"):
        verify_prepared(tmp_path / "out")
    latents.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"latents has 958 bytes, not 960"):
        read_manifest(tmp_path / "out")


def test_all_kinds_of_parts_in_one_document(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        [{"text": "a"}, {"speech_codes": [0, 8]}, {"image_codes": [1, 2, 3, 19]}, {"text": "b"}],
        [{"text": ""}],
        [],
    )
    manifest = prepare(path, tmp_path / "out", GIVEN_CODES)
    assert (manifest.documents, manifest.dropped) == (1, {"empty": 2})
    ids = manifest.shards[0].open_ids(tmp_path / "out").tolist()
    a, b = ord("a") + 4, ord("b") + 4
    first_image, first_speech = 264, 284
    assert ids == [
        1, a, 262, first_speech, first_speech + 8, 263,
        260, *(first_image + c for c in (1, 2, 3, 19)), 261, b, 2,
    ]  # fmt: skip
    spans = manifest.shards[0].open_spans(tmp_path / "out").tolist()
    assert spans == [[3, 2, 2, -1], [7, 4, 1, 0]]
    assert manifest.interleaved["modalities"] == ["text", "image", "speech"]
    assert manifest.interleaved["image"]["grid"] == [2, 2]


def test_latents_that_the_data_bring(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(3, 2, (12, 4, 6, 4)).astype(np.float32)
    for i, latent in enumerate(latents):
        np.save(tmp_path / f"{i}.npy", latent)
    path = write_lines(
        tmp_path / "d.jsonl", *([{"text": str(i)}, {"latent": f"{i}.npy"}] for i in range(12))
    )
    settings = {"image": {"codec": None, "dtype": "float32"}}
    data = open_pairs(
        tmp_path, {"name": "d", "path": str(path), "format": "interleaved"}, interleaved=settings
    )
    assert (data.images.shape, data.images.grid) == ((4, 6, 4), (3, 2))
    assert data.images.shift == pytest.approx(latents.mean(), rel=1e-5)
    assert 1 / data.images.scale == pytest.approx(latents.std(), rel=1e-5)
    stored = data.sources[0].train.shards[0].latents
    assert np.array_equal(stored, latents)
    fixed = {"image": {**settings["image"], "scale": 0.18215, "shift": 0.0}}
    source = {"name": "d", "path": str(path), "format": "interleaved"}
    assert open_pairs(tmp_path, source, interleaved=fixed).images.scale == 0.18215


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def test_webdataset_tars(tmp_path: Path) -> None:
    parts = {"parts": [{"image": "0.png"}, {"text": "between"}, {"image": "b.1.png"}]}
    write_tar(
        tmp_path / "a.tar",
        {
            "x/a.txt": b"a red square\n", "x/a.png": png(),
            "x/b.json": json.dumps(parts).encode(), "x/b.0.png": png(), "x/b.1.png": png(),
        },
    )  # fmt: skip
    manifest = prepare(tmp_path / "a.tar", tmp_path / "out", PIXELS, kind="auto")
    assert (manifest.kind, manifest.documents, manifest.shards[0].images) == ("webdataset", 2, 3)
    assert manifest.bytes == len("a red square") + len("between")


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ([{"image": "gone.png"}], PIXELS, r"d\.jsonl line 1 names gone\.png, which is not in"),
        ([{"image": "bad.png"}], PIXELS, r"bad\.png is not an image that can be read"),
        ([{"image": "cut.png"}], PIXELS, r"cut\.png is not an image that can be read"),
        ([{"image": "good.png"}], {"modalities": ["text"]}, r"add image to it"),
        ([{"image": "good.png"}], {"image": {"codec": None}}, r"codec is null; name a codec"),
        ([{"image": "good.png"}], {"image": {}}, r"image\.size: codec pixels has no size"),
        ([{"latent": "bad.png"}], PIXELS, r"is not a whole \.npy file"),
        ([{"latent": "a.npy"}, {"latent": "b.npy"}], {"image": {"codec": None}},
         r"b\.npy has latents of shape 2 x 4 x 4, but .*a\.npy has latents of shape 1 x 4 x 4"),
        ([{"latent": "odd.npy"}], {"image": {"codec": None}}, r"5 x 4 do not divide into patches of 2"),
        ([{"latent": "flat.npy"}], {"image": {"codec": None}}, r"a latent is floating point of \(channels"),
        ([{"latent": "huge.npy"}], {"image": {"codec": None}}, r"do not fit float16"),
        ([{"image_codes": [3, 20]}], GIVEN_CODES, r"code 20 is outside 0 to 19; check data\.interleaved\.image\.codes"),
        ([{"speech_codes": [-1]}], GIVEN_CODES, r"code -1 is outside 0 to 8"),
        ([{"image_codes": [1] * 4}, {"image_codes": [1] * 9}], GIVEN_CODES, r"has 9 codes, but .* has 4 codes"),
        ([{"image_codes": [1] * 4}], PIXELS, r"image_codes, but data\.interleaved\.image\.kind is latents"),
        ([{"image_codes": []}], GIVEN_CODES, r"are no list of integers"),
        ([{"picture": "x"}], PIXELS, r"part 0 is \(picture\); a part has one key of text, image"),
        ([{"text": 3}], PIXELS, r"text of part 0 is int, not a string"),
    ],
)  # fmt: skip
def test_bad_documents_are_refused_in_one_line(
    tmp_path: Path, parts: list, settings: dict, message: str
) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(png((64, 64))[:90])
    for name, shape in (("a", (1, 4, 4)), ("b", (2, 4, 4)), ("odd", (1, 5, 4)), ("flat", (4, 4))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, np.float32))
    np.save(tmp_path / "huge.npy", np.full((1, 4, 4), 1e9, np.float32))
    path = write_lines(tmp_path / "d.jsonl", parts)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        prepare(path, tmp_path / "out", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"words"}, r"sample a has a\.txt: a sample is KEY\.txt with a picture"),
        ({"a.png": b"x"}, r"sample a has a\.png"),
        ({"a.json": b'{"parts": [{"image": "b.png"}]}'}, r"names b\.png, which is not beside it"),
    ],
)
def test_captions_without_images_are_refused(tmp_path: Path, members: dict, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        prepare(path, tmp_path / "out", PIXELS, kind="webdataset")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(write_tar(tmp_path / "b.tar", {"a.txt": b"x" * 3000}).read_bytes()[:1500])
    with pytest.raises(DataError, match="not a whole tar file"):
        prepare(cut, tmp_path / "out", PIXELS, kind="webdataset")


def test_shapes_that_differ_between_files_are_refused(tmp_path: Path) -> None:
    for name, side in (("a", 4), ("b", 6)):
        np.save(tmp_path / f"{name}.npy", np.zeros((1, side, side), np.float32))
        write_lines(tmp_path / f"{name}.jsonl", [{"text": "x"}, {"latent": f"{name}.npy"}])
    with pytest.raises(DataError, match=r"b\.npy has shape 1 x 6 x 6, but .*a\.npy has 1 x 4 x 4"):
        prepare(tmp_path / "*.jsonl", tmp_path / "out", {"image": {"codec": None}})


def test_runs_that_do_not_fit_the_data_are_refused(folder: Path, tmp_path: Path) -> None:
    source = {"name": "pairs", "path": str(folder / "pairs.jsonl"), "format": "interleaved"}
    with pytest.raises(
        DataError, match=r"say which, and what images become, with data\.interleaved"
    ):
        open_pairs(tmp_path, source, interleaved=None)
    prepare(folder / "pairs.jsonl", tmp_path / "out", PIXELS)
    made = {"name": "made", "path": str(tmp_path / "out")}
    with pytest.raises(DataError, match=r"holds text, image, and data\.interleaved is null"):
        open_pairs(tmp_path, made, interleaved=None)
    with pytest.raises(DataError, match=r"has image, but data\.interleaved\.modalities is \[text"):
        open_pairs(tmp_path, made, interleaved={"modalities": ["text", "speech"]})
    with pytest.raises(
        DataError, match=r"images as latents and data\.interleaved\.image\.kind is codes"
    ):
        open_pairs(tmp_path, made, interleaved={"image": {"kind": "codes", "codec": None}})
    with pytest.raises(
        DataError, match=r"prepared with other image ids \(opens 260; the run has opens 200\)"
    ):
        open_pairs(tmp_path, made, interleaved={**PIXELS, "boi_id": 200})
    with pytest.raises(DataError, match=r"do not fit into a row of data\.sequence_length=5"):
        open_pairs(tmp_path, made, sequence_length=5)
    with pytest.raises(DataError, match=r"images of sources 'made' and 'pairs' differ in shape"):
        open_pairs(tmp_path, made, source, interleaved={"image": {"size": 8, "channels": 1}})
    with pytest.raises(ValueError, match="packing stream would cut images"):
        open_pairs(tmp_path, made, packing="stream")


def test_more_modalities_in_the_run_than_in_the_data(folder: Path, tmp_path: Path) -> None:
    prepare(folder / "pairs.jsonl", tmp_path / "out", PIXELS)
    made = {"name": "made", "path": str(tmp_path / "out")}
    wide = {**PIXELS, "modalities": ["text", "speech", "image"], "speech": {"codes": 9}}
    data = open_pairs(tmp_path, made, interleaved=wide)
    with PackedLoader(data, seed=0, batch_rows=2, end_sample=2) as loader:
        batch = loader.next_step().micro_batches[0]
    assert set(batch.modality.tolist()) == {0, 2}
    assert (batch.host_counts["speech_positions"], batch.host_counts["speech_targets"]) == (0, 0)
    assert data.vocabulary.size == 264 + 9


def test_reserved_ids_stand_for_added_ones(folder: Path, tmp_path: Path) -> None:
    source = {"name": "pairs", "path": str(folder / "pairs.jsonl"), "format": "interleaved"}
    data = open_pairs(tmp_path, source, interleaved={**PIXELS, "boi_id": 0, "eoi_id": 3})
    assert data.vocabulary.size == 260
    with PackedLoader(data, seed=0, batch_rows=2, end_sample=2) as loader:
        batch = loader.next_step().micro_batches[0]
    assert {0, 3} <= set(batch.tokens.tolist())
    with pytest.raises(DataError, match=r"eoi_id: 2 is no reserved id"):
        open_pairs(tmp_path, source, interleaved={**PIXELS, "boi_id": 0, "eoi_id": 2})


def test_a_run_keeps_what_was_measured_of_its_latents(data: Dataset) -> None:
    from weft.models.transformer.config import Config
    from weft.trainer.configuration.schema import TrainingConfig
    from weft.trainer.opening import settle_images

    config = settle_images(TrainingConfig(model=Config(), data=data.config), data)
    kept = TrainingConfig.model_validate(config.dump()).data
    assert kept.interleaved.image.clip == (data.images.minimum, data.images.maximum)
    again = open_data(kept)
    assert (again.images, again.fingerprint) == (data.images, data.fingerprint)
