"""Biases per expert that rank the experts and even out their load, without a loss."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ranges import Chance, Natural, NonNegative, Offset, PositiveShare
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import NOTHING
from moe_jax.routing.select.histogram import Edges, counts_above, cut, widening_edges
from moe_jax.routing.select.rank import Rank


class Biased:
    """The ranking by the score plus a bias, which is state: a rank moves it after each step."""

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of ``bias (E,)``."""
        return {"bias": (num_experts,)}

    def __call__(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the scores plus the bias."""
        who = f"a {type(self).__name__} rank"
        bias = inputs.needs_state("bias", who, "(E,) zeros at the start")
        return jax.lax.stop_gradient(scored.scores + bias)

    @abc.abstractmethod
    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the bias after a step."""


@dataclasses.dataclass(frozen=True)
class Bias(Biased, Rank):
    """The score plus a bias that rises for experts with too few tokens (Loss-Free Balancing).

    Wang et al. 2024 (2408.15664) and DeepSeek-V3 (2412.19437, section 2.1.2) define the bias. It is
    state, not a parameter: each step adds ``rate`` times the error of the expert's load.

    Attributes:
        rate: Update rate (``u`` or ``gamma`` in the papers).
        rule: Error of the load: the ``sign`` of mean load minus load, this sign minus its mean over
            the experts (``centred``, torchtitan: the mean of the biases stays 0), or the
            difference divided by the mean load (``proportional``).
    """

    rate: NonNegative = 1e-3
    rule: Literal["sign", "proportional", "centred"] = "sign"

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the bias after a step."""
        del observed
        step = relative_error(demand)
        if self.rule != "proportional":
            step = jnp.sign(step)
        if self.rule == "centred":
            step = step - step.mean(-1, keepdims=True)
        return state | {"bias": state["bias"] + self.rate * step}


def relative_error(demand: Float[Array, "*layers E"]) -> Float[Array, "*layers E"]:
    """Returns the mean load minus the load ``(..., E)``, relative to a mean of at least 1."""
    mean = demand.mean(-1, keepdims=True)
    return (mean - demand) / jnp.maximum(mean, 1)


@dataclasses.dataclass(frozen=True)
class ComputeBias(Biased, Rank):
    """The score plus a bias that keeps the share of choices with computation (LongCat-Flash).

    LongCat-Flash (2509.01322, section 2.1) adds to the bias of each of the ``N`` experts with
    computation ``rate`` times the difference of its share ``compute / N`` of all choices and its
    actual share. The biases of the free experts, the last ones, stay 0.

    Attributes:
        rate: Update rate.
        free: Number of free experts.
        compute: Share of a token's choices that are experts with computation, ``K_e / K``.
        offset: Constant that is added to the scores of the free experts (ZAYA1: -1).
    """

    rate: NonNegative = 1e-3
    free: Natural = 0
    compute: PositiveShare = 1.0
    offset: Offset = 0.0

    def __call__(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the scores plus the bias, and plus the offset of free experts."""
        biased = super().__call__(scored, inputs)
        experts = biased.shape[1]
        return biased + jnp.where(jnp.arange(experts) < experts - self.free, 0, self.offset)

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the bias after a step."""
        del observed
        computing = demand.shape[-1] - self.free
        total = demand.sum(-1, keepdims=True)
        step = self.compute / computing - demand / jnp.maximum(total, 1)
        step = jnp.where((jnp.arange(demand.shape[-1]) < computing) & (total > 0), step, 0)
        return state | {"bias": state["bias"] + self.rate * step}


@dataclasses.dataclass(frozen=True)
class PIBias(Biased, Rank):
    """The score plus a bias from a proportional-integral controller of the load.

    The bias is ``gain`` times the relative error of the last step's load, plus ``rate`` times the
    sum of the errors of all steps. ``Bias`` with the rule ``proportional`` is the integral alone;
    the proportional term damps its oscillation.

    Attributes:
        rate: Factor of the integral.
        gain: Factor of the last error.
    """

    rate: NonNegative = 1e-3
    gain: NonNegative = 1e-2

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of ``bias (E,)`` and of ``integral (E,)``."""
        return {"bias": (num_experts,), "integral": (num_experts,)}

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the bias after a step."""
        del observed
        error = relative_error(demand)
        integral = state["integral"] + self.rate * error
        return state | {"integral": integral, "bias": integral + self.gain * error}


@dataclasses.dataclass(frozen=True)
class QuantileBias(Biased, Rank):
    """The score plus the bias under which each expert would have had its even share of tokens.

    Quantile balancing (Megatron-LM's ``qb_dual_update``) reads the scores: the margin of a token
    for an expert is its score minus the (K + 1)-th best biased score of the token. The new bias of
    an expert is minus the margin that an even share of all tokens exceeds. The quantile is read
    from a histogram of the margins around the current bias (as in Kimi K3), whose counts add up
    over devices. Its bins widen with the distance, so that the error of the new bias is a share of
    its change, and vanishes as the bias settles.

    Attributes:
        decay: Share of the old bias in the new one; 0 takes the quantile of the last step.
        edges: Edges of the bins.
    """

    decay: Chance = 0.0
    edges: Edges = 128

    def observe(self, scored: Scored, k: int, inputs: Inputs) -> dict[str, Array]:
        """Returns ``margins (E, B)``, the tokens above each edge, and their number ``tokens``."""
        biased = self(scored, inputs)
        num_experts = biased.shape[1]
        last = jax.lax.top_k(biased, min(k + 1, num_experts))[0][:, -1:]
        # The distance of the margin to minus the current bias.
        distance = biased - last
        above = counts_above(distance, inputs.valid, widening_edges(self.edges))
        return {"margins": above, "tokens": inputs.tokens}

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the bias after a step."""
        share = demand.mean(-1, keepdims=True)
        edges = widening_edges(self.edges)
        distance = cut(observed["margins"], share, observed["tokens"], edges)
        return state | {"bias": state["bias"] - (1 - self.decay) * distance}
