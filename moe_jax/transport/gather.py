"""The slot table as a transport: each slot gathers its token, each token gathers its slots."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing.plan import Plan, Slots
from moe_jax.transport.requirements import SLOT_TABLE, refusal

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Gather:
    """Moves rows instead of multiplying by one-hot tensors: linear, not quadratic, in tokens."""

    def dispatch(self, x: Array, plan: Plan) -> Array:
        """Returns the expert inputs ``(G, E, C, M)`` for tokens ``x (G, S, M)``."""
        slots = slot_table(plan)
        groups, experts, capacity = slots.token.shape
        token = slots.token.reshape(groups, -1)
        if slots.place is None:
            rows = _take(x, token)
        else:
            rows = _permute(x, token, slots.place)
        return rows.reshape(groups, experts, capacity, -1)

    def combine(self, y: Array, plan: Plan) -> Array:
        """Returns the weighted sums ``(G, S, M)`` of expert outputs ``y (G, E, C, M)``."""
        groups, experts, capacity, width = y.shape
        rows = y.reshape(groups, experts * capacity, width)
        slots = slot_table(plan)
        if slots.place is None:
            weight = slots.weight.reshape(groups, -1).astype(y.dtype)
            return _scatter_add(rows * weight[..., None], slots.token, slots.num_tokens)
        return _gather_weighted(rows, slots.gate.astype(y.dtype), slots)


def slot_table(plan: Plan) -> Slots:
    """Returns the slots of a plan; raises ``ConfigError`` if they are mixtures of tokens."""
    if not isinstance(plan.slots, Slots):
        kind, instead = type(plan.slots).__name__, "transport='einsum'"
        raise refusal("transport='gather'", SLOT_TABLE.needed, "plan.slots", kind, instead)
    return plan.slots


def _take(x: Array, index: Array) -> Array:
    """Rows ``index (G, N)`` of ``x (G, R, M)``; an index past the end gives zeros."""
    take = jax.vmap(lambda rows, i: jnp.take(rows, i, axis=0, mode="fill", fill_value=0))
    return take(x, index)


def _scatter_add(rows: Array, token: Array, num_tokens: int) -> Array:
    def one(rows: Array, token: Array) -> Array:
        out = jnp.zeros((num_tokens, rows.shape[-1]), rows.dtype)
        return out.at[token.reshape(-1)].add(rows, mode="drop")

    return jax.vmap(one)(rows, token)


def _sum_of_takes(rows: Array, place: Array, gate: Array | None = None) -> Array:
    """Sums over K the rows ``place (G, S, K)`` of ``rows (G, N, M)``, weighted by ``gate``."""
    out = None
    for k in range(place.shape[-1]):
        term = _take(rows, place[..., k])
        term = term if gate is None else term * gate[..., k, None]
        out = term if out is None else out + term
    return out


# The transposes below gather through the other index map: a scatter-add costs eight gathers on CPU
# and is not deterministic on GPU.
@jax.custom_vjp
def _permute(x: Array, token: Array, place: Array) -> Array:
    return _take(x, token)


def _permute_fwd(x: Array, token: Array, place: Array):
    return _take(x, token), (token, place)


def _permute_bwd(residuals, dy: Array):
    _, place = residuals
    return _sum_of_takes(dy, place), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def _gather_weighted(rows: Array, gate: Array, slots: Slots) -> Array:
    return _sum_of_takes(rows, slots.place, gate)


def _gather_weighted_fwd(rows: Array, gate: Array, slots: Slots):
    return _sum_of_takes(rows, slots.place, gate), (rows, gate, slots)


def _gather_weighted_bwd(residuals, dy: Array):
    rows, gate, slots = residuals
    takes = [_take(rows, slots.place[..., k]) for k in range(gate.shape[-1])]
    dgate = jnp.stack([(take * dy).sum(-1) for take in takes], axis=-1)
    groups = slots.token.shape[0]
    weight = slots.weight.reshape(groups, -1, 1).astype(dy.dtype)
    drows = _take(dy, slots.token.reshape(groups, -1)) * weight
    return drows, dgate.astype(gate.dtype), None


_gather_weighted.defvjp(_gather_weighted_fwd, _gather_weighted_bwd)
