"""Two-layer networks: one for every token, or one per expert."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.init import weight
from moe_jax.parallel import constrain

Activation = Literal["relu", "gelu", "silu"]
_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """A feed-forward network.

    Attributes:
        width: ``M``.
        hidden: ``F``.
        activation: of the hidden layer.
        gated: multiply the activation by a second linear map of the input (GLU).
        init_scale: see ``moe_jax.nn.init.weight``.
    """

    width: int
    hidden: int
    activation: Activation = "gelu"
    gated: bool = False
    init_scale: float = 1.0


class FeedForward(nnx.Module):
    """The dense feed-forward layer of a transformer."""

    def __init__(self, config: FeedForwardConfig, key: jax.Array):
        """Makes ``up (M, F)``, ``gate (M, F)`` if gated, and ``down (F, M)``."""
        keys = jax.random.split(key, 3)
        m, f, scale = config.width, config.hidden, config.init_scale
        self.up = weight(keys[0], (m, f), ("embed", "mlp"), fan_in=m, scale=scale)
        self.down = weight(keys[1], (f, m), ("mlp", "embed"), fan_in=f, scale=scale)
        if config.gated:
            self.gate = weight(keys[2], (m, f), ("embed", "mlp"), fan_in=m, scale=scale)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x (B, L, M)`` to ``(B, L, M)``."""
        hidden = _hidden(self, x, "blm,mf->blf", ("batch", "length", "mlp"))
        return jnp.einsum("blf,fm->blm", hidden, self.down[...].astype(x.dtype))


class Experts(nnx.Module):
    """``E`` feed-forward networks, each for the tokens in its own slots."""

    def __init__(self, config: FeedForwardConfig, num_experts: int, key: jax.Array):
        """Makes the parameters of ``FeedForward`` with a leading axis ``E``."""
        keys = jax.random.split(key, 3)
        e, m, f, scale = num_experts, config.width, config.hidden, config.init_scale
        up, down = (
            ("expert", "expert_embed", "expert_mlp"),
            ("expert", "expert_mlp", "expert_embed"),
        )
        self.up = weight(keys[0], (e, m, f), up, fan_in=m, scale=scale)
        self.down = weight(keys[1], (e, f, m), down, fan_in=f, scale=scale)
        if config.gated:
            self.gate = weight(keys[2], (e, m, f), up, fan_in=m, scale=scale)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x (E, T, M)`` to ``(E, T, M)``."""
        hidden = _hidden(self, x, "etm,emf->etf", ("expert", "data", "expert_mlp"))
        return jnp.einsum("etf,efm->etm", hidden, self.down[...].astype(x.dtype))


class MixedExperts(nnx.Module):
    """Experts of several widths: groups of neighbours, each with its own.

    Where the mesh splits the experts, XLA moves slots between devices to compute a group.
    """

    def __init__(
        self, config: FeedForwardConfig, widths: tuple[int, ...], num_experts: int, key: jax.Array
    ):
        """Makes one ``Experts`` of ``E / len(widths)`` for every width."""
        keys = jax.random.split(key, len(widths))
        size = num_experts // len(widths)
        self.groups = nnx.List(
            Experts(dataclasses.replace(config, hidden=width), size, group_key)
            for width, group_key in zip(widths, keys, strict=True)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x (E, T, M)`` to ``(E, T, M)``."""
        parts = jnp.split(x, len(self.groups))
        done = [group(part) for group, part in zip(self.groups, parts, strict=True)]
        return jnp.concatenate(done)


def _hidden(
    layer: FeedForward | Experts, x: jax.Array, product: str, axes: tuple[str, ...]
) -> jax.Array:
    hidden = _ACTIVATIONS[layer.config.activation](
        jnp.einsum(product, x, layer.up[...].astype(x.dtype))
    )
    if layer.config.gated:
        hidden = hidden * jnp.einsum(product, x, layer.gate[...].astype(x.dtype))
    return constrain(hidden, *axes)
