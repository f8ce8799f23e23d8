"""Samples of models of text, images and speech: text after images, images after text, or whatever the model goes on to.

B sequences go together, each with random numbers of its own, so that what a prompt gives depends on neither its batch nor
its neighbours. Continuous images are denoised from noise with classifier-free guidance; images and speech as codes are
drawn id by id. After an image is opened its number of positions is known; it closes when they are there.
Source: Zhou et al., Transfusion, arXiv 2408.11039, section 3.3; guidance: Ho and Salimans, arXiv 2207.12598.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.diffusion import spaced_timesteps
from ..models.errors import ConfigError
from ..models.multimodal.generation import GenerativeModel, InterleavedCache
from .data.interleaved.codecs import ImageCodec, open_codec
from .data.interleaved.layout import ImageLayout, image_grid
from .data.interleaved.vocabulary import InterleavedVocabulary
from .data.vocabulary import open_vocabulary
from .sampling import Sampling, pick_ids, row_generator
from .trained import TrainedRun

__all__ = [
    "ImageSampling",
    "InterleavedCompletion",
    "InterleavedGenerator",
    "Make",
    "Part",
    "open_generator",
]

Part = str | NDArray[np.uint8]
"""A piece of a prompt or of what was made: text, or a picture (H, W, C)."""
Make = Literal["text", "image", "speech", "any"]


@dataclass(frozen=True)
class ImageSampling:
    """How images are made.

    Args:
        steps: noise levels a continuous image passes.
        guidance: w in u + w (c - u), of what is predicted without and with what comes before; 1 is none.
        eta: 0 draws no noise on the way (DDIM), 1 as much as DDPM.
    """

    steps: int = 50
    guidance: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eta < 0:
            raise ConfigError(
                f"image steps {self.steps} and eta {self.eta}; steps are 1 or more, eta 0 or more"
            )


@dataclass
class InterleavedCompletion:
    """What was made after one prompt.

    Args:
        parts: in order; neighbouring text is one part. Speech is a list of codes.
        finish_reason: `eos`, `length` (the room for ids is used up), or `made` (the one thing that was asked for).
    """

    parts: list[Part | list[int]] = field(default_factory=list)
    finish_reason: str = "made"

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[NDArray[np.uint8]]:
        return [part for part in self.parts if isinstance(part, np.ndarray)]


class InterleavedGenerator:
    """Makes samples with one network.

    Args:
        network: of a multimodal family.
        layout: of the run's images; None where it has none.
        codec: turns latents or codes into pictures and back.
    """

    def __init__(
        self,
        network: GenerativeModel,
        vocabulary: InterleavedVocabulary,
        layout: ImageLayout | None,
        codec: ImageCodec | None,
    ) -> None:
        self.network, self.vocabulary, self.layout, self.codec = network, vocabulary, layout, codec
        self.modalities = network.config.modalities

    def __call__(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        make: Make = "any",
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        images: ImageSampling | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[InterleavedCompletion]:
        """Go on after each prompt.

        Args:
            prompts: pieces in order; one that is given twice is sampled twice, differently.
            make: `image` or `speech` is made once; `text` goes on to the end of the document; `any` lets the model open
                images and speech by itself.
            max_new_tokens: most ids of text a prompt gets, and of speech.
            batch_size: most sequences at once; only prompts of the same kinds of pieces go together, and with `any` each is
                alone.

        Raises:
            ConfigError: the run has no such modality, or no codec for pictures.
        """
        self._check(prompts, make)
        keys = [_key(prompt) for prompt in prompts]
        seen: Counter[str] = Counter()
        generators = []
        for key in keys:
            generators.append(row_generator(seed, key, seen[key]))
            seen[key] += 1
        at_once = 1 if make == "any" else batch_size
        groups: dict[tuple[bool, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(tuple(isinstance(part, str) for part in prompt), []).append(place)
        found: dict[int, InterleavedCompletion] = {}
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                for places in groups.values():
                    for first in range(0, len(places), at_once):
                        chosen = places[first : first + at_once]
                        session = _Session(
                            self,
                            [generators[i] for i in chosen],
                            sampling or Sampling(),
                            images or ImageSampling(),
                            self._capacity([prompts[i] for i in chosen], max_new_tokens),
                        )
                        made = session.run([prompts[i] for i in chosen], make, max_new_tokens)
                        found |= dict(zip(chosen, made, strict=True))
        finally:
            self.network.train(was_training)
        return [found[place] for place in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[Part]], make: Make) -> None:
        has_pictures = any(not isinstance(part, str) for prompt in prompts for part in prompt)
        wanted = "image" if has_pictures or make == "image" else make
        if wanted in ("image", "speech") and wanted not in self.modalities:
            raise ConfigError(
                f"this run has no {wanted}: its modalities are {', '.join(self.modalities)}"
            )
        if wanted == "image" and self.codec is None:
            raise ConfigError(
                "this run's images came without a codec, so pictures can be neither read nor made; set data.interleaved.image.codec"
            )

    def _capacity(self, prompts: Sequence[Sequence[Part]], new: int) -> int:
        """Positions for the longest prompt and what follows it; images made in passing are paid for by its text."""
        image = 0 if self.layout is None else self.layout.positions + 2
        longest = max(
            sum(len(self.encode(p)) if isinstance(p, str) else image for p in prompt)
            for prompt in prompts
        )
        return 1 + longest + new + 2 * image

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.vocabulary.encode(text)]

    @property
    def opening(self) -> list[int]:
        return [] if self.vocabulary.bos_id is None else [self.vocabulary.bos_id]

    def to_values(self, pictures: NDArray[np.uint8]) -> Tensor:
        """(B, H, W, C) pictures to latents (B, C, h, w) as the model sees them, or codes (B, n) of the image's own."""
        assert self.codec is not None
        assert self.layout is not None
        values = self.codec.encode(pictures)
        if self.layout.kind == "codes":
            return torch.from_numpy(values)
        return torch.from_numpy(self.layout.to_model(values))

    def to_pictures(self, values: Tensor) -> NDArray[np.uint8]:
        """The inverse of `to_values`."""
        assert self.codec is not None
        assert self.layout is not None
        array = values.cpu().numpy()
        return self.codec.decode(
            array if self.layout.kind == "codes" else self.layout.from_model(array)
        )


def open_generator(trained: TrainedRun) -> InterleavedGenerator:
    """Collective: what makes samples with a run's weights; the data need not be there.

    Raises:
        ConfigError: the family generates no interleaved documents.
        DataError: the codec's folder is gone.
    """
    network = trained.network_for_generation()
    settings = trained.config.data.interleaved
    assert settings is not None
    if not isinstance(network, GenerativeModel):
        family = getattr(trained.config.model, "family", "this family")
        raise ConfigError(
            f"{family} makes no images or speech; train mamba or mixture_of_transformers"
        )
    vocabulary = InterleavedVocabulary(open_vocabulary(trained.config.data.vocabulary), settings)
    codec = open_codec(settings.image) if "image" in settings.modalities else None
    layout = None
    if codec is not None:
        grid = image_grid(codec.kind, codec.shape, settings.image.patch_size, "the run's images")
        low, high = settings.image.clip or (-math.inf, math.inf)
        scaling = (settings.image.shift or 0.0, settings.image.scale or 1.0)
        layout = ImageLayout(
            codec.kind, codec.shape, grid, codec.identity, *scaling, minimum=low, maximum=high
        )
    return InterleavedGenerator(network, vocabulary, layout, codec)


class _Session:
    """B sequences whose prompts have the same kinds of pieces."""

    def __init__(
        self,
        owner: InterleavedGenerator,
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        images: ImageSampling,
        capacity: int,
    ) -> None:
        self.owner, self.generators = owner, generators
        self.network, self.vocabulary = owner.network, owner.vocabulary
        self.sampling, self.images, self.capacity = sampling, images, capacity
        self.rows = len(generators)
        self.cache = self._new_cache(capacity)
        self.logits = torch.empty(0)
        self.made = [InterleavedCompletion() for _ in generators]
        self.written = 0

    def run(
        self, prompts: Sequence[Sequence[Part]], make: Make, new: int
    ) -> list[InterleavedCompletion]:
        self._read_prompts(prompts, opens=make)
        if make == "image":
            self._make_image()
        elif make == "speech":
            self._make_speech(new)
        elif make == "any":
            self._go_on(new)
        else:
            ends = self._write_text(new, may_open=False)
            for made, end in zip(self.made, ends, strict=True):
                made.finish_reason = "length" if end < 0 else "eos"
        return self.made

    # Reading

    def _new_cache(self, capacity: int) -> InterleavedCache:
        family = self.network.config.family  # type: ignore[attr-defined]
        module = importlib.import_module(f"...models.{family}.cache", __name__)
        weight = self.network.embedding.tokens.weight
        return module.KVCache(self.network.config, self.rows, capacity, weight.device, weight.dtype)

    def _read_prompts(self, prompts: Sequence[Sequence[Part]], opens: Make) -> None:
        v = self.vocabulary
        waiting = [list(self.owner.opening) for _ in prompts]
        for pieces in zip(*prompts, strict=True):
            if isinstance(pieces[0], str):
                for ids, text in zip(waiting, pieces, strict=True):
                    ids.extend(self.owner.encode(text))
                continue
            self._read([[*ids, v.boi_id] for ids in waiting])
            self._read_values(self.owner.to_values(np.stack(pieces)))
            waiting = [[v.eoi_id] for _ in prompts]
        end = {"image": [v.boi_id], "speech": [v.bos_speech_id]}.get(opens, [])
        last = [[*before, *end] for before in waiting]
        if any(not row for row in last):
            raise ConfigError(
                "a prompt is empty and this vocabulary opens documents with no id; give some text"
            )
        self._read(last)

    def _read(self, ids: Sequence[Sequence[int]], modality: str = "text") -> None:
        """Ids of each sequence, of any number of them each; keeps the logits after the last."""
        self.logits = _read_ids(
            self.network, self.cache, ids, self.owner.modalities.index(modality)
        )

    def _read_values(self, values: Tensor) -> None:
        """A finished image of each sequence."""
        if values.is_floating_point():
            self.network.read_image(values.to(self.cache.lengths.device), self.cache)
        else:
            codes = (values + self.vocabulary.first_image_code).tolist()
            self._read(codes, "image")

    # Choosing

    def _choose(
        self, logits: Tensor, rows: Sequence[int], allowed: Sequence[tuple[int, int]]
    ) -> list[int]:
        """The next id of every sequence, from these ranges; only those of `rows` cost a random number."""
        masked = torch.full_like(logits, -torch.inf)
        for start, stop in allowed:
            masked[:, start:stop] = logits[:, start:stop]
        uniforms = None
        if self.sampling.temperature > 0:
            uniforms = torch.zeros(self.rows, dtype=torch.float64)
            for row in rows:
                uniforms[row] = torch.rand((), generator=self.generators[row], dtype=torch.float64)
        return pick_ids(masked, self.sampling, uniforms).tolist()

    def _text_ranges(self, *, may_open: bool) -> list[tuple[int, int]]:
        v = self.vocabulary
        ranges = _without(v.base.size, v.special_ids)
        if may_open:
            if "image" in self.owner.modalities and self.owner.codec is not None:
                ranges.append((v.boi_id, v.boi_id + 1))
            if "speech" in self.owner.modalities:
                ranges.append((v.bos_speech_id, v.bos_speech_id + 1))
        return ranges

    # Making

    def _write_text(self, new: int, *, may_open: bool) -> list[int]:
        """Text until every sequence is done; gives the ids that ended them: EOS, what opens something else, or -1 for none.

        A sequence that is done goes on being computed, unheeded, until the last is.
        """
        v = self.vocabulary
        ends = [v.eos_id, v.boi_id, v.bos_speech_id] if may_open else [v.eos_id]
        ended: dict[int, int] = {}
        texts: list[list[int]] = [[] for _ in range(self.rows)]
        allowed = self._text_ranges(may_open=may_open)
        for step in range(new):
            live = [row for row in range(self.rows) if row not in ended]
            chosen = self._choose(self.logits, live, allowed)
            for row in live:
                if chosen[row] in ends:
                    ended[row] = chosen[row]
                else:
                    texts[row].append(chosen[row])
            if len(ended) == self.rows or step == new - 1:
                break
            self._read([[one] for one in chosen])
        for made, mine in zip(self.made, texts, strict=True):
            if mine:
                made.parts.append(v.decode(mine))
        self.written += sum(map(len, texts))
        return [ended.get(row, -1) for row in range(self.rows)]

    def _go_on(self, new: int) -> None:
        """Whatever the model goes on to; of one sequence, whose pieces come when they come."""
        v, (made,) = self.vocabulary, self.made
        while True:
            (end,) = self._write_text(new - self.written, may_open=True)
            if end in (v.eos_id, -1) or self.written >= new or not self._has_room():
                made.finish_reason = "eos" if end == v.eos_id else "length"
                return
            self._read([[end]])
            if end == v.boi_id:
                values = self._make_image()
                # Of codes all but the last were read while they were drawn.
                self._read_values(values if values.is_floating_point() else values[:, -1:])
                self._read([[v.eoi_id]])
            else:
                self._make_speech(new)
                self._read([[v.eos_speech_id]])

    def _has_room(self) -> bool:
        layout = self.owner.layout
        return (
            self.cache.used + (0 if layout is None else 2 * layout.positions) + 4 <= self.capacity
        )

    def _make_image(self) -> Tensor:
        """One image of each sequence, whose BOI was read; gives its latents or codes."""
        layout = self.owner.layout
        assert layout is not None
        without = self._without_prompt(layout.positions)
        values = (
            self._draw_codes(layout, without)
            if layout.kind == "codes"
            else self._denoise(layout, without)
        )
        for made, picture in zip(self.made, self.owner.to_pictures(values), strict=True):
            made.parts.append(picture)
        return values

    def _without_prompt(self, positions: int) -> _Unguided | None:
        """The same sequences with nothing before their BOI, where guidance asks for them."""
        if self.images.guidance == 1:
            return None
        v = self.vocabulary
        cache = self._new_cache(len(self.owner.opening) + 1 + positions)
        ids = [[*self.owner.opening, v.boi_id]] * self.rows
        return _Unguided(cache, _read_ids(self.network, cache, ids, 0))

    def _denoise(self, layout: ImageLayout, without: _Unguided | None) -> Tensor:
        """(B, C, H, W) latents as the model sees them."""
        diffusion, w = self.network.diffusion, self.images.guidance
        assert diffusion is not None
        device = self.cache.lengths.device
        steps = spaced_timesteps(diffusion.timesteps, min(self.images.steps, diffusion.timesteps))
        x = self._noise(layout.shape).to(device)
        bounds = (layout.minimum, layout.maximum)
        for t, t_next in zip(steps, [*steps[1:], None], strict=True):
            at = torch.full((self.rows,), t, device=device)
            predicted = self.network.denoise(x, at, self.cache)
            if without is not None:
                plain = self.network.denoise(x, at, without.cache)
                predicted = plain + w * (predicted - plain)
            x0, eps = diffusion.split(predicted, x, at, bounds)
            noise = self._noise(layout.shape).to(device) if self.images.eta else None
            x = diffusion.step(x0, eps, t, t_next, eta=self.images.eta, noise=noise)
        return x

    def _noise(self, shape: Sequence[int]) -> Tensor:
        drawn = [torch.randn(tuple(shape), generator=generator) for generator in self.generators]
        return torch.stack(drawn)

    def _draw_codes(self, layout: ImageLayout, without: _Unguided | None) -> Tensor:
        """(B, n) codes of the image's own."""
        v, w = self.vocabulary, self.images.guidance
        first, place = v.first_image_code, self.owner.modalities.index("image")
        allowed = [(first, first + v.image_codes)]
        codes: list[list[int]] = [[] for _ in range(self.rows)]
        for step in range(layout.positions):
            logits = self.logits
            if without is not None:
                logits = without.logits + w * (logits - without.logits)
            ids = self._choose(logits, range(self.rows), allowed)
            for mine, one in zip(codes, ids, strict=True):
                mine.append(one - first)
            if step < layout.positions - 1:
                given = [[one] for one in ids]
                self.logits = _read_ids(self.network, self.cache, given, place)
                if without is not None:
                    without = _Unguided(
                        without.cache, _read_ids(self.network, without.cache, given, place)
                    )
        return torch.tensor(codes)

    def _make_speech(self, new: int) -> None:
        """Speech of each sequence, whose opening id was read, until it closes."""
        v = self.vocabulary
        first, end = v.first_speech_code, v.eos_speech_id
        allowed = [(first, first + v.speech_codes), (end, end + 1)]
        place = self.owner.modalities.index("speech")
        codes: list[list[int]] = [[] for _ in range(self.rows)]
        open_rows = list(range(self.rows))
        for step in range(new):
            ids = self._choose(self.logits, open_rows, allowed)
            open_rows = [row for row in open_rows if ids[row] != end]
            for row in open_rows:
                codes[row].append(ids[row] - first)
            if not open_rows or step == new - 1:
                break
            given = [[one if one != end else first] for one in ids]
            self.logits = _read_ids(self.network, self.cache, given, place)
        self.written += sum(map(len, codes))
        for made, mine in zip(self.made, codes, strict=True):
            made.parts.append(mine)


class _Unguided(NamedTuple):
    """Sequences without what comes before their image: the state after what was read, and the logits it gave."""

    cache: InterleavedCache
    logits: Tensor


def _read_ids(
    network: GenerativeModel, cache: InterleavedCache, ids: Sequence[Sequence[int]], modality: int
) -> Tensor:
    """(B, V) logits after the last id of each sequence; no sequence is empty."""
    device = cache.lengths.device
    counts = torch.tensor([len(row) for row in ids])
    longest = int(counts.max())
    tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
    for place, row in enumerate(ids):
        tokens[place, : len(row)] = torch.tensor(list(row))
    lengths = None if (counts == longest).all() else counts.to(device)
    kinds = torch.full(tokens.shape, modality, dtype=torch.uint8)
    logits = network.forward_cached(tokens.to(device), lengths, cache, kinds)
    return logits[torch.arange(len(ids), device=device), (counts - 1).to(device)]


def _without(size: int, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of [0, size) without some ids."""
    edges = [-1, *sorted(i for i in ids if i < size), size]
    return [(a + 1, b) for a, b in itertools.pairwise(edges) if a + 1 < b]


def _key(prompt: Sequence[Part]) -> str:
    """What a prompt's random numbers go by."""
    digest = hashlib.sha256()
    for part in prompt:
        raw = part.encode() if isinstance(part, str) else part.tobytes()
        digest.update(f"{type(part).__name__} {len(raw)} ".encode() + raw)
    return digest.hexdigest()
