"""Parameters and FLOPs of a model, counted on the real module without allocating it."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe import MoEConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        total: parameters.
        active: parameters that one token meets, embedding and head included.
        flops_per_token: forward, two per multiply-add; attention over half the length on average.
        flops_by_part: the same by part.
    """

    total: int
    active: int
    flops_per_token: int
    flops_by_part: dict[str, int]

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward: three times forward."""
        return 3 * self.flops_per_token


def count(config: DecoderConfig, vocab_size: int, seq_length: int) -> Cost:
    """Counts ``config`` with ``vocab_size`` tokens at ``seq_length``."""
    shapes = jax.eval_shape(lambda: Decoder(config, vocab_size, jax.random.key(0)))
    parameters = nnx.state(shapes, nnx.Param)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    matrices = 3 if config.gated else 2
    sparse = [config.moe.at(layer) for layer in config.moe.moe_layers(config.num_layers)]
    width, heads, dim = config.width, config.num_heads, config.head_dim
    kv_heads = config.num_kv_heads or heads
    extra = sum(moe.extra_dense != "none" for moe in sparse)
    dense_hidden = (config.num_layers - len(sparse) + extra) * config.mlp_dim
    dense_hidden += sum(moe.shared.hidden for moe in sparse)
    met = [_experts_per_token(moe) for moe in sparse]
    idle = sum(
        matrices * width * moe.mean_expert_dim * (moe.num_experts - experts)
        for moe, experts in zip(sparse, met, strict=True)
    )
    hidden = sum(moe.mean_expert_dim * experts for moe, experts in zip(sparse, met, strict=True))
    planes = sum(
        math.prod(parameter.shape)
        for moe in sparse
        for parameter in moe.router.head.parameters(
            width, moe.num_experts, moe.router.planes
        ).values()
    )
    parts = {
        "attention": config.num_layers
        * 2
        * (width * dim * (2 * heads + 2 * kv_heads) + heads * dim * seq_length),
        "dense": 2 * matrices * width * dense_hidden,
        "experts": round(2 * matrices * width * hidden),
        "router": 2 * planes,
        "head": 2 * width * vocab_size,
    }
    return Cost(total, round(total - idle), sum(parts.values()), parts)


def _experts_per_token(moe: MoEConfig) -> float:
    """Experts a token meets on average; the capacity decides where experts choose."""
    return moe.router.experts_per_token(moe.group_size, moe.num_experts)
