"""The transformer over image codes: published sizes, a second implementation at the same weights, losses, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from image_batches import code_batch
from torch.nn.functional import cross_entropy, silu, softmax
from weft.models import build_model, build_task
from weft.models.batch import IGNORED
from weft.models.class_labels import LABEL_DROPPED
from weft.models.errors import DataError
from weft.models.image_ar.config import Config
from weft.models.image_ar.memory import activation_bytes

TINY: dict[str, Any] = {
    "codebook_size": 30,
    "classes": 5,
    "grid": 3,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
    "d_ff": 48,
    "dropout": 0.0,
}
# Layers, width, heads, hidden width; parameters with 1024, 16384 and 131072 codes.
LAYOUTS = {
    "b": (12, 768, 12, 2048, (87_295_488, 110_888_448, 287_049_216)),
    "l": (24, 1024, 16, 2816, (311_453_696, 342_910_976, 577_792_000)),
    "xl": (36, 1280, 20, 3584, (735_377_920, 774_699_520, 1_068_300_800)),
    "xxl": (48, 1536, 24, 4096, (1_363_786_752, 1_410_972_672, 1_763_294_208)),
    "3b": (24, 3200, 32, 8704, (2_998_355_200, 3_096_659_200, 3_830_662_400)),
}


def random_model(config: Config, std: float = 0.3) -> Any:
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, std, generator=generator)
    return model


def random_codes(count: int, config: Config, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (count, config.image_tokens), generator=generator)
    return codes, torch.randint(config.classes, (count,), generator=generator)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("codebook", [0, 1, 2])
def test_published_sizes_are_met_exactly(name: str, codebook: int) -> None:
    layers, width, heads, hidden, totals = LAYOUTS[name]
    size = (1024, 16384, 131072)[codebook]
    config = Config(codebook_size=size, n_layers=layers, d_model=width, n_heads=heads, d_ff=hidden)
    assert hidden == 256 * math.ceil(int(8 * width / 3) / 256)
    assert sum(config.count_parameters().values()) == totals[codebook]
    with torch.device("meta"):
        network = build_task(config).build_networks()["model"]
    assert sum(p.numel() for p in network.parameters()) == totals[codebook]
    assert not list(network.buffers())


def second_implementation(model: Any, codes: torch.Tensor, label: int) -> torch.Tensor:
    """(N, K) logits of one image, position by position in complex numbers, from the description alone."""
    c = model.config
    weights = dict(model.named_parameters())
    half = c.head_width // 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weights[name]

    turns = torch.zeros(c.image_tokens, half, dtype=torch.complex64)
    if c.class_rotation == "identity":
        turns[0] = 1
    for position in range(1, c.image_tokens):
        for pair in range(half):
            axis = (position - 1) // c.grid if pair < half // 2 else (position - 1) % c.grid
            angle = axis * c.rope_theta ** (-2 * (pair % (half // 2)) / half)
            turns[position, pair] = complex(math.cos(angle), math.sin(angle))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = torch.cat((weights["classes.weight"][label][None], weights["codes.weight"][codes[:-1]]))
    for layer in range(c.n_layers):
        own = f"blocks.{layer}."
        qkv = norm(x, own + "attention_norm.weight") @ weights[own + "attention.qkv_proj.weight"].T
        q, k, v = (part.unflatten(-1, (c.n_heads, -1)) for part in qkv.chunk(3, -1))
        scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / math.sqrt(c.head_width)
        allowed = torch.ones(c.image_tokens, c.image_tokens, dtype=torch.bool).tril()
        shares = softmax(scores.masked_fill(~allowed, -math.inf), -1)
        mixed = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
        x = x + mixed @ weights[own + "attention.o_proj.weight"].T
        h = norm(x, own + "mlp_norm.weight")
        gate, up, down = (weights[f"{own}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        x = x + (silu(h @ gate) * (h @ up)) @ down
    return norm(x, "norm.weight") @ weights["head.weight"].T


@pytest.mark.parametrize("rotation", ["zero", "identity"])
@pytest.mark.parametrize("images_a_row", [1, 2])
def test_logits_are_those_of_a_second_implementation(rotation: str, images_a_row: int) -> None:
    config = Config(**TINY, class_rotation=rotation)
    model = random_model(config)
    codes, labels = random_codes(4, config)
    batch = code_batch(codes, labels, images_a_row)
    with torch.no_grad():
        found = model(batch, labels, output="logits").view(4, config.image_tokens, -1)
        for image in range(4):
            wanted = second_implementation(model, codes[image], int(labels[image]))
            torch.testing.assert_close(found[image], wanted, rtol=1e-4, atol=1e-4)
        loss = model(batch, labels)
    wanted = cross_entropy(found.flatten(0, 1), codes.flatten(), reduction="sum")
    torch.testing.assert_close(loss, wanted)


def test_a_packed_row_has_the_losses_and_gradients_of_its_images() -> None:
    config = Config(**TINY)
    codes, labels = random_codes(4, config)
    gradients = []
    for parts in ([slice(0, 4)], [slice(i, i + 1) for i in range(4)]):
        model = random_model(config)
        for part in parts:
            batch = code_batch(codes[part], labels[part], len(codes[part]))
            model(batch, labels[part]).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_nothing_sees_what_comes_after_it() -> None:
    config = Config(**TINY)
    model = random_model(config)
    codes, labels = random_codes(2, config)
    with torch.no_grad():
        before = model(code_batch(codes, labels, 2), labels, output="logits")
        codes[0, 4:] = (codes[0, 4:] + 1) % config.codebook_size
        after = model(code_batch(codes, labels, 2), labels, output="logits")
    # Code 4 is an input from position 5 on; the other image sees nothing of it.
    assert (before != after).any(-1).tolist() == [False] * 5 + [True] * 4 + [False] * 9


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    config = Config(**TINY)
    task = build_task(config)
    networks = {"model": build_model(config)}
    codes, labels = random_codes(3, config)
    batch = task.draw(code_batch(codes, labels), 0)
    output = task.losses(networks, batch)
    counts = task.counts(batch)
    assert counts == {"tokens": 27, "images": 3}
    loss = output.terms["cross_entropy"]
    assert loss.total.item() / counts[loss.count] == pytest.approx(math.log(30), rel=1e-5)
    bits = output.metrics["bits_per_image"]
    assert bits.total.item() / counts[bits.count] == pytest.approx(9 * math.log2(30), rel=1e-5)


def test_labels_are_hidden_in_training_by_sample_and_never_in_evaluation() -> None:
    config = Config(**TINY)
    task = build_task(config)
    codes, labels = random_codes(2000, config)
    batch = task.draw(code_batch(codes, labels), 7)
    hidden = batch.side[LABEL_DROPPED]
    assert hidden.float().mean().item() == pytest.approx(0.1, abs=0.03)
    part = task.draw(code_batch(codes[50:90], labels[50:90], first=50), 7)
    assert torch.equal(part.side[LABEL_DROPPED], hidden[50:90])
    assert not torch.equal(task.draw(batch, 8).side[LABEL_DROPPED], hidden)
    model = random_model(config)
    small = code_batch(codes[:4], labels[:4])
    small.side[LABEL_DROPPED] = torch.tensor([True, False, False, True])
    masked = labels[:4].masked_fill(small.side[LABEL_DROPPED], 5)
    trained = task.losses({"model": model}, small).terms["cross_entropy"].total
    torch.testing.assert_close(trained, model(small, masked))
    with torch.no_grad():
        evaluated = task.losses({"model": model}, small).terms["cross_entropy"].total
        torch.testing.assert_close(evaluated, model(small, labels[:4]))


def test_dropout_is_for_training_alone() -> None:
    config = Config(**{**TINY, "dropout": 0.5})
    task, model = build_task(config), random_model(config)
    codes, labels = random_codes(2, config)
    batch = task.draw(code_batch(codes, labels), 0)
    losses = {
        task.losses({"model": model}, batch).terms["cross_entropy"].total.item() for _ in "ab"
    }
    assert len(losses) == 2
    with torch.no_grad():
        losses = {
            task.losses({"model": model}, batch).terms["cross_entropy"].total.item() for _ in "ab"
        }
    assert len(losses) == 1


def test_what_the_model_does_not_know_is_one_line() -> None:
    config = Config(**TINY)
    task = build_task(config)
    codes, labels = random_codes(2, config)
    with pytest.raises(DataError, match="class 5 and the model knows 0 to 4"):
        task.draw(code_batch(codes, torch.tensor([0, 5])), 0)
    with pytest.raises(DataError, match="code 30 and the model knows 0 to 29"):
        task.draw(code_batch(codes.masked_fill(codes == codes[1, 4], 30), labels), 0)
    batch = code_batch(codes, labels)
    batch.targets[3] = IGNORED
    assert LABEL_DROPPED in task.draw(batch, 0).side
    del batch.side["labels"]
    with pytest.raises(DataError, match="no class labels"):
        task.draw(batch, 0)


def test_every_parameter_has_one_group_and_matrices_decay() -> None:
    config = Config(**TINY)
    task = build_task(config)
    networks = task.build_networks()
    groups = {g.name: g for g in task.parameter_groups(networks)}
    names = [name for g in groups.values() for name in g.parameters]
    own = {f"model/{n}": p for n, p in networks["model"].named_parameters()}
    assert sorted(names) == sorted(own)
    assert {own[n].dim() for n in groups["decay"].parameters} == {2}
    assert {own[n].dim() for n in groups["no_decay"].parameters} == {1}
    assert [groups[n].weight_decay for n in ("decay", "no_decay")] == [True, False]
    assert len(task.blocks(networks)) == 2


def test_flops_and_the_debug_size() -> None:
    config = Config(n_layers=36, d_model=1280, n_heads=20, d_ff=3584)
    multiplied = 774_699_520 - (16384 + 1001) * 1280
    assert config.flops_per_token(256) == 6 * multiplied + 12 * 36 * 1280 * 256
    small = config.debug_size()
    assert (small.n_layers, small.d_model, small.n_heads, small.head_width) == (2, 64, 4, 16)
    assert (small.codebook_size, small.classes, small.grid) == (16384, 1000, 16)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_block_keeps_what_is_estimated(drop: float) -> None:
    def saved(layers: int) -> int:
        shape = {**TINY, "grid": 8, "d_model": 64, "d_ff": 160, "n_layers": layers}
        config = Config(**{**shape, "dropout": drop})
        model = random_model(config)
        codes, labels = random_codes(2, config)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(code_batch(codes, labels), labels, drop=drop)
        sizes.append(activation_bytes(config, 128, compute_bytes=4, recompute="none")["kept"])
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    sizes: list[int] = []
    measured = (saved(3) - saved(1)) / 2
    # A GPU's masks have a byte a value, a CPU's have four.
    wider = 2 * 64 * 3 * 128 if drop else 0
    assert sizes[1] == pytest.approx(measured - wider, rel=0.02)
