"""Experts in attention: each holds query, key and value maps for the tokens that it gets.

Switch Transformer (Fedus et al. 2021, 2101.03961), appendix A: a router per layer picks an expert
for each token, whose queries, keys and values are multiplied by the gate; the output map is shared.
A token without a slot has zeros: it attends evenly, and is attended to as a zero.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.attention import Attention, AttentionConfig
from moe_jax.nn.init import weight
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import constrain
from moe_jax.ranges import Experts, LayerIndex, Natural, Positive, Ranged
from moe_jax.transport import AnyWidthExchangeName, TransportName

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AttentionExpertsConfig(Ranged):
    """Which layers' self-attention projects by experts, and how tokens reach these.

    Attributes:
        every: layers ``every-1, 2*every-1, ...`` do; 0 is none.
        layers: indices from 0 of the layers that do, instead of ``every``.
        num_experts: ``E``.
        group_size: ``S``; capacity is per group and expert.
        router: the router.
        transport: see ``moe_jax.nn.moe_config.MoEConfig``.
        exchange: likewise.
        allow_future_leak: likewise.
    """

    every: Natural = 0
    layers: tuple[LayerIndex, ...] = ()
    num_experts: Experts = 8
    group_size: Positive = 1024
    router: routing.Router = dataclasses.field(default_factory=routing.presets.switch)
    transport: TransportName = "einsum"
    exchange: AnyWidthExchangeName = "gspmd"
    allow_future_leak: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.moe_layers(max(self.layers, default=0) + 1)

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the indices, from 0, of the layers whose attention has experts.

        Raises:
            ConfigError: if a listed layer does not exist or a setting does not fit.
        """
        try:
            return self._moe.moe_layers(num_layers)
        except ConfigError as error:
            message = str(error).replace("model.moe", "model.attention_experts")
            raise ConfigError(message) from error

    def check_layers(self, num_layers: int) -> None:
        """Refuses settings that name no layer, or one layer twice; raises ConfigError."""
        self._moe.check_layers("model.attention_experts", num_layers)

    @property
    def layer(self) -> MoEConfig:
        """The mixture of each of these layers."""
        return dataclasses.replace(self._moe, every=1, layers=())

    @property
    def _moe(self) -> MoEConfig:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return MoEConfig(**settings)


@dataclasses.dataclass(frozen=True)
class Projections:
    """What experts compute: queries, keys and values of ``attention``, one after the other."""

    attention: AttentionConfig

    @property
    def width(self) -> int:
        """``M``, what they read."""
        return self.attention.width

    @property
    def init_scale(self) -> float:
        """See ``moe_jax.nn.init.weight``."""
        return self.attention.init_scale

    @property
    def columns(self) -> int:
        """``(H + 2 H_kv) D``, what they give for a token."""
        return sum(self.heads) * self.attention.head_dim

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of queries, keys and values."""
        return self.attention.num_heads, *(self.attention.num_kv_heads,) * 2

    def experts(self, num_experts: int, key: Array) -> ProjectionExperts:
        """Makes the experts."""
        return ProjectionExperts(self, num_experts, key)


class ProjectionExperts(nnx.Module):
    """``E`` triples of query, key and value maps, each for the tokens in its own slots."""

    def __init__(self, config: Projections, num_experts: int, key: Array):
        """Makes ``query (E, M, H, D)``, ``key`` and ``value (E, M, H_kv, D)``."""
        m, d, axes = config.width, config.attention.head_dim, ("heads", "head")
        made = (
            weight(
                each,
                (num_experts, m, heads, d),
                ("expert", "expert_embed", *axes),
                fan_in=m,
                scale=config.init_scale,
            )
            for each, heads in zip(jax.random.split(key, 3), config.heads, strict=True)
        )
        self.query, self.key, self.value = made

    def __call__(self, x: Array) -> Array:
        """Maps ``x (E, T, M)`` to ``(E, T, (H + 2 H_kv) D)``."""
        parts = []
        for kernel in (self.query, self.key, self.value):
            y = jnp.einsum("etm,emhd->ethd", x, kernel[...].astype(x.dtype))
            y = constrain(y, "expert", "slots", "heads", "head")
            parts.append(y.reshape(*y.shape[:2], -1))
        return jnp.concatenate(parts, axis=-1)


class ProjectedAttention(Attention):
    """Attention that reads what experts projected, instead of tokens to project."""

    def _make_maps(self, keys: Array) -> None:
        """Makes none: they are the experts'."""

    def _mapped(self, x: Array, name: str) -> Array:
        """Returns ``(B, H, L, D)``, the columns of ``x (B, L, (H + 2 H_kv) D)`` of that name."""
        heads = Projections(self.config).heads
        place = ("query", "key", "value").index(name)
        depth = self.config.head_dim
        start = sum(heads[:place]) * depth
        mine = x[..., start : start + heads[place] * depth]
        return mine.reshape(*x.shape[:2], heads[place], depth).swapaxes(1, 2)
