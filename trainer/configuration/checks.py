"""Checks that span several sections, and those that need the number of ranks.

Each check names the keys it reads, so that one wrong value is reported once: a check is left out
where one of its keys has failed already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from ...models.errors import ConfigError

if TYPE_CHECKING:
    from .schema import TrainingConfig

__all__ = ["check_against_world", "cross_field_errors"]

BYTE_VOCABULARY_SIZE = 260

Check = Callable[["TrainingConfig"], Iterator[str]]


def cross_field_errors(config: TrainingConfig, broken: Collection[str] = ()) -> list[str]:
    """What cannot work although each value alone is fine; one line each, naming the key first.

    Args:
        config: complete; values at `broken` keys are stand-ins.
        broken: dotted keys (or sections) whose own value was wrong.
    """
    found: list[str] = []
    for keys, check in _CHECKS:
        if not any(_touches(key, bad) for key in keys for bad in broken):
            found.extend(check(config))
    return found


def _touches(key: str, bad: str) -> bool:
    return key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.")


def _batch_in_rows(config: TrainingConfig) -> Iterator[str]:
    batch, length = config.train.batch_tokens, config.data.sequence_length
    if batch % length:
        near = max(1, round(batch / length)) * length
        yield f"train.batch_tokens: {batch} is not a multiple of data.sequence_length {length}; the nearest is {near}"


def _micro_batch_in_rows(config: TrainingConfig) -> Iterator[str]:
    micro, length = config.train.micro_batch_tokens, config.data.sequence_length
    if micro and micro % length:
        near = max(1, round(micro / length)) * length
        yield f"train.micro_batch_tokens: {micro} is not a multiple of data.sequence_length {length}; the nearest is {near}"


def _micro_batch_within_batch(config: TrainingConfig) -> Iterator[str]:
    micro, batch = config.train.micro_batch_tokens, config.train.batch_tokens
    if micro and micro > batch:
        yield f"train.micro_batch_tokens: {micro} is more than the whole batch, train.batch_tokens {batch}"


def _schedule_in_steps(config: TrainingConfig) -> Iterator[str]:
    train, schedule = config.train, config.schedule
    batch, total = train.batch_tokens, train.steps * train.batch_tokens
    warmup = schedule.warmup_tokens or (schedule.warmup_steps or 0) * batch
    horizon = schedule.horizon_tokens or (schedule.horizon_steps or train.steps) * batch
    warmup_key = "warmup_tokens" if schedule.warmup_tokens else "warmup_steps"
    horizon_key = "horizon_tokens" if schedule.horizon_tokens else "horizon_steps"
    if schedule.kind == "constant":
        return
    if warmup >= horizon:
        yield (
            f"schedule.{warmup_key}: a warm-up of {_in_steps(warmup, batch)} does not fit in a schedule of "
            f"{_in_steps(horizon, batch)}; shorten it, or raise schedule.{horizon_key} or train.steps"
        )
    elif schedule.kind in ("linear", "wsd") and horizon < total:
        yield (
            f"schedule.{horizon_key}: {schedule.kind} reaches zero after {_in_steps(horizon, batch)} but "
            f"train.steps is {train.steps}; raise the horizon or lower train.steps"
        )
    elif schedule.kind == "wsd" and warmup + schedule.decay_fraction * horizon > horizon:
        yield (
            f"schedule.decay_fraction: warm-up and a decay over {schedule.decay_fraction:g} of the schedule overlap; "
            f"the most that fits is {1 - warmup / horizon:.3g}"
        )


def _in_steps(tokens: int, batch: int) -> str:
    return f"{tokens // batch} steps" if tokens % batch == 0 else f"{tokens / batch:.1f} steps"


def _vocabulary_fits(config: TrainingConfig) -> Iterator[str]:
    size, interleaved = getattr(config.model, "vocab_size", None), config.data.interleaved
    if config.data.vocabulary != "bytes" or size is None:
        return
    needed = BYTE_VOCABULARY_SIZE + (interleaved.added_ids if interleaved else 0)
    special = getattr(config.model, "special_ids", ())
    if interleaved and special and size == BYTE_VOCABULARY_SIZE:
        # Around a base whose tables are as they are: all that text has not must have an embedding in the table beside them.
        codes = interleaved.image_codes + interleaved.speech_codes
        used = {"image": (0, 1), "speech": (2, 3)}
        opening = [size + place for m in interleaved.modalities[1:] for place in used[m]]
        if codes or not set(opening) <= set(special):
            yield (
                f"model.special_ids: [{', '.join(map(str, special))}] are not the ids that open and close what is no text; "
                f"set model.special_ids='[{', '.join(map(str, opening))}]'"
            )
        return
    if size < needed:
        extended = " with data.interleaved" if interleaved else ""
        yield (
            f"model.vocab_size: {size} is less than the {needed} ids of data.vocabulary=bytes{extended}; "
            f"set model.vocab_size={needed}"
        )


def _modalities_agree(config: TrainingConfig) -> Iterator[str]:
    interleaved = config.data.interleaved
    if interleaved is None:
        return
    ours, theirs = interleaved.modalities, getattr(config.model, "modalities", None)
    if theirs is not None and tuple(theirs) != ours:
        yield (
            f"model.modalities: [{', '.join(theirs)}] is not data.interleaved.modalities [{', '.join(ours)}]; positions are "
            "routed by their place in it, so set both to the same list"
        )
    elif theirs is None and "image" in ours and interleaved.image.kind == "latents":
        yield (
            "data.interleaved.image.kind: this model family reads ids alone, not latents; set it to codes with a codec that "
            "makes them (gray-codes, vq:FOLDER), or choose a family with model.modalities"
        )


def _ngrams_of_bytes(config: TrainingConfig) -> Iterator[str]:
    if getattr(config.model, "ngram", None) is not None and config.data.vocabulary != "bytes":
        yield (
            f"model.ngram: hashed byte n-grams need data.vocabulary=bytes, found {config.data.vocabulary}; "
            "set model.ngram=null"
        )


def _patches_of_bytes(config: TrainingConfig) -> Iterator[str]:
    if getattr(config.model, "patching", None) is not None and config.data.vocabulary != "bytes":
        yield f"data.vocabulary: patches are of bytes, found {config.data.vocabulary}; set data.vocabulary=bytes"


def _images_of_family(config: TrainingConfig) -> Iterator[str]:
    family, images = getattr(config.model, "family", None), config.data.images
    wanted = IMAGE_KINDS.get(str(family))
    if wanted is None:
        if images is not None:
            yield f"data.images: family {family} is trained on no images alone; set data.images=null"
    elif images is None or images.kind != wanted:
        found = "null" if images is None else f"of kind {images.kind}"
        yield f"data.images: it is {found}, and family {family} is trained on {wanted}; set data.images.kind={wanted}"
    elif wanted == "pixels":
        for ours, theirs in (("size", "size"), ("channels", "in_channels")):
            value = getattr(config.model, theirs, None)
            if value is not None and value != getattr(images, ours):
                yield (
                    f"data.images.{ours}: {getattr(images, ours)} is not model.{theirs} {value}; set data.images.{ours}={value}"
                )


def _mesh_only_for_hsdp(config: TrainingConfig) -> Iterator[str]:
    parallel = config.parallel
    for key in ("shard_ranks", "replicate_ranks"):
        if getattr(parallel, key) is not None and parallel.strategy != "hsdp":
            yield f"parallel.{key}: has no effect with parallel.strategy={parallel.strategy}; set parallel.strategy=hsdp"


def _strategy_of_engine(config: TrainingConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.engine == "deepspeed" and parallel.strategy != "auto":
        yield (
            f"parallel.strategy: {parallel.strategy} belongs to engine torch; with parallel.engine=deepspeed set "
            "parallel.strategy=auto: what is split is parallel.deepspeed.zero_stage"
        )
    if parallel.engine == "deepspeed" and parallel.compile:
        yield "parallel.compile: DeepSpeed's hooks do not go with it; set parallel.compile=false, or parallel.engine=torch"


def _rows_can_be_cut(config: TrainingConfig) -> Iterator[str]:
    if config.parallel.sequence_ranks == 1:
        return
    model: Any = config.model
    if config.parallel.engine != "torch":
        yield (
            f"parallel.sequence_ranks: engine {config.parallel.engine} gives every rank rows of its own; set "
            "parallel.engine=torch, or parallel.sequence_ranks=1"
        )
    if not getattr(model, "can_cut_rows", False):
        yield "parallel.sequence_ranks: only family mamba passes states from rank to rank; set parallel.sequence_ranks=1"
    elif model.image is not None:
        yield (
            "parallel.sequence_ranks: continuous images stand or fall as a whole; set parallel.sequence_ranks=1, or "
            "take images as codes"
        )


def _averages_of_engine(config: TrainingConfig) -> Iterator[str]:
    engine = config.parallel.engine
    if config.optimizer.ema_decay is not None and engine != "torch":
        yield (
            f"optimizer.ema_decay: engine {engine} keeps no averages of weights; set parallel.engine=torch, or "
            "optimizer.ema_decay=null"
        )


def _skip_step_can_apply(config: TrainingConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.skip_step and optimizer.skip_step_minimum > optimizer.skip_step_window + 1:
        yield (
            f"optimizer.skip_step_minimum: {optimizer.skip_step_minimum} values are never held with "
            f"optimizer.skip_step_window {optimizer.skip_step_window}; the most is the window and the newest"
        )


def _best_can_be_told(config: TrainingConfig) -> Iterator[str]:
    if config.checkpoint.keep_best and config.eval.every is None and not config.eval.at_end:
        yield (
            "checkpoint.keep_best: no step is ever evaluated, so none is the best; set eval.every to a multiple of "
            "checkpoint.every, or checkpoint.keep_best=0"
        )


IMAGE_KINDS = {"image_tokenizer": "pixels", "image_ar": "codes", "dit": "latents"}
"""What families of image models read, as data.images.kind names it."""

_CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("train.batch_tokens", "data.sequence_length"), _batch_in_rows),
    (("train.micro_batch_tokens", "data.sequence_length"), _micro_batch_in_rows),
    (("train.micro_batch_tokens", "train.batch_tokens"), _micro_batch_within_batch),
    (("train.steps", "train.batch_tokens", "schedule"), _schedule_in_steps),
    (("model.vocab_size", "data.vocabulary", "data.interleaved"), _vocabulary_fits),
    (("model.modalities", "data.interleaved"), _modalities_agree),
    (("model.ngram", "data.vocabulary"), _ngrams_of_bytes),
    (("model.patching", "data.vocabulary"), _patches_of_bytes),
    (("model", "data.images"), _images_of_family),
    (("parallel",), _mesh_only_for_hsdp),
    (("parallel",), _strategy_of_engine),
    (("optimizer", "parallel"), _averages_of_engine),
    (("parallel.sequence_ranks", "model"), _rows_can_be_cut),
    (("optimizer",), _skip_step_can_apply),
    (("checkpoint", "eval"), _best_can_be_told),
)


def check_against_world(config: TrainingConfig, world_size: int) -> None:
    """Check what depends on the number of ranks.

    Raises:
        ConfigError: the batch or the mesh does not divide; all that is wrong, one a line.
    """
    found = list(_sequence_over_ranks(config, world_size))
    if not found:
        found = list(_batch_over_ranks(config, world_size // config.parallel.sequence_ranks))
    found += _mesh_over_ranks(config, world_size)
    if found:
        raise ConfigError("\n".join(found))


def _sequence_over_ranks(config: TrainingConfig, world_size: int) -> Iterator[str]:
    ranks = config.parallel.sequence_ranks
    if world_size % ranks:
        yield (
            f"parallel.sequence_ranks: {world_size} ranks do not divide into groups of {ranks} that share rows; set it "
            f"to a divisor of {world_size}"
        )


def _batch_over_ranks(config: TrainingConfig, world_size: int) -> Iterator[str]:
    rows, length = config.batch_rows, config.data.sequence_length
    if rows % world_size:
        near = max(1, round(rows / world_size)) * world_size * length
        yield (
            f"train.batch_tokens: {rows} samples of {length} tokens do not divide over {world_size} ranks; "
            f"the nearest that does is train.batch_tokens={near}"
        )
        return
    share = rows // world_size * length
    micro = config.train.micro_batch_tokens
    if micro and share % micro:
        yield (
            f"train.micro_batch_tokens: {micro} does not divide a rank's share of {share} tokens "
            f"(train.batch_tokens {config.train.batch_tokens} over {world_size} ranks)"
        )


def _mesh_over_ranks(config: TrainingConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    if parallel.strategy == "single" and world_size > 1:
        yield f"parallel.strategy: single, but there are {world_size} ranks; use auto, ddp, fsdp or hsdp"
    if parallel.strategy != "hsdp":
        return
    shard, copies = parallel.shard_ranks, parallel.replicate_ranks
    if shard is None and copies is None:
        yield "parallel.shard_ranks: hsdp needs shard_ranks (ranks that share one copy) or replicate_ranks"
        return
    given = (shard or 1) * (copies or 1)
    divides = given == world_size if shard and copies else world_size % given == 0
    if not divides:
        mesh = " x ".join(
            f"{n} {what}" for n, what in ((copies, "copies"), (shard, "shards")) if n is not None
        )
        yield (
            f"parallel.shard_ranks: a mesh of {mesh} does not make up {world_size} ranks; "
            f"shard_ranks * replicate_ranks must be {world_size}"
        )
