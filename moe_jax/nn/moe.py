"""The mixture-of-experts layer: router, plan, transport, experts, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import routing
from moe_jax.nn.dropout import dropout, masked
from moe_jax.nn.feed_forward import MixedExperts
from moe_jax.nn.groups import into_groups, out_of_groups, tokens_into_groups
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.router import RouterLayer
from moe_jax.nn.shared import Shared
from moe_jax.parallel import constrain
from moe_jax.transport import implementation

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What one MoE layer reports, over all its groups.

    Attributes:
        loss: what it adds to the objective: the weighted sum of ``losses``.
        losses: unweighted, each a mean over groups, or over sequences for losses of that span,
            that counts each by its valid tokens.
        counts: summed over groups; see ``moe_jax.routing.Counts``.
        experts: ``(B, L, E)`` bool, who took each token, if the mode records it.
        choices: ``(B, L, K)`` int16, the expert of each choice, ``-1 - expert`` where it got no
            slot, if the mode records it; ``K`` is ``E`` where experts choose.
    """

    loss: Array
    losses: dict[str, Array]
    counts: routing.Counts
    experts: Array | None
    choices: Array | None

    @property
    def dropped_fraction(self) -> Array:
        """Share of the assignments that found their expert full, over all experts."""
        return self.counts.dropped / jnp.maximum(self.counts.demand.sum(-1), 1)


class Expert(Protocol):
    """What an expert is: a feed-forward network, or projections of attention.

    Attributes:
        width: ``M`` of the tokens that it reads.
        init_scale: of the router's and the experts' weights.
    """

    width: int
    init_scale: float

    def experts(self, num_experts: int, key: Array) -> nnx.Module:
        """Makes ``E`` of them, as a module from ``(E, T, M)`` to ``(E, T, ...)``."""


class MoE(nnx.Module):
    """Mixture-of-experts layer, in place of a feed-forward network or of another map of tokens."""

    def __init__(self, config: MoEConfig, expert: Expert, key: Array):
        """Makes router, experts and the shared network; raises ConfigError if these differ.

        A layer by itself is ``moe_jax.MoE``.
        """
        config.check_expert(expert)
        router_key, experts_key = jax.random.split(key)
        self.router = RouterLayer(
            config.router, expert.width, config.num_experts, router_key, expert.init_scale
        )
        if config.expert_dims:
            self.experts = MixedExperts(expert, config.expert_dims, config.num_experts, experts_key)
        else:
            self.experts = expert.experts(config.num_experts, experts_key)
        if config.shared.hidden:
            self.shared = Shared(config.shared, expert, jax.random.fold_in(key, 2))
        self.config = config

    def __call__(
        self,
        x: Array,
        valid: Array,
        *,
        mode: Mode,
        rng: Array | None = None,
        token_ids: Array | None = None,
        record: Array | None = None,
    ) -> tuple[Array, MoEAux]:
        """Applies the layer.

        Args:
            x: ``(B, L, M)``.
            valid: ``(B, L)`` bool; padding gets zero output and takes no slot.
            mode: which capacity holds, and whether to record the routing.
            rng: key of jitter, random policies and dropout; without it the layer is deterministic.
            token_ids: ``(B, L)`` int32, for routers that hash them.
            record: ``(B, L, K)`` recorded choices, for the router ``forced``.

        Returns:
            ``(B, L, M)``, or as wide as what the experts give, without the shared network zero for
            tokens that got no slot, and the layer's report.
        """
        keys = (None,) * 5 if rng is None else jax.random.split(rng, 5)
        size = self.config.group_size
        tokens = tokens_into_groups(x, size)
        with jax.named_scope("router"):
            plan = self.router(
                tokens,
                capacity=self._capacity(tokens.shape[1], mode),
                valid=into_groups(valid, size, False),
                token_ids=None if token_ids is None else into_groups(token_ids, size),
                record=None if record is None else into_groups(record, size, -1),
                rng=keys[0],
            )
        dispatch = implementation(self.config).dispatch
        y = dispatch(
            self.experts,
            tokens,
            plan,
            gate_on=self.config.router.gate_on,
            on_outputs=self._on_outputs(keys),
        )
        y = out_of_groups(constrain(y, "group"), x.shape)
        y = constrain(jnp.where(valid[..., None], y, 0), "batch", "length")
        losses = _mean(self.router.sequence_losses(plan, valid), valid.sum(1))
        if self.config.shared.hidden:
            y, more = self.shared(x, y, valid, keys[3])
            losses |= more
        y = masked(y, self.config.final_mask, keys[4], axes=1)
        return constrain(y, "batch", "length"), self._report(plan, losses, valid, mode)

    def _capacity(self, size: int, mode: Mode) -> int:
        router, experts = self.config.router, self.config.num_experts
        if mode.capacity == "full" and router.select.slots() is None:
            return size
        return router.slots(size, experts, train=mode.capacity == "train")

    def _on_outputs(self, keys: Array | tuple[None, ...]) -> Callable[[Array], Array] | None:
        """Returns the dropout of the experts' outputs ``(G, E, C, N)``, or ``None`` for none."""
        config = self.config
        if not config.expert_dropout and not config.expert_mask:
            return None

        def dropped(y: Array) -> Array:
            y = dropout(y, config.expert_dropout, keys[1])
            return masked(y, config.expert_mask, keys[2], axes=1)

        return dropped

    def _report(
        self, plan: routing.Plan, extra: dict[str, Array], valid: Array, mode: Mode
    ) -> MoEAux:
        losses = _mean(plan.losses, plan.counts.valid) | extra
        weights = self.config.router.loss_weights
        weights = weights | (self.shared.loss_weights if self.config.shared.hidden else {})
        total = sum((weights[name] * value for name, value in losses.items()), jnp.float32(0))
        counts = jax.tree.map(lambda count: count.sum(0), plan.counts)
        if not mode.record:
            return MoEAux(total, losses, counts, None, None)
        taken = taken_by(plan)
        chosen = getattr(plan.slots, "expert", None)
        if chosen is None:
            experts = jnp.arange(self.config.num_experts)
            chosen = jnp.where(taken, experts, -1 - experts)
        chosen = jnp.where(valid[..., None], out_of_groups(chosen, valid.shape), -1)
        taken = out_of_groups(taken, valid.shape)
        return MoEAux(total, losses, counts, taken, chosen.astype(jnp.int16))


def _mean(losses: dict[str, Array], valid: Array) -> dict[str, Array]:
    """Returns the means of losses ``(N,)`` of groups or sequences of ``valid (N,)`` tokens."""
    share = valid / jnp.maximum(valid.sum(), 1)
    return {name: (value * share).sum() for name, value in losses.items()}


def taken_by(plan: routing.Plan) -> Array:
    """Returns ``(G, S, E)`` bool: which experts took each token."""
    expert = getattr(plan.slots, "expert", None)
    if expert is None:
        return (plan.dispatch > 0).any(-1)
    experts = plan.slots.token.shape[-2]
    return (expert[..., None] == jnp.arange(experts)).any(-2)
