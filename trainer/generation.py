"""Batched generation with a KV cache, and a hook at every step for those who steer it.

Sequences of any length go together; those that are done leave the batch. The hook may replace the next ids,
queue more, take tokens back, end a sequence, or edit the cache. All ranks of a sharded network call
this together, with the same arguments.
"""

from __future__ import annotations

import codecs
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.errors import ConfigError
from ..models.generation import GenerationCache
from .data.vocabulary import Vocabulary
from .sampling import Sampling, pick_ids, row_generator

__all__ = ["Completion", "GenerationState", "generate"]

PREFILL_POSITIONS = 4096
"""Positions of one prefill call, over all rows: the logits of a long prompt need not be held at once."""

FinishReason = Literal["stop", "eos", "length", "hook"]


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Args:
        text: without the stop string and what follows it, and without a character cut in half by the end.
        token_ids: everything generated; the end-of-document id, or the ids of the stop string, included.
        finish_reason: `stop` (a stop string), `eos`, `length` (max_new_tokens), or what a hook gave (`hook`).
        logprobs: natural logarithm of the model's own probability (no temperature, no filter) of each id.
        prompt_ids: what was continued, with the id that opens a document.
        patch_starts: places in prompt and generated ids together that start a patch; None in a family without patches.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    prompt_ids: list[int] = field(default_factory=list)
    patch_starts: list[int] | None = None

    @property
    def latent_steps(self) -> int | None:
        """Steps of the model's latent transformer for the generated ids: each patch that starts in them took one before it."""
        if self.patch_starts is None:
            return None
        return sum(start >= len(self.prompt_ids) for start in self.patch_starts)


def generate(
    network: nn.Module,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_token: Callable[[GenerationState], None] | None = None,
    batch_size: int = 32,
    logprobs: bool = False,
    ignore_eos: bool = False,
) -> list[Completion]:
    """Continue each prompt.

    Args:
        network: see `models.generation`; `TrainedRun.network_for_generation` gives a run's.
        prompts: a prompt that is given twice is sampled twice, differently.
        max_new_tokens: most ids generated for a prompt.
        temperature: 0 takes the likeliest id each time.
        top_p, top_k: see `Sampling`.
        stop: texts that end a sequence; found in the decoded text, so they may span ids.
        seed: with the prompt and its occurrence, decides all random numbers.
        on_token: called once a step, after ids were chosen and before they count; see `GenerationState`.
        batch_size: most sequences at once.
        ignore_eos: go on past the end of a document.

    Raises:
        ConfigError: a setting out of range, or an empty prompt where the vocabulary opens documents with nothing.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} generates nothing; give 1 or more")
    if any(not text for text in stop):
        raise ConfigError("an empty stop string would stop everything at once; leave it out")
    sampling = Sampling(temperature, top_p, top_k)
    encoded = [_encode_prompt(vocabulary, prompt) for prompt in prompts]
    generators = _generators(seed, prompts)
    was_training = network.training
    network.eval()
    completions: list[Completion] = []
    try:
        with torch.no_grad():
            for first in range(0, len(prompts), batch_size):
                part = slice(first, first + batch_size)
                state = GenerationState(
                    network,
                    vocabulary,
                    encoded[part],
                    generators[part],
                    sampling,
                    max_new_tokens=max_new_tokens,
                    stop=tuple(stop),
                    eos_id=None if ignore_eos else vocabulary.eos_id,
                    keep_logprobs=logprobs,
                )
                completions.extend(_run(state, on_token))
    finally:
        network.train(was_training)
    return completions


def _run(
    state: GenerationState, on_token: Callable[[GenerationState], None] | None
) -> list[Completion]:
    state._prefill()
    while state.rows:
        state._choose()
        if on_token is not None:
            on_token(state)
        state._commit()
        state._leave()
        if state.rows:
            state._advance()
    return [state._completion(row) for row in range(len(state.prompts))]


def _encode_prompt(vocabulary: Vocabulary, prompt: str) -> list[int]:
    head = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    ids = [*head, *(int(i) for i in vocabulary.encode(prompt))]
    if not ids:
        raise ConfigError(
            "the prompt is empty and this vocabulary opens documents with no id; give some text"
        )
    return ids


def _generators(seed: int, prompts: Sequence[str]) -> list[torch.Generator]:
    seen: Counter[str] = Counter()
    generators = []
    for prompt in prompts:
        generators.append(row_generator(seed, prompt, seen[prompt]))
        seen[prompt] += 1
    return generators


class GenerationState:
    """A batch under generation, as a hook sees it.

    Live sequences stand in *slots* 0..len(rows)-1 of the tensors; `rows[slot]` is the index of the sequence's
    prompt. Slots move when sequences leave; rows do not. All lists by row are indexed by prompt.

    Attributes:
        step: steps done before this one.
        rows: prompt index of each slot.
        prompts: prompt ids by row.
        generated: ids generated so far by row, without those of this step.
        logits: (slots, V) fp32, of this step, as the model gave them. A hook may edit them for `redraw`.
        next_ids: this step's id by slot; a hook may overwrite them.
        cache: holds each slot's prompt and generated ids, without those of this step.
    """

    def __init__(
        self,
        network: nn.Module,
        vocabulary: Vocabulary,
        prompts: Sequence[list[int]],
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        eos_id: int | None,
        keep_logprobs: bool,
    ) -> None:
        self.vocabulary, self.prompts = vocabulary, list(prompts)
        self.step = 0
        self.rows = list(range(len(prompts)))
        self.generated: list[list[int]] = [[] for _ in prompts]
        self.next_ids: list[int] = []
        self._network, self._sampling, self._generators = network, sampling, list(generators)
        self._limit, self._eos_id = max_new_tokens, eos_id
        self._stop = _StopStrings(vocabulary, stop)
        self._logprobs: list[list[float]] | None = [[] for _ in prompts] if keep_logprobs else None
        self._reasons: dict[int, str] = {}
        self._queues: list[list[int]] = [[] for _ in prompts]
        self._rewound: set[int] = set()
        self._patch_starts: dict[int, list[int] | None] = {}
        self._uniforms: Tensor | None = None
        longest = max(len(prompt) for prompt in prompts)
        self.cache: GenerationCache = _new_cache(network, len(prompts), longest + max_new_tokens)
        self._device = self.cache.lengths.device
        self.logits = torch.empty(0)

    def text(self, row: int) -> str:
        """What was generated for a prompt so far."""
        return decode_prefix(self.vocabulary, self.generated[row])

    def finish(self, row: int, reason: str = "hook") -> None:
        """End a sequence; this step's id of it is not kept."""
        self._reasons[row] = reason

    def force(self, row: int, ids: Iterable[int]) -> None:
        """Make these the row's next ids, this step's first; they count as generated and can end it.

        An id of the queue takes the place of whatever the model would choose at its step.
        """
        queue = list(ids)
        if queue:
            self._queues[row] = queue[1:]
            self.next_ids[self.rows.index(row)] = queue[0]

    def redraw(self, row: int, banned: Iterable[int]) -> int:
        """Choose the row's id of this step again without some ids, from the same random number."""
        slot = self.rows.index(row)
        logits = self._known_logits()[slot : slot + 1].clone()
        logits[:, list(banned)] = -torch.inf
        uniforms = None if self._uniforms is None else self._uniforms[slot : slot + 1]
        self.next_ids[slot] = int(pick_ids(logits, self._sampling, uniforms))
        return self.next_ids[slot]

    def rewind(self, row: int, count: int) -> None:
        """Take back the last `count` generated ids of a row, and this step's.

        The step then only refreshes the last id that stays; the row goes on from it in the next one, with new
        random numbers.
        """
        if not 0 <= count <= len(self.generated[row]):
            raise ValueError(
                f"row {row} has {len(self.generated[row])} ids, cannot take back {count}"
            )
        slot, keep = self.rows.index(row), len(self.generated[row]) - count
        del self.generated[row][keep:]
        if self._logprobs is not None:
            del self._logprobs[row][keep:]
        self._queues[row] = []
        sequence = [*self.prompts[row], *self.generated[row]]
        self.next_ids[slot] = sequence.pop()
        self._rewound.add(row)
        self.cache.rewind(slot, sequence)

    def _prefill(self) -> None:
        """Run the prompts through in pieces, keeping the logits after each row's last id."""
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])
        longest = int(lengths.max())
        padded = torch.zeros(len(self.prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        piece = max(1, PREFILL_POSITIONS // len(self.prompts))
        last = (lengths - 1).tolist()
        kept: list[Tensor | None] = [None] * len(self.prompts)
        for first in range(0, longest, piece):
            tokens = padded[:, first : first + piece]
            counts = (lengths - first).clamp(0, tokens.shape[1])
            logits = self._forward(tokens, counts)
            for row, place in enumerate(last):
                if first <= place < first + piece:
                    kept[row] = logits[row, place - first]
        self.logits = torch.stack([logits for logits in kept if logits is not None])

    def _forward(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        counts = None if counts is None else counts.to(self._device)
        return self._network.forward_cached(tokens.to(self._device), counts, self.cache)  # type: ignore[operator]

    def _known_logits(self) -> Tensor:
        """Logits of ids that stand for something: heads are often wider than their vocabulary."""
        return self.logits[:, : self.vocabulary.size]

    def _choose(self) -> None:
        if self._sampling.temperature > 0:
            drawn = [
                torch.rand((), generator=self._generators[row], dtype=torch.float64)
                for row in self.rows
            ]
            self._uniforms = torch.stack(drawn)
        self.next_ids = pick_ids(self._known_logits(), self._sampling, self._uniforms).tolist()
        for slot, row in enumerate(self.rows):
            if self._queues[row]:
                self.next_ids[slot] = self._queues[row].pop(0)

    def _commit(self) -> None:
        """Count this step's ids, and see which rows they end."""
        scores = self._scores()
        for slot, row in enumerate(self.rows):
            if row in self._reasons or row in self._rewound:
                continue
            self.generated[row].append(self.next_ids[slot])
            if self._logprobs is not None and scores is not None:
                self._logprobs[row].append(scores[slot])
            reason = self._reason(row)
            if reason is not None:
                self._reasons[row] = reason
        self._rewound.clear()
        self.step += 1

    def _scores(self) -> list[float] | None:
        if self._logprobs is None:
            return None
        ids = torch.tensor(self.next_ids, device=self.logits.device)[:, None]
        return self.logits.log_softmax(dim=-1).gather(-1, ids)[:, 0].tolist()

    def _reason(self, row: int) -> FinishReason | None:
        ids = self.generated[row]
        if ids[-1] == self._eos_id:
            return "eos"
        if self._stop.is_found(ids):
            return "stop"
        return "length" if len(ids) >= self._limit else None

    def _leave(self) -> None:
        """Let finished rows go from all tensors."""
        slots = [slot for slot, row in enumerate(self.rows) if row not in self._reasons]
        if len(slots) == len(self.rows):
            return
        for slot, row in enumerate(self.rows):
            if row in self._reasons:
                self._patch_starts[row] = self._starts_of(slot, row)
        self.rows = [self.rows[slot] for slot in slots]
        self.next_ids = [self.next_ids[slot] for slot in slots]
        if self.rows:
            self.cache.select(torch.tensor(slots, device=self._device))

    def _starts_of(self, slot: int, row: int) -> list[int] | None:
        """Of the ids that are kept: a hook that ends a row drops this step's, whose start the cache knows already."""
        starts = self.cache.patch_starts(slot)
        length = len(self.prompts[row]) + len(self.generated[row])
        return None if starts is None else [start for start in starts if start < length]

    def _advance(self) -> None:
        # The longest sequence may have left, and hooks may have shortened the rest.
        self.cache.used = int(self.cache.lengths.max())
        tokens = torch.tensor(self.next_ids, dtype=torch.int64)[:, None]
        self.logits = self._forward(tokens)[:, 0]

    def _completion(self, row: int) -> Completion:
        ids = self.generated[row]
        text = self._stop.cut(decode_prefix(self.vocabulary, ids))
        scores = None if self._logprobs is None else self._logprobs[row]
        return Completion(
            text, list(ids), self._reasons[row], scores, self.prompts[row], self._patch_starts[row]
        )


def decode_prefix(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """Text of ids that may end inside a character; the unfinished one is left out."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(vocabulary.decode_bytes(ids))


class _StopStrings:
    """Finds stop strings that end in the newest id."""

    MARGIN = 16

    def __init__(self, vocabulary: Vocabulary, texts: tuple[str, ...]) -> None:
        self.vocabulary, self.texts = vocabulary, texts
        # Every id stands for a byte or more, so this many reach back to where the longest could begin.
        self._reach = max((len(text.encode()) for text in texts), default=0) + self.MARGIN

    def is_found(self, ids: Sequence[int]) -> bool:
        if not self.texts:
            return False
        tail = decode_prefix(self.vocabulary, ids[-self._reach :])
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        found = [place for place in (text.find(stop) for stop in self.texts) if place >= 0]
        return text[: min(found)] if found else text


def _new_cache(network: nn.Module, rows: int, capacity: int) -> GenerationCache:
    """An empty cache of the network's family, found by its module name as the family itself is."""
    family = network.config.family  # type: ignore[union-attr]
    module = importlib.import_module(f"...models.{family}.cache", package=__name__)
    weight = next(network.parameters())
    return module.KVCache(network.config, rows, capacity, weight.device, weight.dtype)
