"""A whole implementation of dispatch: every expert computes every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.routing import Plan
from moe_jax.transport import Implementation, TransportCost
from moe_jax.transport.requirements import ALL_EXPERTS_HERE, NO_DROPOUT, NO_MASK


def everywhere(experts, tokens: jax.Array, plan: Plan, *, gate_on="out", on_outputs=None):
    """Weights the outputs of all experts, where the weight of an expert not chosen is 0."""
    del on_outputs
    groups, size, width = tokens.shape
    weight = plan.combine.sum(-1)
    x = jnp.broadcast_to(tokens.reshape(-1, width), (weight.shape[-1], groups * size, width))
    if gate_on == "in":
        x = x * weight.reshape(-1, weight.shape[-1]).T[..., None]
        weight = (weight > 0).astype(weight.dtype)
    y = experts(x).reshape(-1, groups, size, width)
    return jnp.einsum("egsm,gse->gsm", y, weight)


LINE = Implementation(
    "everywhere",
    "gspmd",
    everywhere,
    (NO_DROPOUT, NO_MASK, ALL_EXPERTS_HERE),
    TransportCost(products=True, sends="nothing"),
)
