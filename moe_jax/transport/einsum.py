"""The papers' transport: dispatch and combine as matrix products with one-hot tensors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.precision import exact
from moe_jax.routing.plan import Plan

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Einsum:
    """GShard's einsum form (Lepikhin et al. 2020, section 3.2), the reference of all others.

    The products read every bit of a float32 token, as transports do that move it.
    """

    def dispatch(self, x: Array, plan: Plan) -> Array:
        """Returns the expert inputs ``(G, E, C, M)`` for tokens ``x (G, S, M)``."""
        moved = plan.dispatch.astype(x.dtype)
        return jnp.einsum("gsec,gsm->gecm", moved, x, precision=exact(x.dtype))

    def combine(self, y: Array, plan: Plan) -> Array:
        """Returns the weighted sums ``(G, S, M)`` of expert outputs ``y (G, E, C, M)``."""
        weights = plan.combine.astype(y.dtype)
        return jnp.einsum("gsec,gecm->gsm", weights, y, precision=exact(y.dtype))
