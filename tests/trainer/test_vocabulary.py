"""Byte ids and Hugging Face tokenizers: round trips, documents, byte lengths, identity, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weft.models.errors import DataError, LaunchError
from weft.trainer.data.vocabulary import ByteVocabulary, HuggingFaceVocabulary, open_vocabulary

TEXTS = ["def f(x):\n    return x + 1\n", "naïve café, 東京, 🙂", "aaaa   bbbb", ""]


def train_tokenizer(folder: Path, *, bos: bool = False) -> Path:
    """A small byte-level BPE, as OLMo's and Llama's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the cat"] * 20, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A",
            special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))],
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}})
    )
    return folder


@given(st.binary(max_size=300))
def test_any_bytes_round_trip(raw: bytes) -> None:
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(raw)
    assert ids.dtype == np.int64
    assert ids.tolist() == [byte + 4 for byte in raw]
    assert vocabulary.decode_bytes(ids) == raw
    (document,) = vocabulary.encode_documents([raw])
    assert document.tolist() == [1, *ids.tolist(), 2]
    assert vocabulary.decode_bytes(document) == raw


def test_byte_ids_are_those_of_blt() -> None:
    vocabulary = open_vocabulary("bytes")
    assert (vocabulary.size, vocabulary.bos_id, vocabulary.eos_id) == (260, 1, 2)
    assert vocabulary.encode("A").tolist() == [69]
    lengths = vocabulary.token_byte_lengths()
    assert lengths is not None
    assert lengths.tolist() == [0] * 4 + [1] * 256
    assert vocabulary.decode([4 + 0xFF, 69]) == "\ufffdA"


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip_and_byte_lengths(tmp_path: Path, text: str) -> None:
    vocabulary = open_vocabulary(f"hf:{train_tokenizer(tmp_path)}")
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    lengths = vocabulary.token_byte_lengths()
    assert lengths is not None
    assert int(lengths[ids].sum()) == len(text.encode())
    (document,) = vocabulary.encode_documents([text.encode()])
    assert document.tolist() == [*ids.tolist(), vocabulary.eos_id]
    assert vocabulary.decode(document) == text


def test_special_tokens_spelled_out_are_text(tmp_path: Path) -> None:
    vocabulary = open_vocabulary(f"hf:{train_tokenizer(tmp_path)}")
    (document,) = vocabulary.encode_documents([b"a <|endoftext|> b"])
    assert document.tolist().count(vocabulary.eos_id) == 1
    assert vocabulary.decode(document) == "a <|endoftext|> b"


def test_bos_follows_the_tokenizer(tmp_path: Path) -> None:
    assert open_vocabulary(f"hf:{train_tokenizer(tmp_path / 'a')}").bos_id is None
    with_bos = open_vocabulary(f"hf:{train_tokenizer(tmp_path / 'b', bos=True)}")
    assert with_bos.bos_id is not None
    assert with_bos.encode_documents([b"the"])[0][0] == with_bos.bos_id
    assert with_bos.encode("the")[0] != with_bos.bos_id


def test_identity_follows_the_file_not_the_place(tmp_path: Path) -> None:
    first = open_vocabulary(f"hf:{train_tokenizer(tmp_path / 'a')}").identity()
    assert (
        first
        == open_vocabulary(f"hf:{train_tokenizer(tmp_path / 'b') / 'tokenizer.json'}").identity()
    )
    assert first != open_vocabulary(f"hf:{train_tokenizer(tmp_path / 'c', bos=True)}").identity()
    assert first != ByteVocabulary().identity()


def test_missing_and_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.json.*local folder"):
        open_vocabulary(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        HuggingFaceVocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}')
    with pytest.raises(DataError, match=r"tokenizers can read"):
        HuggingFaceVocabulary(tmp_path)


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(LaunchError, match=r"weft\[hf\]"):
        HuggingFaceVocabulary(tmp_path)


def test_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no end-of-text token.*eos_token"):
        HuggingFaceVocabulary(tmp_path)
