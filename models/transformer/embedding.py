"""Token embedding, with hashed byte n-gram tables added where the configuration asks for them.

The tables' gradient is row-sparse: a step touches some ten thousand rows of what may be billions of
parameters. Source: BLT (arXiv 2412.09871) section 3.2.1; plain sum, as in its code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import lookup_sum, ngram_hash, packed_windows
from .config import Config, NgramConfig

__all__ = ["NgramTables", "TokenEmbedding"]


class NgramTables(nn.Module):
    """One table for every hash function and n-gram length, fused into one matrix of `width` columns."""

    def __init__(self, config: NgramConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.tables = config.hash_functions * len(config.sizes)
        self.weight = nn.Parameter(torch.empty(self.tables * config.rows, width))

    @property
    def longest(self) -> int:
        return max(self.config.sizes)

    def forward(self, windows: Tensor) -> Tensor:
        """Sum of the rows of every position: (longest, ...) ids, negative for none, to (..., width)."""
        c = self.config
        rows = ngram_hash(windows, c.sizes, c.rows, c.hash_functions, oldest_first=c.oldest_first)
        summed = lookup_sum(self.weight, rows.flatten(0, -2), has_missing=c.short_windows == "skip")
        return summed.unflatten(0, rows.shape[:-1])

    def windows(self, tokens: Tensor, position_ids: Tensor, row_length: int) -> Tensor:
        """(longest, T) ids before each position; they end at documents, or at rows if so configured."""
        reach = position_ids
        if not self.config.reset_at_documents:
            reach = torch.arange(len(tokens), device=tokens.device) % row_length
        return packed_windows(tokens, reach, self.longest, self.config.missing_id)

    def add_to(self, embedded: Tensor, windows: Tensor) -> Tensor:
        """Embeddings (..., width) of ids and their n-grams together."""
        summed = embedded + self(windows).to(embedded.dtype)
        return summed / (self.tables + 1) if self.config.average else summed


class TokenEmbedding(nn.Module):
    """(T,) ids to (T, d_model)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.ngrams = NgramTables(config.ngram, config.d_model) if config.ngram else None

    def forward(self, tokens: Tensor, windows: Tensor | None) -> Tensor:
        embedded = self.tokens(tokens)
        if self.ngrams is None:
            return embedded
        assert windows is not None
        return self.ngrams.add_to(embedded, windows)

    def windows(self, tokens: Tensor, position_ids: Tensor, row_length: int) -> Tensor | None:
        """What the tables hash at each position, see `NgramTables.windows`; None without tables."""
        if self.ngrams is None:
            return None
        return self.ngrams.windows(tokens, position_ids, row_length)
