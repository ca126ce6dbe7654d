"""Experts in attention: each expert projects its tokens to queries, keys and values.

Switch Transformer (Fedus et al. 2021, 2101.03961), appendix A: the router of the layer picks an
expert for each token, and the gate multiplies the token's query, key and value; all experts share
the output map. An unrouted token has a query, key and value of zeros: it attends evenly to all
keys, and other tokens attend to a zero.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PRNGKeyArray

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.grouped import Choices, GateOn, LinearMaps, on_choices
from moe_jax.nn.attention import Attention, AttentionConfig
from moe_jax.nn.init import weight
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import constrain
from moe_jax.ranges import Experts, LayerIndex, Natural, Positive, Ranged
from moe_jax.transport import AnyWidthExchangeName, TransportName

_MAPS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class AttentionExpertsConfig(Ranged):
    """Experts that compute the queries, keys and values of self-attention, and their router.

    Attributes:
        every: Period of the layers with experts in attention: 2 selects the layers 1, 3, ...
            (counted from 0), and 0 selects none.
        layers: Indices, from 0, of the layers with experts, instead of ``every``.
        num_experts: Number ``E`` of experts per layer.
        group_size: Number ``S`` of tokens per group; the capacity of an expert is per group.
        router: The router.
        transport: Movement of tokens within a device, see ``model.moe.transport``.
        exchange: Movement of tokens between devices, see ``model.moe.exchange``.
        allow_future_leak: True allows routers in which experts choose tokens in a causal model; the
            routing of a token then depends on later tokens.
    """

    every: Natural = 0
    layers: tuple[LayerIndex, ...] = ()
    num_experts: Experts = 8
    group_size: Positive = 1024
    router: routing.Router = dataclasses.field(default_factory=routing.presets.switch)
    transport: TransportName = "auto"
    exchange: AnyWidthExchangeName = "gspmd"
    allow_future_leak: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.moe_layers(max(self.layers, default=0) + 1)

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the indices, from 0, of the layers whose attention has experts.

        Raises:
            ConfigError: If a listed layer does not exist or a setting is out of range.
        """
        try:
            return self._moe.moe_layers(num_layers)
        except ConfigError as error:
            message = str(error).replace("model.moe", "model.attention_experts")
            raise ConfigError(message) from error

    def check_layers(self, num_layers: int) -> None:
        """Rejects settings that name no layer, or one layer twice.

        Args:
            num_layers: Number of layers in the stack.

        Raises:
            ConfigError: If so; the message names the setting to change.
        """
        self._moe.check_layers("model.attention_experts", num_layers)

    @property
    def layer(self) -> MoEConfig:
        """The configuration of one layer with experts."""
        return dataclasses.replace(self._moe, every=1, layers=())

    @property
    def _moe(self) -> MoEConfig:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return MoEConfig(**settings)


@dataclasses.dataclass(frozen=True)
class Projections:
    """Experts that project a token to its query, key and value, which they concatenate.

    Attributes:
        attention: Configuration of the attention that reads the projections.
    """

    attention: AttentionConfig

    @property
    def width(self) -> int:
        """Width ``M`` of the tokens."""
        return self.attention.width

    @property
    def init_scale(self) -> float:
        """Scale of the initial weights, see ``moe_jax.nn.init.weight``."""
        return self.attention.init_scale

    @property
    def columns(self) -> int:
        """Number ``(H + 2 H_kv) D`` of features in the projections of a token."""
        return sum(self.heads) * self.attention.head_dim

    @property
    def heads(self) -> tuple[int, int, int]:
        """Numbers of query, key and value heads."""
        return self.attention.num_heads, *(self.attention.num_kv_heads,) * 2

    def experts(self, num_experts: int, key: PRNGKeyArray) -> ProjectionExperts:
        """Returns ``num_experts`` experts."""
        return ProjectionExperts(self, num_experts, key)

    def before(self, linear: LinearMaps, x: Float[Array, "R M"]) -> list[Float[Array, "R _"]]:
        """Returns queries, keys and values of rows; see ``moe_jax.grouped.network.Network``."""
        return [linear(x, name) for name in _MAPS]

    def after(
        self, linear: LinearMaps, pre: list[Float[Array, "R _"]], gate: Float[Array, "R 1"] | None
    ) -> Float[Array, "R N"]:
        """Returns the projections of rows side by side, times ``gate``."""
        del linear
        projections = jnp.concatenate(pre, axis=-1)
        return projections if gate is None else projections * gate


class ProjectionExperts(nnx.Module):
    """``E`` triples of query, key and value maps, each applied to the tokens in its own slots."""

    def __init__(self, config: Projections, num_experts: int, key: PRNGKeyArray):
        """Initialises ``query (E, M, H, D)``, ``key`` and ``value (E, M, H_kv, D)``."""
        m, d, axes = config.width, config.attention.head_dim, ("heads", "head")
        maps = (
            weight(
                each,
                (num_experts, m, heads, d),
                ("expert", "expert_embed", *axes),
                fan_in=m,
                scale=config.init_scale,
            )
            for each, heads in zip(jax.random.split(key, 3), config.heads, strict=True)
        )
        self.query, self.key, self.value = maps
        self.config = config

    def __call__(self, x: Float[Array, "E T M"]) -> Float[Array, "E T N"]:
        """Returns the projections ``(E, T, (H + 2 H_kv) D)`` of the slots ``x (E, T, M)``."""
        parts = []
        for kernel in (self.query, self.key, self.value):
            y = jnp.einsum("etm,emhd->ethd", x, kernel[...].astype(x.dtype))
            y = constrain(y, "expert", "slots", "heads", "head")
            parts.append(y.reshape(*y.shape[:2], -1))
        return jnp.concatenate(parts, axis=-1)

    def on_choices(
        self,
        tokens: Float[Array, "T M"],
        gate: Float[Array, "T K"],
        choices: Choices,
        gate_on: GateOn = "out",
    ) -> Float[Array, "T N"]:
        """Returns the sums of the projections of sorted choices.

        See ``moe_jax.grouped.on_choices``; ``N`` is ``(H + 2 H_kv) D``.
        """
        kernels = zip(_MAPS, (self.query, self.key, self.value), strict=True)
        maps = {name: kernel[...].astype(tokens.dtype) for name, kernel in kernels}
        parameters = {name: m.reshape(*m.shape[:2], -1) for name, m in maps.items()}
        return on_choices(self.config, parameters, tokens, gate, choices, gate_on)


class ProjectedAttention(Attention):
    """Attention that reads the projections of experts instead of tokens."""

    def _make_maps(self, keys: Key[Array, " 3"]) -> None:
        """Initialises nothing, because the experts hold the maps."""

    def _mapped(self, x: Float[Array, "B L N"], name: str) -> Float[Array, "B H L D"]:
        """Returns the queries, keys or values in the projections ``(B, L, (H + 2 H_kv) D)``."""
        heads = Projections(self.config).heads
        index = _MAPS.index(name)
        depth = self.config.head_dim
        start = sum(heads[:index]) * depth
        columns = x[..., start : start + heads[index] * depth]
        return columns.reshape(*x.shape[:2], heads[index], depth).swapaxes(1, 2)
