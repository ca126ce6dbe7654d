"""Feed-forward networks: a dense network for every token, or one network per expert."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moe_jax.grouped import Choices, GateOn, LinearMaps, on_choices
from moe_jax.nn.init import constant, weight
from moe_jax.parallel import constrain

Activation = Literal["relu", "relu2", "gelu", "gelu_exact", "quick_gelu", "silu"]
_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """A feed-forward network.

    Attributes:
        width: Width ``M`` of the input and the output.
        hidden: Width ``F`` of the hidden layer.
        activation: Activation of the hidden layer; ``gelu`` is the tanh approximation,
            ``gelu_exact`` the exact form and ``quick_gelu`` the sigmoid approximation; ``relu2`` is
            the square of ReLU (Primer, 2109.08668).
        gated: True computes the hidden layer as the activation of ``gate`` times ``up``, both
            linear in the input (GLU, 2002.05202).
        bias: True adds a bias to every linear map.
        limit: Bound of a gated network (gpt-oss): ``gate`` is clipped from above to ``limit`` and
            ``up`` to ``[-limit, limit]``; 0 disables clipping.
        up_offset: Number added to ``up`` in a gated network (gpt-oss: 1).
        init_scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.
    """

    width: int
    hidden: int
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = False
    limit: float = 0.0
    up_offset: float = 0.0
    init_scale: float = 1.0

    def experts(self, num_experts: int, key: PRNGKeyArray) -> Experts:
        """Returns ``num_experts`` experts, each a network of this configuration."""
        return Experts(self, num_experts, key)

    def before(
        self, linear: LinearMaps, x: Float[Array, "*R M"]
    ) -> dict[str, Float[Array, "*R F"]]:
        """Returns the pre-activations of rows by name; see ``moe_jax.grouped.network.Network``."""
        return {name: linear(x, name) for name in (("up", "gate") if self.gated else ("up",))}

    def after(
        self,
        linear: LinearMaps,
        pre: dict[str, Float[Array, "R F"]],
        gate: Float[Array, "R 1"] | None,
    ) -> Float[Array, "R M"]:
        """Returns the outputs of rows, times ``gate``."""
        return linear(self.hidden_layer(pre), "down", gate)

    def hidden_layer(self, pre: dict[str, Float[Array, "*R F"]]) -> Float[Array, "*R F"]:
        """Returns the hidden layer from the pre-activations ``up`` and, if gated, ``gate``."""
        activation, up = _ACTIVATIONS[self.activation], pre["up"]
        if not self.gated:
            return activation(up)
        gate = pre["gate"]
        if self.limit:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        if self.up_offset:
            up = up + self.up_offset
        return activation(gate) * up


class FeedForward(nnx.Module):
    """The dense feed-forward layer of a transformer."""

    def __init__(self, config: FeedForwardConfig, key: PRNGKeyArray):
        """Initialises ``up (M, F)``, ``gate (M, F)`` if gated, ``down (F, M)``, and biases."""
        keys = jax.random.split(key, 3)
        m, f, scale = config.width, config.hidden, config.init_scale
        self.up = weight(keys[0], (m, f), ("embed", "mlp"), fan_in=m, scale=scale)
        self.down = weight(keys[1], (f, m), ("mlp", "embed"), fan_in=f, scale=scale)
        if config.gated:
            self.gate = weight(keys[2], (m, f), ("embed", "mlp"), fan_in=m, scale=scale)
        if config.bias:
            self.up_bias = constant(0.0, (f,), ("mlp",))
            self.down_bias = constant(0.0, (m,), ("embed",))
        if config.bias and config.gated:
            self.gate_bias = constant(0.0, (f,), ("mlp",))
        self.config = config

    def __call__(self, x: Float[Array, "B L M"]) -> Float[Array, "B L M"]:
        """Returns the output ``(B, L, M)`` for the tokens ``x (B, L, M)``."""
        hidden = self.config.hidden_layer(self.config.before(_einsum(self, "blm,mf->blf"), x))
        return _einsum(self, "blf,fm->blm")(constrain(hidden, "batch", "length", "mlp"), "down")


class Experts(nnx.Module):
    """``E`` feed-forward networks, each applied to the tokens in its own slots."""

    def __init__(self, config: FeedForwardConfig, num_experts: int, key: PRNGKeyArray):
        """Initialises the parameters of ``FeedForward`` with a leading axis ``E``."""
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
        if config.bias:
            self.up_bias = constant(0.0, (e, 1, f), ("expert", None, "expert_mlp"))
            self.down_bias = constant(0.0, (e, 1, m), ("expert", None, "expert_embed"))
        if config.bias and config.gated:
            self.gate_bias = constant(0.0, (e, 1, f), ("expert", None, "expert_mlp"))
        self.config = config

    def __call__(self, x: Float[Array, "E T M"]) -> Float[Array, "E T M"]:
        """Returns the outputs ``(E, T, M)`` for the slots ``x (E, T, M)`` of all experts."""
        hidden = constrain(self.hidden(x), "expert", "slots", "expert_mlp")
        return _einsum(self, "etf,efm->etm")(hidden, "down")

    def hidden(self, x: Float[Array, "E T M"]) -> Float[Array, "E T F"]:
        """Returns the hidden units ``(E, T, F)`` for the slots ``x (E, T, M)`` of all experts."""
        return self.config.hidden_layer(self.config.before(_einsum(self, "etm,emf->etf"), x))

    def on_choices(
        self,
        tokens: Float[Array, "T M"],
        gate: Float[Array, "T K"],
        choices: Choices,
        gate_on: GateOn = "out",
    ) -> Float[Array, "T M"]:
        """Returns the sums of the outputs of sorted choices; see ``moe_jax.grouped.on_choices``."""
        names = [f"{name}{end}" for name in ("up", "gate", "down") for end in ("", "_bias")]
        arrays = {name: getattr(self, name)[...] for name in names if hasattr(self, name)}
        parameters = {
            name: (array[:, 0] if name.endswith("_bias") else array).astype(tokens.dtype)
            for name, array in arrays.items()
        }
        return on_choices(self.config, parameters, tokens, gate, choices, gate_on)

    def separate(self) -> list[dict[str, Array]]:
        """Returns copies of the parameters of each expert, for ``moe_jax.grouped.on_separate``.

        Returns:
            For each expert its parameters by name: matrices ``name (N, M)`` with their outputs
            first, and biases ``name_bias (N,)``.
        """
        names = [f"{name}{end}" for name in ("up", "gate", "down") for end in ("", "_bias")]
        arrays = {name: getattr(self, name)[...] for name in names if hasattr(self, name)}

        def one(name: str, array: Array) -> Array:
            return array[0] if name.endswith("_bias") else array.T

        number = len(arrays["up"])
        return [
            {name: one(name, array[e]) for name, array in arrays.items()} for e in range(number)
        ]


class MixedExperts(nnx.Module):
    """Experts of several widths: equally many neighbouring experts have each width.

    If the mesh splits the experts, XLA moves slots between devices to compute the experts of one
    width.
    """

    def __init__(
        self,
        config: FeedForwardConfig,
        widths: tuple[int, ...],
        num_experts: int,
        key: PRNGKeyArray,
    ):
        """Initialises ``E / len(widths)`` experts of every width."""
        keys = jax.random.split(key, len(widths))
        size = num_experts // len(widths)
        self.groups = nnx.List(
            Experts(dataclasses.replace(config, hidden=width), size, group_key)
            for width, group_key in zip(widths, keys, strict=True)
        )

    def __call__(self, x: Float[Array, "E T M"]) -> Float[Array, "E T M"]:
        """Returns the outputs ``(E, T, M)`` for the slots ``x (E, T, M)`` of all experts."""
        parts = jnp.split(x, len(self.groups))
        done = [group(part) for group, part in zip(self.groups, parts, strict=True)]
        return jnp.concatenate(done)


def _einsum(layer: FeedForward | Experts, product: str) -> LinearMaps:
    """Returns the linear maps of a tensor by ``einsum``."""

    def linear(x: Array, name: str, gate: Array | None = None) -> Array:
        x = x if gate is None else x * gate
        y = jnp.einsum(product, x, getattr(layer, name)[...].astype(x.dtype))
        if not layer.config.bias:
            return y
        bias = getattr(layer, f"{name}_bias")[...].astype(x.dtype)
        return y + (bias if gate is None else bias * gate)

    return linear
