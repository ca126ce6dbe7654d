"""The mixture-of-experts layer: router, plan, transport, experts, and back."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.dropout import dropout
from moe_jax.nn.feed_forward import Experts, FeedForwardConfig
from moe_jax.nn.init import weight
from moe_jax.nn.mode import Mode
from moe_jax.parallel import (
    constrain,
    experts_to_groups,
    group_shards,
    groups_to_experts,
    over_groups,
)
from moe_jax.transport import Einsum, Gather, Transport

Array = jax.Array
_TRANSPORTS: dict[str, Transport] = {"einsum": Einsum(), "gather": Gather()}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Where MoE layers sit and what they are.

    Attributes:
        every: layers ``every-1, 2*every-1, ...`` are MoE, so 1 is every layer; 0 is none (dense).
        num_experts: ``E``.
        expert_dim: ``F`` of each expert.
        group_size: ``S``; capacity is per group and expert. A batch that does not divide is padded.
        router: the router.
        transport: ``einsum`` (dispatch tensors) or ``gather`` (slot table).
        expert_dropout: dropout of the experts' output in training (Switch section 2.4).
        allow_future_leak: let experts choose tokens in a causal model, where a token's routing
            then depends on later tokens.
    """

    every: int = 2
    num_experts: int = 8
    expert_dim: int = 512
    group_size: int = 1024
    router: routing.Router = dataclasses.field(default_factory=routing.presets.switch)
    transport: Literal["einsum", "gather"] = "einsum"
    expert_dropout: float = 0.0
    allow_future_leak: bool = False

    def __post_init__(self):
        for name in ("num_experts", "expert_dim", "group_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.moe.{name}={getattr(self, name)} must be at least 1")

    def is_moe(self, layer: int) -> bool:
        """Returns whether layer ``layer`` (from 0) has experts."""
        return self.every > 0 and (layer + 1) % self.every == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What one MoE layer reports, over all its groups.

    Attributes:
        loss: what it adds to the objective: the weighted sum of ``losses``.
        losses: unweighted, each a mean over groups that counts a group by its valid tokens.
        counts: summed over groups; see ``moe_jax.routing.Counts``.
        experts: ``(B, L, E)`` bool, who took each token, if the mode records it.
    """

    loss: Array
    losses: dict[str, Array]
    counts: routing.Counts
    experts: Array | None


class MoE(nnx.Module):
    """Mixture-of-experts feed-forward layer."""

    def __init__(self, config: MoEConfig, expert: FeedForwardConfig, key: Array):
        """Makes the router kernel ``(M, E)`` and the experts."""
        router_key, experts_key = jax.random.split(key)
        shape = (expert.width, config.num_experts)
        self.router_kernel = weight(
            router_key, shape, ("embed", "router"), fan_in=expert.width, scale=expert.init_scale
        )
        self.experts = Experts(expert, config.num_experts, experts_key)
        self.config = config

    def __call__(
        self, x: Array, valid: Array, *, mode: Mode, rng: Array | None = None
    ) -> tuple[Array, MoEAux]:
        """Applies the layer.

        Args:
            x: ``(B, L, M)``.
            valid: ``(B, L)`` bool; padding gets zero output and takes no slot.
            mode: which capacity holds, and whether to record the routing.
            rng: key of jitter, random policies and dropout; without it the layer is deterministic.

        Returns:
            ``(B, L, M)``, zero for tokens that got no slot, and the layer's report.
        """
        jitter_key, route_key, dropout_key = (
            (None,) * 3 if rng is None else jax.random.split(rng, 3)
        )
        tokens, mask = _into_groups(x, valid, self.config.group_size)
        plan = self._route(tokens, mask, mode, jitter_key, route_key)
        transport = _TRANSPORTS[self.config.transport]
        with jax.named_scope("dispatch"):
            sent = groups_to_experts(transport.dispatch(tokens, plan))
        with jax.named_scope("experts"):
            done = self.experts(sent)
        with jax.named_scope("combine"):
            # By groups, so that the draw does not depend on how many the mesh pads with.
            done = experts_to_groups(done, tokens.shape[0])
            done = dropout(done, self.config.expert_dropout, dropout_key)
            y = transport.combine(done, plan)
            y = _out_of_groups(constrain(y, "group"), x.shape)
        return constrain(y, "batch"), self._report(plan, valid.shape, mode)

    def _route(
        self, x: Array, valid: Array, mode: Mode, jitter_key: Array | None, key: Array | None
    ) -> routing.Plan:
        router, experts = self.config.router, self.config.num_experts
        inputs = x.astype(jnp.float32)
        if jitter_key is not None and router.input_jitter:
            low, high = 1 - router.input_jitter, 1 + router.input_jitter
            inputs *= jax.random.uniform(jitter_key, inputs.shape, jnp.float32, low, high)
        with jax.named_scope("router"):
            logits = jnp.einsum("gsm,me->gse", inputs, self.router_kernel[...])
            size = x.shape[1]
            capacity = router.slots(size, experts, train=mode.capacity == "train")
            capacity = size if mode.capacity == "full" else capacity
            keys = None if key is None else jax.random.split(key, x.shape[0])

            def one(logits: Array, valid: Array, key: Array | None) -> routing.Plan:
                return router(logits, capacity=capacity, valid=valid, rng=key)

            return over_groups(jax.vmap(one))(logits, valid, keys)

    def _report(self, plan: routing.Plan, batch: tuple[int, int], mode: Mode) -> MoEAux:
        share = plan.counts.valid / jnp.maximum(plan.counts.valid.sum(), 1)
        losses = {name: (value * share).sum() for name, value in plan.losses.items()}
        weights = self.config.router.loss_weights
        total = sum((weights[name] * value for name, value in losses.items()), jnp.float32(0))
        counts = jax.tree.map(lambda count: count.sum(0), plan.counts)
        taken = _out_of_groups(taken_by(plan), (*batch, -1)) if mode.record else None
        return MoEAux(total, losses, counts, taken)


def taken_by(plan: routing.Plan) -> Array:
    """Returns ``(G, S, E)`` bool: which experts took each token."""
    return plan.dispatch.any(-1) if plan.slots.place is None else _taken_by_place(plan.slots)


def _taken_by_place(slots: routing.Slots) -> Array:
    _, experts, capacity = slots.token.shape
    expert = slots.place // capacity
    return (expert[..., None] == jnp.arange(experts)).any(-2)


def _into_groups(x: Array, valid: Array, group_size: int) -> tuple[Array, Array]:
    """Cuts ``(B, L, M)`` into groups ``(G, S, M)``, padded so that every device has as many."""
    total = valid.size
    size = min(group_size, total)
    groups = -(-total // size)
    groups = -(-groups // group_shards()) * group_shards()
    padding = groups * size - total
    tokens = jnp.pad(x.reshape(total, -1), ((0, padding), (0, 0)))
    mask = jnp.pad(valid.reshape(total), (0, padding))
    return constrain(tokens.reshape(groups, size, -1), "group"), mask.reshape(groups, size)


def _out_of_groups(y: Array, shape: tuple[int, ...]) -> Array:
    """Undoes ``_into_groups``: ``(G, S, M)`` to ``shape = (B, L, M)``."""
    batch, length = shape[:2]
    return y.reshape(-1, y.shape[-1])[: batch * length].reshape(batch, length, -1)
