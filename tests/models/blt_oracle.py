"""BLT by definition, one document, one byte and one patch at a time, in float64: what the network has to give.

Source: arXiv 2412.09871, section 3, and the specification of the released code. Slow, and meant to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from weft.models.blt.config import Config

PRIME = 1000000007

Vectors = list[Tensor]


def document_logits(
    config: Config, weights: Mapping[str, Tensor], ids: Sequence[int], starts: Sequence[bool]
) -> Tensor:
    """(n, 260) logits of one document; `starts` has n + 1 entries: whether each byte, and the one to come, opens a patch."""
    weights = {name: value.double() for name, value in weights.items()}
    patches = patches_of(starts[:-1])
    embedded = [embed(config, weights, ids[: i + 1]) for i in range(len(ids))]
    states, vectors = encode(config, weights, embedded, patches)
    latents = vectors
    if "latent.input_proj.weight" in weights:
        latents = [weights["latent.input_proj.weight"] @ v for v in latents]
    latents = run_blocks(latents, weights, "latent", config.latent.n_heads, None, config)
    reads = [patch_read_by(t, starts) for t in range(len(ids))]
    states = decode(config, weights, states, latents, reads)
    return torch.stack([weights["head.weight"] @ state for state in states])


def patches_of(starts: Sequence[bool]) -> list[list[int]]:
    found: list[list[int]] = []
    for place, opens in enumerate(starts):
        if opens:
            found.append([])
        found[-1].append(place)
    return found


def patch_read_by(t: int, starts: Sequence[bool]) -> int:
    """The patch before the one that byte t + 1 is in: nothing of that one may be seen."""
    patch_of_next = sum(starts[: t + 2]) - 1
    return patch_of_next - 1


def embed(config: Config, weights: Mapping[str, Tensor], past: Sequence[int]) -> Tensor:
    """Embedding of the last id of `past`, with its n-grams."""
    total = weights["embedding.tokens.weight"][past[-1]].clone()
    ngram = config.ngram
    if ngram is None:
        return total
    table = weights["embedding.ngrams.weight"]
    for number, n in enumerate(ngram.sizes):
        window = list(past[-n:])
        if len(window) < n:
            if ngram.short_windows == "skip":
                continue
            window = [0] * (n - len(window)) + window
        powers = range(n) if ngram.oldest_first else range(n - 1, -1, -1)
        value = sum(i * PRIME**p for i, p in zip(window, powers, strict=True))
        wrapped = (value + 2**63) % 2**64 - 2**63
        total += table[number * ngram.rows + wrapped % ngram.rows]
    return total / (len(ngram.sizes) + 1) if ngram.average else total


def encode(
    config: Config, weights: Mapping[str, Tensor], embedded: Vectors, patches: list[list[int]]
) -> tuple[Vectors, Vectors]:
    part, k = config.encoder, config.patch_vectors
    states, vectors = embedded, None
    for layer in range(part.n_layers):
        states = run_block(
            states, weights, f"encoder.blocks.{layer}", part.n_heads, config.window, config
        )
        crosses = {"none": False, "last": layer == part.n_layers - 1, "all": True}
        if not crosses[part.cross_attention]:
            continue
        if vectors is None:
            source = embedded if part.queries == "embeddings" else states
            vectors = first_queries(config, weights, source, patches)
        number = layer if part.cross_attention == "all" else 0
        for patch, members in enumerate(patches):
            memory = [states[t] for t in members]
            vectors[patch] = [
                cross(
                    q,
                    memory,
                    weights,
                    f"encoder.cross.{number}",
                    part.cross_heads or part.n_heads,
                    config,
                )
                for q in vectors[patch]
            ]
    if vectors is None:
        return states, [pool(config, states, members) for members in patches]
    assert all(len(v) == k for v in vectors)
    return states, [torch.cat(v) for v in vectors]


def first_queries(
    config: Config, weights: Mapping[str, Tensor], source: Vectors, patches: list[list[int]]
) -> list[Vectors]:
    if config.encoder.queries == "learned":
        return [list(weights["encoder.queries"]) for _ in patches]
    projection = weights["encoder.query_proj.weight"]
    return [
        list((projection @ pool(config, source, p)).chunk(config.patch_vectors)) for p in patches
    ]


def pool(config: Config, source: Vectors, members: list[int]) -> Tensor:
    rows = torch.stack([source[t] for t in members])
    ways = {"max": rows.amax(0), "min": rows.amin(0), "mean": rows.mean(0)}
    return torch.cat([ways[mode] for mode in config.encoder.pooling])


def decode(
    config: Config,
    weights: Mapping[str, Tensor],
    states: Vectors,
    latents: Vectors,
    reads: list[int],
) -> Vectors:
    part, pieces = config.decoder, []
    for latent in latents:
        wide = weights["decoder.latent_proj.weight"] @ latent
        pieces.append(list(wide.split(part.d_model)))
    if "decoder.input_proj.weight" in weights:
        states = [weights["decoder.input_proj.weight"] @ s for s in states]
    if part.cross_attention == "none":
        states = [s + pieces[r][0] for s, r in zip(states, reads, strict=True)]
    for layer in range(part.n_layers):
        if part.cross_attention == "all" or (part.cross_attention == "first" and layer == 0):
            heads = part.cross_heads or part.n_heads
            states = [
                cross(s, pieces[r], weights, f"decoder.cross.{layer}", heads, config)
                for s, r in zip(states, reads, strict=True)
            ]
        states = run_block(
            states, weights, f"decoder.blocks.{layer}", part.n_heads, config.window, config
        )
    return [norm(s, weights["decoder.norm.weight"], config.norm_eps) for s in states]


def cross(
    x: Tensor, memory: Vectors, weights: Mapping[str, Tensor], name: str, heads: int, config: Config
) -> Tensor:
    eps = config.norm_eps
    query = weights[f"{name}.q_proj.weight"] @ norm(x, weights[f"{name}.q_norm.weight"], eps)
    memory = [norm(m, weights[f"{name}.kv_norm.weight"], eps) for m in memory]
    keys = [weights[f"{name}.k_proj.weight"] @ m for m in memory]
    values = [weights[f"{name}.v_proj.weight"] @ m for m in memory]
    attended = weights[f"{name}.o_proj.weight"] @ attend(query, keys, values, heads)
    return (2 * x if config.double_residual else x) + attended


def run_blocks(
    states: Vectors,
    weights: Mapping[str, Tensor],
    stack: str,
    heads: int,
    window: int | None,
    config: Config,
) -> Vectors:
    layer = 0
    while f"{stack}.blocks.{layer}.attention.q_proj.weight" in weights:
        states = run_block(states, weights, f"{stack}.blocks.{layer}", heads, window, config)
        layer += 1
    return states


def run_block(
    states: Vectors,
    weights: Mapping[str, Tensor],
    name: str,
    heads: int,
    window: int | None,
    config: Config,
) -> Vectors:
    """Pre-norm self-attention and SwiGLU; a byte sees itself and window - 1 before it."""
    eps, w = config.norm_eps, {k.removeprefix(f"{name}."): v for k, v in weights.items()}
    normed = [norm(s, w["attention_norm.weight"], eps) for s in states]
    groups = heads * w["attention.k_proj.weight"].shape[0] // w["attention.q_proj.weight"].shape[0]
    queries = [
        rotate(w["attention.q_proj.weight"] @ x, i, heads, config) for i, x in enumerate(normed)
    ]
    keys = [
        rotate(w["attention.k_proj.weight"] @ x, i, groups, config) for i, x in enumerate(normed)
    ]
    values = [w["attention.v_proj.weight"] @ x for x in normed]
    after = []
    for i, state in enumerate(states):
        first = 0 if window is None else max(0, i - window + 1)
        seen = attend(queries[i], keys[first : i + 1], values[first : i + 1], heads)
        after.append(state + w["attention.o_proj.weight"] @ seen)
    found = []
    for state in after:
        x = norm(state, w["mlp_norm.weight"], eps)
        gate = w["mlp.gate_proj.weight"] @ x
        hidden = gate * torch.sigmoid(gate) * (w["mlp.up_proj.weight"] @ x)
        found.append(state + w["mlp.down_proj.weight"] @ hidden)
    return found


def attend(query: Tensor, keys: Vectors, values: Vectors, heads: int) -> Tensor:
    width = len(query) // heads
    shared = heads * width // len(keys[0])
    found = []
    for head in range(heads):
        own = slice(head // shared * width, (head // shared + 1) * width)
        q = query[head * width : (head + 1) * width]
        scores = torch.stack([q @ key[own] / math.sqrt(width) for key in keys])
        found.append(sum(s * v[own] for s, v in zip(scores.softmax(0), values, strict=True)))
    return torch.cat(found)


def rotate(x: Tensor, position: int, heads: int, config: Config) -> Tensor:
    parts = []
    for head in x.chunk(heads):
        first, second = head.chunk(2)
        pairs = torch.complex(first, second)
        count = len(pairs)
        angles = torch.tensor(
            [position * config.rope_theta ** (-i / count) for i in range(count)],
            dtype=torch.float64,
        )
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        parts.append(torch.cat((turned.real, turned.imag)))
    return torch.cat(parts)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight
