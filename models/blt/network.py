"""The Byte Latent Transformer: bytes to patches, a transformer over patches, and back to bytes.

T bytes of a packed batch, P patches there is room for, k vectors a patch; h_E, h_G, h_D widths of encoder, latent transformer
and decoder. How many patches there are is known to the device alone, so nothing here waits for it: absent patches are
empty, stand at the end as documents of their own, and no byte reads them. Self-attention blocks are the transformer
family's. Everything that touches weights happens inside `BLT.forward` and the parts' own, so that sharding hooks see it.
Source: arXiv 2412.09871, section 3. Read `BLT.forward` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels import (
    PackedLayout,
    Patches,
    RotaryTable,
    attention_problem,
    linear_cross_entropy,
    patch_decoder_attention,
    patch_encoder_attention,
    segment_pool,
)
from ..batch import PackedBatch
from ..errors import ConfigError
from ..transformer.cache import LayerCache
from ..transformer.embedding import TokenEmbedding
from ..transformer.model import Block, RMSNorm
from .cache import KVCache
from .cached_forward import ClosedPatches, MemoryLayer, forward_cached
from .config import Config, LocalConfig
from .layout import drop_absent, make_rotary, patch_layout

__all__ = [
    "BLT",
    "LatentTransformer",
    "LocalDecoder",
    "LocalEncoder",
    "drop_absent",
    "patch_layout",
]


class CrossAttention(nn.Module):
    """Pre-norm attention of x to a memory of the same width, with x added once, or twice as in the released models."""

    def __init__(self, part: LocalConfig, norm_eps: float, double_residual: bool) -> None:
        super().__init__()
        self.heads = part.cross_heads or part.n_heads
        self.residual = 2.0 if double_residual else 1.0
        self.q_norm = RMSNorm(part.d_model, norm_eps)
        self.kv_norm = RMSNorm(part.d_model, norm_eps)
        self.q_proj = nn.Linear(part.d_model, part.cross_width, bias=False)
        self.k_proj = nn.Linear(part.d_model, part.cross_width, bias=False)
        self.v_proj = nn.Linear(part.d_model, part.cross_width, bias=False)
        self.o_proj = nn.Linear(part.cross_width, part.d_model, bias=False)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, d) and (M, d) to q (N, H, hd), k and v (M, H, hd)."""
        return self.project_queries(x), *self.project_memory(memory)

    def project_queries(self, x: Tensor) -> Tensor:
        """(..., d) to (..., H, hd)."""
        return self.q_proj(self.q_norm(x)).unflatten(-1, (self.heads, -1))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(M, d) to two of (M, H, hd)."""
        memory = self.kv_norm(memory)
        k, v = (p(memory).unflatten(-1, (self.heads, -1)) for p in (self.k_proj, self.v_proj))
        return k, v

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.residual * x + self.o_proj(attended.flatten(-2))


class PatchesReadBytes(CrossAttention):
    """The k vectors of each patch (P * k, h_E) attend to the bytes (T, h_E) of their patch."""

    def forward(self, vectors: Tensor, states: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.project(vectors, states)
        return self.add(vectors, patch_encoder_attention(q, k, v, starts, lengths))


class BytesReadPatches(CrossAttention):
    """Bytes (T, h_D) attend to the k vectors (P * k, h_D) of the patch that `decoder_ids` names.

    In generation bytes are (B, t, h_D), `vectors` are those of the patches that have just closed, and `memory` holds all.
    """

    def forward(
        self,
        states: Tensor,
        vectors: Tensor | None,
        decoder_ids: Tensor,
        count: int,
        memory: MemoryLayer | None = None,
    ) -> Tensor:
        if memory is not None:
            if vectors is not None:
                memory.write(*self.project_memory(vectors))
            return self.add(states, memory.attend(self.project_queries(states)))
        assert vectors is not None
        q, k, v = self.project(states, vectors)
        return self.add(states, patch_decoder_attention(q, k, v, decoder_ids, count))


class LocalEncoder(nn.Module):
    """Byte embeddings (T, h_E) to byte states (T, h_E) and patches (P, k * h_E)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config.encoder
        self.stack = config.stack("encoder")
        self.k = config.patch_vectors
        self.blocks = nn.ModuleList(Block(self.stack) for _ in range(self.config.n_layers))
        self.cross = nn.ModuleList(
            PatchesReadBytes(self.config, config.norm_eps, config.double_residual)
            for _ in range(config.cross_layers[0])
        )
        width = self.config.d_model
        if self.cross and self.config.queries == "learned":
            self.queries = nn.Parameter(torch.empty(self.k, width))
        elif self.cross:
            self.query_proj = nn.Linear(config.pooled_width, self.k * width, bias=False)

    def forward(self, x: Tensor, batch: PackedBatch, layout: PackedLayout, patches: Patches) -> Any:
        rotary = make_rotary(batch.position_ids, self.stack, x.dtype)
        x, sources = self.read_bytes(x, rotary, [layout] * len(self.blocks))
        return x, self.make_vectors(sources, patches.starts, patches.lengths)

    def read_bytes(
        self, x: Tensor, rotary: RotaryTable, contexts: Sequence[PackedLayout | LayerCache]
    ) -> tuple[Tensor, list[Tensor]]:
        """States after the blocks, and those that patches are made from: `Config.patch_sources` of them."""
        pools_embeddings = bool(self.cross) and self.config.queries == "embeddings"
        sources = [x] if pools_embeddings else []
        first_source = len(self.blocks) - max(1, len(self.cross))
        for place, block in enumerate(self.blocks):
            x = block(x, rotary, contexts[place])
            if place >= first_source:
                sources.append(x)
        return x, sources

    def make_vectors(self, sources: Sequence[Tensor], starts: Tensor, lengths: Tensor) -> Tensor:
        """(P, patch width) from byte states (T, h_E): what is pooled first, what the cross-attentions read last."""
        if not self.cross:
            return self.pool(sources[0], starts, lengths)
        vectors = self.first_queries(sources[0], starts, lengths)
        for cross, states in zip(self.cross, sources[-len(self.cross) :], strict=True):
            vectors = cross(vectors, states, starts, lengths)
        return vectors.view(-1, self.k * vectors.shape[-1])

    def first_queries(self, x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """(P * k, h_E) what the patches ask with at the first cross-attention."""
        if self.config.queries == "learned":
            return self.queries.to(x.dtype).repeat(starts.shape[0], 1)
        return self.query_proj(self.pool(x, starts, lengths)).view(-1, x.shape[-1])

    def pool(self, x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """(P, pooled width): bytes of each patch by each way of pooling, side by side."""
        found = []
        for mode in self.config.pooling:
            if mode == "min":
                found.append(-segment_pool(-x, starts, lengths, "max"))
            else:
                found.append(segment_pool(x, starts, lengths, mode))
        return torch.cat(found, dim=-1)


class LatentTransformer(nn.Module):
    """Patches (P, k * h_E) to latents (P, h_G), each of which sees the patches of its document so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stack = config.stack("latent")
        width = self.stack.d_model
        self.input_proj: nn.Linear | None = None
        if config.patch_width != width:
            self.input_proj = nn.Linear(config.patch_width, width, bias=False)
        self.blocks = nn.ModuleList(Block(self.stack) for _ in range(self.stack.n_layers))

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        return self.run_blocks(x, layout.position_ids, [layout] * len(self.blocks))

    def run_blocks(
        self, x: Tensor, positions: Tensor, contexts: Sequence[PackedLayout | LayerCache]
    ) -> Tensor:
        if self.input_proj is not None:
            x = self.input_proj(x)
        rotary = make_rotary(positions, self.stack, x.dtype)
        for block, context in zip(self.blocks, contexts, strict=True):
            x = block(x, rotary, context)
        return x


class LocalDecoder(nn.Module):
    """Byte states (T, h_E) and latents (P, h_G) to normalised byte states (T, h_D).

    A byte reads the last patch that is complete before its successor: that is the one-patch shift, made where patches are.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config.decoder
        self.stack = config.stack("decoder")
        self.k = config.read_vectors
        width = self.config.d_model
        self.latent_proj = nn.Linear(config.latent.d_model, self.k * width, bias=False)
        self.input_proj: nn.Linear | None = None
        if config.encoder.d_model != width:
            self.input_proj = nn.Linear(config.encoder.d_model, width, bias=False)
        self.cross = nn.ModuleList(
            BytesReadPatches(self.config, config.norm_eps, config.double_residual)
            for _ in range(config.cross_layers[1])
        )
        self.blocks = nn.ModuleList(Block(self.stack) for _ in range(self.config.n_layers))
        self.norm = RMSNorm(width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        latents: Tensor,
        batch: PackedBatch,
        layout: PackedLayout,
        decoder_ids: Tensor,
    ) -> Tensor:
        vectors = self.make_vectors(latents)
        rotary = make_rotary(batch.position_ids, self.stack, x.dtype)
        if self.input_proj is not None:
            x = self.input_proj(x)
        if not self.cross:
            x = x + self.read_one(vectors, decoder_ids)
        reading = (vectors, decoder_ids, self.k)
        return self.run_blocks(x, rotary, [layout] * len(self.blocks), [reading] * len(self.cross))

    def make_vectors(self, latents: Tensor) -> Tensor:
        """(P * k, h_D) what bytes read of latents (P, h_G)."""
        return self.latent_proj(latents).view(-1, self.config.d_model)

    def run_blocks(
        self,
        x: Tensor,
        rotary: RotaryTable,
        contexts: Sequence[PackedLayout | LayerCache],
        readings: Sequence[tuple[Any, ...]],
    ) -> Tensor:
        """States (..., h_D) to normalised ones; `readings` are the cross-attentions' other arguments."""
        for place, block in enumerate(self.blocks):
            if place < len(self.cross):
                x = self.cross[place](x, *readings[place])
            x = block(x, rotary, contexts[place])
        return self.norm(x)

    def read_one(self, vectors: Tensor, decoder_ids: Tensor) -> Tensor:
        """(T, h_D) the one vector of each byte's patch, 0 where it has none: attention to a single key."""
        keys = vectors.unflatten(-1, (self.config.n_heads, -1))
        queries = keys.new_zeros(decoder_ids.shape[0], *keys.shape[1:])
        return patch_decoder_attention(queries, keys, keys, decoder_ids, 1).flatten(-2)


class BLT(nn.Module):
    """Embedding with hashed n-grams, encoder, latent transformer, decoder, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.stack("encoder"))
        self.encoder = LocalEncoder(config)
        self.latent = LatentTransformer(config)
        self.decoder = LocalDecoder(config)
        self.head = nn.Linear(config.decoder.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        batch: PackedBatch | Tensor,
        patches: Patches | ClosedPatches,
        output: str = "losses",
        cache: KVCache | None = None,
    ) -> Any:
        """Losses or logits of a packed batch of bytes, or logits of new bytes against a cache.

        Args:
            batch: a packed batch; or (B, t) int64 ids, with the arguments that `BLTGenerator` gives, which come this way so
                that hooks on the root run.
            patches: of this batch.
            output: `losses` gives `{"cross_entropy"}`, a () fp32 sum over the counted targets; `logits` (T, 260) fp32;
                `states` (T, h_D), what the head multiplies.

        Raises:
            ConfigError: the configured attention does not run on this device and type.
        """
        if isinstance(batch, Tensor):
            assert isinstance(patches, ClosedPatches)
            assert cache is not None
            return forward_cached(self, batch, patches, cache)
        assert isinstance(patches, Patches)
        if batch.tokens.device.type == "cpu" and not self.config.pad_patches:
            patches = drop_absent(patches)
        layout = PackedLayout(
            batch.cu_seqlens,
            batch.position_ids,
            batch.max_seqlen,
            batch.row_length,
            self.config.window,
        )
        over_patches = patch_layout(batch, patches)
        for prepared in (layout, over_patches):
            prepared.prepare(self.config.attention)

        windows = self.embedding.windows(batch.tokens, batch.position_ids, batch.row_length)
        embedded = self.embedding(batch.tokens, windows)
        self._check_attention(embedded)
        states, vectors = self.encoder(embedded, batch, layout, patches)
        latents = self.latent(vectors, over_patches)
        states = self.decoder(states, latents, batch, layout, patches.decoder_ids)
        if output == "states":
            return states
        if output == "logits":
            return linear(states, self.head.weight).float()
        entropy, _ = linear_cross_entropy(states, self.head.weight, batch.targets)
        return {"cross_entropy": entropy}

    def _check_attention(self, x: Tensor) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        problem = attention_problem(self.config.attention, x.device, dtype, x.requires_grad)
        if problem:
            raise ConfigError(f"model.attention={self.config.attention}: {problem}")
