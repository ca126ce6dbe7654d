"""The shared network: a dense network beside the experts, and the sum of the two outputs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.init import weight
from moe_jax.nn.norm import NormConfig, norm
from moe_jax.precision import wide_einsum
from moe_jax.ranges import Chance, Natural, Ranged, Share, Weight


@dataclasses.dataclass(frozen=True)
class SharedConfig(Ranged):
    """Shared experts: one dense network that processes every token, beside the routed experts.

    Attributes:
        hidden: Hidden width ``F`` of the network, the sum of the widths of all shared experts; 0
            means that the layer has no shared expert.
        mix: Combination of routed and shared output: ``sum`` adds them (DeepSeekMoE, Llama 4);
            ``sigmoid`` first scales the shared output by a learned gate (Qwen2-MoE);
            ``softmax`` weights both outputs by two learned coefficients (residual MoE,
            DeepSpeed-MoE 2201.05596, section 4.1.1); ``conditional`` weights the experts by one
            learned gate ``g`` and the network by ``1 - g`` (NLLB's conditional MoE routing).
        gate_drop: Probability in training that the conditional gate of a token is 0 (NLLB's
            ``cmr_gate_drop``).
        gate_target: Target for the mean of the conditional gate over tokens (NLLB's
            ``cmr_gate_loss_p``).
        gate_weight: Weight of the loss that pulls the mean of the conditional gate towards
            ``gate_target`` (NLLB's ``cmr_gate_loss_wt``).
        norms: True gives the network a norm of its inputs of its own, which reads the tokens before
            the norm of the layer, and normalises both outputs before they are combined (Gemma 4).
    """

    hidden: Natural = 0
    mix: Literal["sum", "sigmoid", "softmax", "conditional"] = "sum"
    gate_drop: Chance = 0.0
    gate_target: Share = 1.0
    gate_weight: Weight = 0.0
    norms: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.mix != "conditional" and (self.gate_drop or self.gate_weight):
            raise ConfigError(
                "moe.shared: gate_drop and gate_weight need mix='conditional': set it or unset them"
            )


class Shared(nnx.Module):
    """The shared network, its gate, and the combination of its output with the experts' output."""

    def __init__(
        self,
        config: SharedConfig,
        network: FeedForwardConfig,
        key: PRNGKeyArray,
        norms: NormConfig | None = None,
    ):
        """Initialises the network, its norms and a gate ``(M, 1)`` or ``(M, 2)``, if any.

        Args:
            config: Width of the network and combination of the outputs.
            network: Configuration of one expert, which the network shares except for its width.
            key: Random key.
            norms: Configuration of the norms, which exist if ``config.norms`` is set; ``None`` for
                the default.
        """
        network_key, gate_key = jax.random.split(key)
        network = dataclasses.replace(network, hidden=config.hidden)
        self.network = FeedForward(network, network_key)
        if config.norms:
            norms = norms or NormConfig()
            self.norm = norm(norms, network.width)
            self.output_norm = norm(norms, network.width)
            self.routed_norm = norm(norms, network.width)
        outputs = {"sum": 0, "sigmoid": 1, "softmax": 2, "conditional": 1}[config.mix]
        if outputs:
            shape, axes = (network.width, outputs), ("embed", "router")
            self.gate = weight(gate_key, shape, axes, fan_in=network.width, scale=1.0)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B L M"],
        routed: Float[Array, "B L M"],
        valid: Bool[Array, "B L"],
        rng: PRNGKeyArray | None,
        residual: Float[Array, "B L M"] | None = None,
    ) -> tuple[Float[Array, "B L M"], dict[str, Float[Array, ""]]]:
        """Combines the output of the network with the output of the experts.

        Args:
            x: Input ``(B, L, M)`` of the layer.
            routed: Output ``(B, L, M)`` of the experts.
            valid: Mask ``(B, L)``, False for padding.
            rng: Random key in training, or ``None``.
            residual: Tokens ``(B, L, M)`` before the norm of the layer, for a network with norms;
                ``None`` if the layer has no norm.

        Returns:
            The output ``(B, L, M)``, zero for padding, and the losses of the gate by name.
        """
        inputs = x
        if self.config.norms:
            inputs = self.norm(x if residual is None else residual)
        done = self.network(inputs)
        if self.config.norms:
            done = self.output_norm(done)
            routed = jnp.where(valid[..., None], self.routed_norm(routed), 0)
        done = jnp.where(valid[..., None], done, 0)
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
        """The weight of each loss in the objective, by name."""
        conditional = self.config.mix == "conditional"
        return {"conditional_gate": self.config.gate_weight} if conditional else {}
