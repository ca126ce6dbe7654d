"""The mixture-of-experts layer: router, dispatch, experts and combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int16, PRNGKeyArray

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.copies import CopiesLayer
from moe_jax.nn.dropout import dropout, masked
from moe_jax.nn.feed_forward import FeedForwardConfig, MixedExperts
from moe_jax.nn.free import Free
from moe_jax.nn.groups import into_groups, out_of_groups, tokens_into_groups
from moe_jax.nn.latent_space import LatentSpace
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.router import RouterLayer
from moe_jax.nn.shared import Shared
from moe_jax.parallel import axis_size, constrain
from moe_jax.routing.changeable import weight_name
from moe_jax.transport import Bounded, Dispatch, implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """The report of one MoE layer over all its groups.

    The arrays of several layers, stacked, have a leading axis.

    Attributes:
        loss: Loss that the objective includes, the weighted sum of ``losses``.
        losses: Unweighted losses by name. Each is the mean over groups, or over sequences if this
            is its span, weighted by the number of valid tokens.
        counts: Counts of tokens and choices, summed over groups.
        experts: Mask ``(B, L, E)``, True if the expert took the token, if the mode records it.
        choices: Expert ``(B, L, K)`` of each choice, ``-1 - expert`` where it was dropped or the
            expert is free, if the mode records it; ``K`` is ``E`` if experts choose.
        gates: Combine weight ``(B, L, K)`` of each choice, 0 where it was dropped, if the mode
            records it.
        carried: Values ``(B, L, D)`` that the router of the next MoE layer reads, float32; ``None``
            if the router passes none, and in the reports of a model.
        wanted: Mask ``(B, L, K)``, False where a token makes fewer than ``K`` choices, if the mode
            records it.
        log_shares: Logarithm ``(B, L, V)`` of the share of each logit in the scores of a token, if
            the mode asks for it. Its gradient reaches the parameters of the router alone.
    """

    loss: Float[Array, "*layers"]
    losses: dict[str, Float[Array, "*layers"]]
    counts: routing.Counts
    experts: Bool[Array, "*layers B L E"] | None
    choices: Int16[Array, "*layers B L K"] | None
    gates: Float[Array, "*layers B L K"] | None
    carried: Float[Array, "B L D"] | None = None
    log_shares: Float[Array, "*layers B L V"] | None = None
    wanted: Bool[Array, "*layers B L K"] | None = None

    @property
    def dropped_fraction(self) -> Float[Array, "*layers"]:
        """Share of the choices that were dropped because their expert was full."""
        return self.counts.dropped / jnp.maximum(self.counts.demand.sum(-1), 1)


@runtime_checkable
class Expert(Protocol):
    """Configuration of one expert: a feed-forward network, or the projections of an attention."""

    @property
    def width(self) -> int:
        """Width ``M`` of the tokens that the expert reads."""

    @property
    def init_scale(self) -> float:
        """Scale of the initial weights of the router and the experts."""

    def experts(self, num_experts: int, key: PRNGKeyArray) -> nnx.Module:
        """Returns ``E`` experts as a module from slots ``(E, T, M)`` to outputs ``(E, T, N)``."""


class ConfiguredMoE(nnx.Module):
    """Mixture-of-experts layer that a configuration describes; ``moe_jax.MoE`` is built on it."""

    def __init__(
        self,
        config: MoEConfig,
        expert: Expert,
        key: PRNGKeyArray,
        norms: NormConfig | None = None,
    ):
        """Initialises the router, the experts and the shared network.

        Args:
            config: Configuration of the layer.
            expert: Configuration of one expert.
            key: Random key.
            norms: Configuration of the shared network's norms, if it has any; ``None`` for the
                default.

        Raises:
            ConfigError: If the two configurations differ.
        """
        config.check_expert(expert)
        router_key, experts_key = jax.random.split(key)
        experts = config.num_experts
        self.router = RouterLayer(
            config.router, expert.width, experts, router_key, expert.init_scale
        )
        self.experts = _experts(config, expert, experts_key)
        if config.latent_dim:
            latent_key, scale = jax.random.fold_in(key, 4), expert.init_scale
            self.latent = LatentSpace(expert.width, config.latent_dim, latent_key, scale)
        if config.shared.hidden:
            network = _feed_forward(expert, "shared.hidden")
            self.shared = Shared(config.shared, network, jax.random.fold_in(key, 2), norms)
        if config.router.free.count:
            network = _feed_forward(expert, "router.free")
            free, scale = config.router.free, network.init_scale
            self.free = Free(free, network.width, jax.random.fold_in(key, 3), scale)
        self.copies: CopiesLayer | None = nnx.data(None)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B L M"],
        valid: Bool[Array, "B L"],
        *,
        mode: Mode,
        rng: PRNGKeyArray | None = None,
        token_ids: Int[Array, "B L"] | None = None,
        record: Int[Array, "B L K"] | None = None,
        carried: Float[Array, "B L D"] | None = None,
        residual: Float[Array, "B L M"] | None = None,
    ) -> tuple[Float[Array, "B L N"], MoEAux]:
        """Returns the output of the layer and its report.

        Args:
            x: Tokens ``(B, L, M)``.
            valid: Mask ``(B, L)``, False for padding, which gets zero output and takes no slot.
            mode: Capacity of the experts, and whether the report holds the choices.
            rng: Random key of jitter, random policies and dropout; without it the layer is
                deterministic.
            token_ids: Ids ``(B, L)`` of the tokens, int32, for routers that hash them.
            record: Recorded choices ``(B, L, K)``, for the router ``forced``.
            carried: Field ``carried`` of the report of the MoE layer before, for a router that
                reads it; ``None`` in the first MoE layer.
            residual: Tokens ``(B, L, M)`` before the norm of the layer, for parts that read them;
                ``None`` if the layer has no norm.

        Returns:
            The output ``(B, L, N)``, where ``N`` is the width of the experts' output, and the
            report. The output of unrouted tokens is zero unless the layer has a shared network.
        """
        keys = (None,) * 5 if rng is None else jax.random.split(rng, 5)
        tokens = self.groups_of(x, mode)
        log_shares = self._log_shares(x, valid, carried, residual) if mode.shares else None
        with jax.named_scope("router"):
            plan, carried = self.plan(
                self.router_input(tokens, residual),
                valid,
                mode=mode,
                token_ids=token_ids,
                record=record,
                rng=keys[0],
                carried=carried,
            )
            plan, dispatch = self.dispatched(plan)
        y = self.mixed(tokens, plan, dispatch, keys)
        y = out_of_groups(constrain(y, "group"), x.shape)
        y = constrain(jnp.where(valid[..., None], y, 0), "batch", "length")
        losses = _mean(self.router.sequence_losses(plan, valid, mode.settings), valid.sum(1))
        if self.config.shared.hidden:
            y, more = self.shared(x, y, valid, keys[3], residual)
            losses |= more
        y = masked(y, self.config.final_mask, keys[4], axes=1)
        report = self._report(plan, losses, valid, mode)
        report = dataclasses.replace(report, log_shares=log_shares)
        if carried is not None:
            carried = constrain(out_of_groups(carried, x.shape), "batch", "length")
            report = dataclasses.replace(report, carried=carried)
        return constrain(y, "batch", "length"), report

    def groups_of(self, x: Float[Array, "B L M"], mode: Mode) -> Float[Array, "G S M"]:
        """Returns the groups of tokens; a group is a row where ``_chosen_by_row`` says so."""
        by_row = self._chosen_by_row(mode)
        return tokens_into_groups(x, x.shape[1] if by_row else self.config.group_size)

    def _chosen_by_row(self, mode: Mode) -> bool:
        """Whether experts choose tokens, and no row may depend on the other rows."""
        return mode.capacity == "full" and self.config.router.experts_choose

    def _is_limited(self, mode: Mode) -> bool:
        """Whether padding adds no slots."""
        return self._chosen_by_row(mode) or (mode.capacity == "eval" and not mode.padding_slots)

    def router_input(
        self, tokens: Float[Array, "G S M"], residual: Float[Array, "B L M"] | None
    ) -> Float[Array, "G S M"]:
        """Returns the groups that the router reads: ``tokens``, or tokens before the norm."""
        if self.config.router_input == "residual" and residual is not None:
            return tokens_into_groups(residual, tokens.shape[1])
        return tokens

    def plan(
        self,
        tokens: Float[Array, "G S M"],
        valid: Bool[Array, "B L"],
        *,
        mode: Mode,
        token_ids: Int[Array, "B L"] | None = None,
        record: Int[Array, "B L K"] | None = None,
        rng: PRNGKeyArray | None = None,
        carried: Float[Array, "B L D"] | None = None,
    ) -> tuple[routing.Plan, Float[Array, "G S D"] | None]:
        """Returns the plan of all groups, and the values for the router of the next MoE layer.

        Args:
            tokens: Groups ``(G, S, M)`` that the router reads.
            valid: Mask ``(B, L)``, False for padding.
            mode: Capacity of the experts, and values of scheduled settings.
            token_ids: Ids ``(B, L)`` of the tokens, for routers that hash them.
            record: Recorded choices ``(B, L, K)``, for the router ``forced``.
            rng: Random key in training, or ``None``.
            carried: Values of the router of the MoE layer before, as for a call of the layer.
        """
        size = tokens.shape[1]
        held = into_groups(valid, size, False)
        return self.router(
            tokens,
            capacity=self._capacity(size, mode),
            valid=held,
            limit=self._limit(held) if self._is_limited(mode) else None,
            token_ids=None if token_ids is None else into_groups(token_ids, size),
            record=None if record is None else into_groups(record, size, -1),
            rng=rng,
            carried=None if carried is None else tokens_into_groups(carried, size),
            settings=mode.settings,
        )

    def _log_shares(
        self,
        x: Float[Array, "B L M"],
        valid: Bool[Array, "B L"],
        carried: Float[Array, "B L D"] | None,
        residual: Float[Array, "B L M"] | None,
    ) -> Float[Array, "B L V"]:
        """Returns the field ``log_shares`` of the report."""
        size = self.config.group_size
        tokens = self.router_input(tokens_into_groups(x, size), residual)
        given = None if carried is None else tokens_into_groups(carried, size)
        shares = self.router.log_shares(tokens, into_groups(valid, size, False), given)
        return constrain(out_of_groups(shares, x.shape), "batch", "length")

    def dispatched(self, plan: routing.Plan) -> tuple[routing.Plan, Dispatch]:
        """Returns the part of a plan for which devices have rows, and its transport."""
        dispatch = implementation(self.config, axis_size("expert")).configured(self.config)
        return dispatch.within(plan) if isinstance(dispatch, Bounded) else plan, dispatch

    def mixed(
        self,
        tokens: Float[Array, "G S M"],
        plan: routing.Plan,
        dispatch: Dispatch,
        keys: Array | tuple[None, ...] = (None,) * 5,
    ) -> Float[Array, "G S N"]:
        """Returns the weighted outputs of the experts, free experts included.

        Args:
            tokens: Groups ``(G, S, M)`` of tokens.
            plan: Plan of all groups.
            dispatch: Transport of the tokens.
            keys: Random keys of the layer in training; ``None`` in place of each without.
        """
        y = dispatch(
            self.experts,
            self.latent.project(tokens) if self.config.latent_dim else tokens,
            plan if self.copies is None else self.copies.seat(plan),
            gate_on=self.config.router.gate_on,
            on_outputs=self._on_outputs(keys),
        )
        if self.config.latent_dim:
            y = self.latent.restore(y)
        return y if plan.free is None else y + self.free(tokens, plan.free)

    def _capacity(self, size: int, mode: Mode) -> int:
        router, experts = self.config.router, self.config.num_experts
        if mode.capacity == "full" and not router.experts_choose:
            return size
        return router.slots(size, experts, train=mode.capacity == "train")

    def _limit(self, held: Bool[Array, "G S"]) -> Int[Array, " G"]:
        """Returns the slots per expert of each group in evaluation; padding adds no slots."""
        router, sizes = self.config.router, range(held.shape[1] + 1)
        held = held if router.mask_padding else jnp.ones_like(held)
        slots = [router.slots(size, self.config.num_experts, train=False) for size in sizes]
        return jnp.asarray(slots, jnp.int32)[held.sum(1)]

    def _on_outputs(self, keys: Array | tuple[None, ...]) -> Callable[[Array], Array] | None:
        """Returns the dropout of the experts' outputs ``(G, E, C, N)``, or ``None``."""
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
        now = mode.settings or {}
        weighted = (
            now.get(weight_name(name), weights[name]) * value for name, value in losses.items()
        )
        total = sum(weighted, jnp.float32(0))
        counts = jax.tree.map(lambda count: count.sum(0), plan.counts)
        if not mode.record:
            return MoEAux(total, losses, counts, None, None, None)
        took = taken_by(plan)
        choices = plan.slots.expert if isinstance(plan.slots, routing.Slots) else None
        if choices is None:
            experts = jnp.arange(self.config.num_experts)
            choices = jnp.where(took, experts, -1 - experts)
        wanted = getattr(plan.slots, "wanted", None)
        wanted = out_of_groups(took if wanted is None else wanted, valid.shape)
        choices = jnp.where(valid[..., None], out_of_groups(choices, valid.shape), -1)
        took = out_of_groups(took, valid.shape)
        gates = jnp.where(valid[..., None], out_of_groups(gates_of(plan), valid.shape), 0)
        choices, wanted = choices.astype(jnp.int16), valid[..., None] & wanted
        return MoEAux(total, losses, counts, took, choices, gates, wanted=wanted)


def _experts(config: MoEConfig, expert: Expert, key: PRNGKeyArray) -> nnx.Module:
    """Returns the experts, whose inputs have the width ``R`` if the layer has a latent space."""
    if config.latent_dim:
        network = _feed_forward(expert, "latent_dim")
        expert = dataclasses.replace(network, width=config.latent_dim)
    if config.expert_dims:
        network = _feed_forward(expert, "expert_dims")
        return MixedExperts(network, config.expert_dims, config.num_experts, key)
    return expert.experts(config.num_experts, key)


def _feed_forward(expert: Expert, setting: str) -> FeedForwardConfig:
    """Returns the expert, which ``setting`` requires to be a feed-forward network."""
    if not isinstance(expert, FeedForwardConfig):
        raise ConfigError(f"{setting} requires experts that are feed-forward networks: unset it")
    return expert


def _mean(losses: dict[str, Array], valid: Array) -> dict[str, Array]:
    """Returns the means of losses ``(N,)`` of groups or sequences with ``valid (N,)`` tokens."""
    share = valid / jnp.maximum(valid.sum(), 1)
    return {name: (value * share).sum() for name, value in losses.items()}


def gates_of(plan: routing.Plan) -> Float[Array, "G S K"]:
    """Returns the combine weight ``(G, S, K)`` of each choice; ``K`` is ``E`` if experts choose."""
    slots = plan.slots
    if not isinstance(slots, routing.Slots):
        return plan.combine.sum(-1)
    return slots.by_expert(slots.weight) if slots.gate is None else slots.gate


def taken_by(plan: routing.Plan) -> Bool[Array, "G S E"]:
    """Returns the mask ``(G, S, E)``, True if the expert took the token."""
    slots = plan.slots
    if not isinstance(slots, routing.Slots):
        return (plan.dispatch > 0).any(-1)
    if slots.expert is None:
        return slots.by_expert(slots.filled)
    experts = jnp.arange(slots.token.shape[-2])
    return (slots.expert[..., None] == experts).any(-2)
