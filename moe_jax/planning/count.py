"""Parameters and FLOPs of a model, counted on the real module without allocating it."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.routing import TopTokens


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
    sizes = {"expert": 0, "other": 0}
    for variable in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        kind = "expert" if "expert" in variable.get_metadata()["axes"] else "other"
        sizes[kind] += math.prod(variable.get_value().shape)
    layers = [config.moe.is_moe(layer) for layer in range(config.num_layers)]
    experts_per_token = _experts_per_token(config)
    idle = 1 - experts_per_token / config.moe.num_experts
    active = sizes["other"] + round(sizes["expert"] * (1 - idle))
    kv_heads = config.num_kv_heads or config.num_heads
    matrices = 3 if config.gated else 2
    width, heads, dim = config.width, config.num_heads, config.head_dim
    parts = {
        "attention": len(layers)
        * 2
        * (width * dim * (2 * heads + 2 * kv_heads) + heads * dim * seq_length),
        "dense": layers.count(False) * 2 * matrices * width * config.mlp_dim,
        "experts": round(
            layers.count(True) * 2 * matrices * width * config.moe.expert_dim * experts_per_token
        ),
        "router": layers.count(True) * 2 * width * config.moe.num_experts,
        "head": 2 * width * vocab_size,
    }
    return Cost(sizes["expert"] + sizes["other"], active, sum(parts.values()), parts)


def _experts_per_token(config: DecoderConfig) -> float:
    """Experts a token meets on average; the capacity factor decides where experts choose."""
    router = config.moe.router
    if isinstance(router.select, TopTokens):
        return router.capacity.factor
    return router.select.choices_per_token
