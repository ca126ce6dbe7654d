"""A dense network beside the experts, and how the two are mixed."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.init import weight
from moe_jax.precision import wide_einsum
from moe_jax.ranges import Chance, Natural, Ranged, Share, Weight

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SharedConfig(Ranged):
    """A network that every token passes beside its experts.

    Attributes:
        hidden: ``F`` of the network; 0 for none. Several shared experts are one as wide as all.
        mix: ``sum`` adds it (DeepSeekMoE's shared experts, Llama 4); ``sigmoid`` scales it by a
            learned gate first (Qwen2-MoE); ``softmax`` weights both by two learned coefficients
            (residual MoE, DeepSpeed-MoE 2201.05596, section 4.1.1); ``conditional`` mixes both by
            one learned gate, ``g`` experts and ``1 - g`` network (NLLB's conditional MoE routing).
        gate_drop: chance in training that a token's conditional gate is 0 (``cmr_gate_drop``).
        gate_target: share of tokens that the conditional gate should send (``cmr_gate_loss_p``).
        gate_weight: factor of the distance to it in the objective (``cmr_gate_loss_wt``).
    """

    hidden: Natural = 0
    mix: Literal["sum", "sigmoid", "softmax", "conditional"] = "sum"
    gate_drop: Chance = 0.0
    gate_target: Share = 1.0
    gate_weight: Weight = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.mix != "conditional" and (self.gate_drop or self.gate_weight):
            raise ConfigError(
                "moe.shared: gate_drop and gate_weight need mix='conditional': set it or unset them"
            )


class Shared(nnx.Module):
    """The network, its gate, and the sum of network and experts."""

    def __init__(self, config: SharedConfig, network: FeedForwardConfig, key: Array):
        """Makes the network, and a gate ``(M, 1)`` or ``(M, 2)`` if it has one."""
        network_key, gate_key = jax.random.split(key)
        network = dataclasses.replace(network, hidden=config.hidden)
        self.network = FeedForward(network, network_key)
        outputs = {"sum": 0, "sigmoid": 1, "softmax": 2, "conditional": 1}[config.mix]
        if outputs:
            shape, axes = (network.width, outputs), ("embed", "router")
            self.gate = weight(gate_key, shape, axes, fan_in=network.width, scale=1.0)
        self.config = config

    def __call__(
        self, x: Array, routed: Array, valid: Array, rng: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """Mixes the network's output into that of the experts.

        Args:
            x: ``(B, L, M)`` the layer's input.
            routed: ``(B, L, M)`` what the experts made of it.
            valid: ``(B, L)`` bool.
            rng: key in training.

        Returns:
            ``(B, L, M)``, zero for padding, and the gate's own losses.
        """
        done = jnp.where(valid[..., None], self.network(x), 0)
        if self.config.mix == "sum":
            return routed + done, {}
        wide = x.astype(jnp.float32)
        logits = wide_einsum("blm,mo->blo", wide, self.gate[...])
        if self.config.mix == "sigmoid":
            return routed + done * jax.nn.sigmoid(logits).astype(x.dtype), {}
        if self.config.mix == "softmax":
            share = jax.nn.softmax(logits).astype(x.dtype)
            return routed * share[..., :1] + done * share[..., 1:], {}
        gate = jax.nn.sigmoid(logits)
        if rng is not None and self.config.gate_drop:
            gate *= jax.random.bernoulli(rng, 1 - self.config.gate_drop, gate.shape)
        used = (gate[..., 0] * valid).sum() / jnp.maximum(valid.sum(), 1)
        losses = {"conditional_gate": jnp.abs(used - self.config.gate_target)}
        gate = gate.astype(x.dtype)
        return routed * gate + done * (1 - gate), losses

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factor of each named loss in the objective."""
        conditional = self.config.mix == "conditional"
        return {"conditional_gate": self.config.gate_weight} if conditional else {}
