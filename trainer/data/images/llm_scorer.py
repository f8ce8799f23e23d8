"""Complexity from a caption by a local causal language model: an integer from 1 to 9, or nothing.

The prompt is our own; its hash is stored with the scores. Words are read, not pixels, so a prompt for generation can be
scored before there is a picture. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....models.errors import DataError, LaunchError
from .scorers import Picture

__all__ = ["PROMPT", "LanguageModelScorer", "parse_score", "read_captions"]

BLOCK_BYTES = 1 << 22
LOWEST, HIGHEST = 1, 9
ANSWER_TOKENS = 8
PROMPT = """\
Rate how much fine detail a compressed copy of an image has to keep for a person to find it faithful.

1: plain surfaces, one simple object, soft background (a clear sky, a blurred flower)
5: a few objects with some texture (a dog on grass, a street with parked cars)
9: many small objects, dense texture, or print (a crowd, a page of text, a city map)

Count objects, textures, patterns and light. Faces, readable text and fine patterns raise the rating, because people notice \
faults there.

Image: {caption}
Answer with one integer from 1 to 9.
Rating:"""
AGAIN = "\nOnly the digit, nothing else:"


def parse_score(answer: str) -> int | None:
    """The answer's integer where it holds exactly one number and that is from 1 to 9; never a number near it."""
    numbers = re.findall(r"[-+]?\d+(?:[.,]\d+)*", answer)
    if len(numbers) != 1 or not numbers[0].isdigit():
        return None
    score = int(numbers[0])
    return score if LOWEST <= score <= HIGHEST else None


class LanguageModelScorer:
    """Asks a model; once more where its answer cannot be used.

    Args:
        folder: a causal language model with its tokenizer, as transformers saves them.
        captions: by the name of the image; they go before those of the data.

    Raises:
        DataError: no such model there.
        LaunchError: transformers is missing.
    """

    at_once = 8

    def __init__(self, folder: Path, captions: Mapping[str, str] | None = None) -> None:
        try:
            import transformers
        except ImportError as error:
            raise LaunchError(
                "scorer llm needs the transformers package; install it with: pip install 'weft[hf]'"
            ) from error
        import torch

        if not (folder / "config.json").is_file():
            raise DataError(
                f"{folder} holds no language model (no config.json); name a local folder that transformers saved"
            )
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, padding_side="left"
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), local_files_only=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{folder} cannot be opened as a language model: {reason}") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().requires_grad_(False).to(device)
        self._captions = captions or {}
        self._sha256 = _sha256_of(folder)

    @property
    def identity(self) -> dict[str, Any]:
        prompt = hashlib.sha256((PROMPT + AGAIN).encode()).hexdigest()
        return {
            "name": "llm",
            "version": 1,
            "model_sha256": self._sha256,
            "prompt_sha256": prompt,
            "captions_sha256": _hash_of(self._captions) if self._captions else None,
        }

    def score(self, pictures: Sequence[Picture]) -> list[float | None]:
        """Scores of some images.

        Raises:
            DataError: an image without a caption.
        """
        prompts = [PROMPT.format(caption=self._caption(picture)) for picture in pictures]
        scores: list[float | None] = [parse_score(answer) for answer in self.answers(prompts)]
        again = [place for place, score in enumerate(scores) if score is None]
        if again:
            answers = self.answers([prompts[place] + AGAIN for place in again])
            for place, answer in zip(again, answers, strict=True):
                scores[place] = parse_score(answer)
        return scores

    def _caption(self, picture: Picture) -> str:
        caption = self._captions.get(picture.id, picture.caption)
        if not caption:
            raise DataError(
                f"image {picture.id} has no caption to score; give --captions FILE with a line "
                '{"id": ..., "caption": ...} for it, or use --scorer proxy'
            )
        return caption

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """What the model continues each prompt with, greedily."""
        import torch

        inputs = self._tokenizer(list(prompts), return_tensors="pt", padding=True)
        inputs = {
            name: value.to(self._model.device)
            for name, value in inputs.items()
            if name in ("input_ids", "attention_mask")
        }
        with torch.inference_mode():
            ids = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=ANSWER_TOKENS,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        made = ids[:, inputs["input_ids"].shape[1] :]
        return list(self._tokenizer.batch_decode(made, skip_special_tokens=True))


def read_captions(path: Path) -> dict[str, str]:
    """Captions by the name of the image, from JSON lines with `id` and `caption`.

    Raises:
        DataError: the file cannot be read, or a line is something else.
    """
    found: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    found[str(record["id"])] = str(record["caption"])
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f'{path} line {number} is not {{"id": ..., "caption": ...}}; mend it'
                    ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check --captions") from error
    return found


def _hash_of(captions: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()


def _sha256_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model"):
            digest.update(path.name.encode())
            with open(path, "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    digest.update(block)
    return digest.hexdigest()
