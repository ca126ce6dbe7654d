"""A router that also sums the shares of the top scores, for the log of a run."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.router import Router
from moe_jax.routing.select import Selection

# Name of the observed sum of the shares of the top scores over the valid tokens.
TOP_SCORE = "top_score"


@dataclasses.dataclass(frozen=True)
class ObservingRouter(Router):
    """A router with the same plans, whose counts also have the sum ``TOP_SCORE``."""

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns the sums of the router's parts, and the sum of the shares of the top scores."""
        shares = jnp.where(inputs.valid, top_share(scored.log_clean), 0)
        return super().observe(scored, selection, inputs) | {TOP_SCORE: shares.sum()}


def observing(router: Router) -> ObservingRouter:
    """Returns the router that makes the same plans and sums the shares of the top scores."""
    parts = {field.name: getattr(router, field.name) for field in dataclasses.fields(Router)}
    return ObservingRouter(**parts)


def top_share(log_scores: Float[Array, "S E"]) -> Float[Array, " S"]:
    """Returns the largest score of each token as a share of the sum of its scores.

    The share is between ``1 / E`` for equal scores and 1 for one score above zero.

    Args:
        log_scores: Finite logarithm ``(S, E)`` of the scores.
    """
    wide = log_scores.astype(jnp.promote_types(log_scores.dtype, jnp.float32))
    return 1 / jnp.exp(wide - wide.max(-1, keepdims=True)).sum(-1)
