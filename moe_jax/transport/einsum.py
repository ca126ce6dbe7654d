"""The transport of the papers: dispatch and combine are products with one-hot tensors."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.precision import exact
from moe_jax.routing.plan import Plan


@dataclasses.dataclass(frozen=True)
class Einsum:
    """GShard's einsum form (2006.16668, section 3.2), the reference for all other transports.

    The products read every bit of a float32 token, so their result equals a copy of the token.
    """

    def dispatch(self, x: Float[Array, "G S M"], plan: Plan) -> Float[Array, "G E C M"]:
        """Returns the expert inputs ``(G, E, C, M)`` for tokens ``x (G, S, M)``."""
        moved = plan.dispatch.astype(x.dtype)
        return jnp.einsum("gsec,gsm->gecm", moved, x, precision=exact(x.dtype))

    def combine(self, y: Float[Array, "G E C M"], plan: Plan) -> Float[Array, "G S M"]:
        """Returns the weighted sums ``(G, S, M)`` of expert outputs ``y (G, E, C, M)``."""
        weights = plan.combine.astype(y.dtype)
        return jnp.einsum("gsec,gecm->gsm", weights, y, precision=exact(y.dtype))
