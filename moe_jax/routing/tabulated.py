"""A router that reads the experts and gates of common tokens from a table of token ids."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.router import Router
from moe_jax.routing.select import Selection, TokenChoice

# Names of the table's arrays (V, K) in the state of the router.
EXPERTS, GATES = "table_experts", "table_gates"


@dataclasses.dataclass(frozen=True)
class TabulatedRouter(Router):
    """A router whose state has a table; tokens that the table lacks are routed as before."""

    def selected(self, scored: Scored, inputs: Inputs) -> Selection:
        """Returns the choices of one group, those of the table for its tokens."""
        chosen = super().selected(scored, inputs)
        assert isinstance(chosen, TokenChoice)  # ``tabulated`` rejects other selections.
        ids = inputs.needs_token_ids("a table of token ids")
        rows = inputs.state[EXPERTS][ids], inputs.state[GATES][ids]
        return from_table(chosen, *rows, inputs.valid)


def tabulated(router: Router) -> TabulatedRouter:
    """Returns the router that reads a table.

    Raises:
        ConfigError: If experts choose tokens, or the router has free experts.
    """
    if router.experts_choose or router.free.count:
        raise ConfigError(
            "a table of token ids needs tokens that choose among experts with computation: use a "
            "router without free experts in which tokens choose"
        )
    parts = {field.name: getattr(router, field.name) for field in dataclasses.fields(Router)}
    return TabulatedRouter(**parts)


def from_table(
    chosen: TokenChoice,
    experts: Int[Array, "S K"],
    gates: Float[Array, "S K"],
    valid: Bool[Array, " S"],
) -> TokenChoice:
    """Returns the choices of the table where it has the token, and other choices as they are.

    Args:
        chosen: Choices of the router.
        experts: Experts ``(S, K)`` of the table; a first expert of -1 marks a missing token.
        gates: Combine weights ``(S, K)``; a choice of weight 0 takes no slot.
        valid: Mask ``(S,)``, False for padding.
    """
    known = experts[:, :1] >= 0
    gates = gates.astype(chosen.gate.dtype)
    wanted = valid[:, None] & (gates > 0)
    log_gates = jnp.log(jnp.maximum(gates, jnp.finfo(gates.dtype).tiny))

    def taken(ours: Array, theirs: Array) -> Array:
        return jnp.where(known, ours, theirs)

    return TokenChoice(
        taken(experts.astype(chosen.expert.dtype), chosen.expert),
        taken(gates, chosen.gate),
        taken(wanted, chosen.wanted),
        taken(wanted, chosen.queued),
        taken(log_gates.astype(chosen.log_gate.dtype), chosen.log_gate),
    )
