"""The language model inside a Hugging Face vision-language checkpoint, by its settings and names; imports no torch.

LLaVA and LLaVA-NeXT keep a Llama beside a vision tower and a projector. transformers writes `model.language_model.` before its
names, older versions `language_model.`; what is left out of `text_config` has the value of LlamaConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MODEL_TYPES", "language_name", "language_settings"]

MODEL_TYPES = ("llava", "llava_next")

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_OTHERS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|image_newline)\b.*")


def language_settings(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the language model in a config.json, which may be that of the language model itself."""
    if theirs.get("model_type") not in MODEL_TYPES:
        return theirs
    inner = {"model_type": "llama", **(theirs.get("text_config") or {})}
    outer = {"tie_word_embeddings": theirs.get("tie_word_embeddings")}
    defaults = _LLAMA if inner["model_type"] == "llama" else {}
    return {**defaults, **outer, **inner}


def language_name(name: str) -> str | None:
    """A tensor's name in the language model alone; None for what is not the language model's."""
    if _OTHERS.fullmatch(name):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")
