"""Mamba blocks over rows sorted by modality: dense Mamba with one modality, Mixture-of-Mamba with several.

T positions, d model width, E inner width, N states, R rank of the step sizes. Projections run on rows sorted by modality, so
that each weight has one slice; convolution and scan run in the order of positions. All modalities share one state: that is
where they meet. With one modality in the batch nothing is moved.
Sources: Gu and Dao, arXiv 2312.00752, section 3; Liang et al., arXiv 2501.16295.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import Routing, restore_with_bias
from ...kernels.faces import autocast_dtype
from ..batch import PackedBatch
from ..multimodal.generation import GenerativeBackbone
from ..multimodal.routed import RoutedLinear, RoutedRMSNorm
from .cache import KVCache
from .config import Config
from .context import CachedContext, Context, PackedContext
from .sequence_parallel import SequenceGroup, ShardedContext

__all__ = ["SSM", "Backbone", "Block", "CausalConv"]


class CausalConv(nn.Module):
    """Weights of the depthwise convolution, which modalities share and whose taps cross their borders."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_inner, 1, config.d_conv))
        self.bias = nn.Parameter(torch.empty(config.d_inner))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return context.convolve(x, self.weight.squeeze(1), self.bias)


class SSM(nn.Module):
    """The selective scan with what must stay fp32 whatever products are computed in.

    A module of its own, so that sharding can gather it in fp32 (`Task.wide_modules`).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner = config.d_inner
        self.modalities = config.modalities
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.dt_bias: nn.ParameterDict | nn.Parameter | None = None
        if config.splits.dt_proj:
            self.dt_bias = nn.ParameterDict(
                {name: nn.Parameter(torch.empty(inner)) for name in config.modalities}
            )
        elif config.has_dt_bias:
            self.dt_bias = nn.Parameter(torch.empty(inner))

    def forward(
        self, u: Tensor, delta: Tensor, BC: Tensor, z: Tensor, routing: Routing, context: Context
    ) -> Tensor:
        """u, z (T, E) in the order of positions, delta (T, E) and BC (T, 2N) sorted by modality, to (T, E) of positions."""
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        B, C = routing.restore(BC).chunk(2, dim=-1)
        delta, bias = self._restore_steps(delta, routing)
        return context.scan(u, delta, A, B, C, self.D, z, bias)

    def _restore_steps(self, delta: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Step sizes at their positions before softplus, and the bias that is still to be added."""
        if not isinstance(self.dt_bias, nn.ParameterDict):
            return routing.restore(delta), self.dt_bias
        biases = torch.stack([self.dt_bias[name] for name in self.modalities])
        if routing.is_identity:
            present = next((m for m, size in enumerate(routing.sizes) if size), 0)
            # Indexed after stacking: the biases of absent modalities get gradients of zeros.
            return delta, biases[present]
        return restore_with_bias(delta, biases, routing), None


class Block(nn.Module):
    """`h + W_out (scan(conv(x)) * silu(z))` of the normalised rows; see `Context` for what mixes positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.rank, splits = config.rank, config.splits
        d, inner, names = config.d_model, config.d_inner, config.modalities

        def linear(inputs: int, outputs: int, is_split: bool) -> RoutedLinear:
            return RoutedLinear(inputs, outputs, names, split=is_split)

        self.norm = RoutedRMSNorm(d, config.norm_eps, names, split=splits.norm)
        self.in_proj = linear(d, 2 * inner, splits.in_proj)
        self.conv1d = CausalConv(config)
        self.x_proj = linear(inner, self.rank + 2 * config.d_state, splits.x_proj)
        self.dt_proj = linear(self.rank, inner, splits.dt_proj)
        self.ssm = SSM(config)
        self.out_proj = linear(inner, d, splits.out_proj)

    def forward(self, h: Tensor, routing: Routing, context: Context) -> Tensor:
        """Rows (T, d) sorted by modality to the same."""
        # The stream may be wider than the products; under autocast those narrow it themselves.
        u = self.norm(h, routing).to(_dtype_of(self.in_proj))
        x, z = routing.restore(self.in_proj(u, routing)).chunk(2, dim=-1)
        v = self.conv1d(x, context)
        steps, BC = self._split(self.x_proj(routing.permute(v), routing))
        y = self.ssm(v, self.dt_proj(steps, routing), BC, z, routing, context)
        return h + self.out_proj(routing.permute(y), routing)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        return projected[:, : self.rank], projected[:, self.rank :]


class Backbone(GenerativeBackbone):
    """The blocks and the final norm, which modalities share.

    Attributes:
        sequence_group: the ranks that rows are cut over, each forward then being collective; None where rows are whole.
    """

    sequence_group: SequenceGroup | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = RoutedRMSNorm(config.d_model, config.norm_eps, split=False)

    def context(self, batch: PackedBatch, routing: Routing) -> Context:
        """What all blocks of a forward share."""
        if self.sequence_group is not None:
            return ShardedContext(batch.position_ids, batch.rows, self.sequence_group)
        return PackedContext(batch.position_ids, batch.rows)

    def cached_context(
        self, cache: KVCache, length: int, new_lengths: Tensor | None, *, is_image: bool = False
    ) -> CachedContext:
        """See `GenerativeBackbone`; patches are scanned in their order, as in training."""
        return CachedContext(cache, length, new_lengths)

    def forward(self, x: Tensor, routing: Routing, context: Context) -> Tensor:
        """Rows (T, d) sorted by modality, through all blocks and the norm, in the type of the products."""
        # The norm's: while this runs, sharding has not gathered the blocks' weights.
        own = _dtype_of(self.norm)
        dtype = autocast_dtype(x) or own
        x = x.to(torch.promote_types(dtype, torch.float32) if self.config.residual_fp32 else dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, routing, context.of_layer(layer))
        return self.norm(x, routing).to(own)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
