"""The slot table as a transport: each slot gathers its token, each token gathers its slots."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.plan import Plan, Slots
from moe_jax.transport.requirements import SLOT_TABLE, refusal


@dataclasses.dataclass(frozen=True)
class Gather:
    """Moves rows instead of multiplying by one-hot tensors; the cost is linear in tokens."""

    def dispatch(self, x: Float[Array, "G S M"], plan: Plan) -> Float[Array, "G E C M"]:
        """Returns the expert inputs ``(G, E, C, M)`` for tokens ``x (G, S, M)``."""
        slots = slot_table(plan)
        groups, experts, capacity = slots.token.shape
        token = slots.token.reshape(groups, -1)
        if slots.place is None:
            rows = _take(x, token)
        else:
            rows = _permute(x, token, slots.place)
        return rows.reshape(groups, experts, capacity, -1)

    def combine(self, y: Float[Array, "G E C M"], plan: Plan) -> Float[Array, "G S M"]:
        """Returns the weighted sums ``(G, S, M)`` of expert outputs ``y (G, E, C, M)``."""
        groups, experts, capacity, width = y.shape
        rows = y.reshape(groups, experts * capacity, width)
        slots = slot_table(plan)
        if slots.place is None or slots.gate is None:
            weight = slots.weight.reshape(groups, -1).astype(y.dtype)
            return _scatter_add(rows * weight[..., None], slots.token, slots.num_tokens)
        gate, index = slots.gate.astype(y.dtype), (slots.place, slots.token, slots.weight)
        return _gather_weighted(rows, gate, index)


def slot_table(plan: Plan) -> Slots:
    """Returns the slots of a plan.

    Raises:
        ConfigError: If the slots are mixtures of tokens.
    """
    if not isinstance(plan.slots, Slots):
        kind, instead = type(plan.slots).__name__, "transport='einsum'"
        raise refusal("transport='gather'", SLOT_TABLE.needed, "plan.slots", kind, instead)
    return plan.slots


def _take(x: Float[Array, "G R M"], index: Int[Array, "G N"]) -> Float[Array, "G N M"]:
    """Returns the rows ``index (G, N)`` of ``x (G, R, M)``; zeros for an index past the end."""
    take = jax.vmap(lambda rows, i: jnp.take(rows, i, axis=0, mode="fill", fill_value=0))
    return take(x, index)


def _scatter_add(
    rows: Float[Array, "G N M"], token: Int[Array, "G E C"], num_tokens: int
) -> Float[Array, "G S M"]:
    """Returns for each token the sum of the rows of its slots."""

    def one(rows: Array, token: Array) -> Array:
        out = jnp.zeros((num_tokens, rows.shape[-1]), rows.dtype)
        return out.at[token.reshape(-1)].add(rows, mode="drop")

    return jax.vmap(one)(rows, token)


def _sum_of_takes(
    rows: Float[Array, "G N M"],
    place: Int[Array, "G S K"],
    gate: Float[Array, "G S K"] | None = None,
) -> Float[Array, "G S M"]:
    """Returns sums over K of the rows ``place (G, S, K)`` of ``rows (G, N, M)`` times ``gate``."""

    def term(k: int) -> Array:
        taken = _take(rows, place[..., k])
        return taken if gate is None else taken * gate[..., k, None]

    return functools.reduce(operator.add, map(term, range(place.shape[-1])))


# The transposes below gather through the other index map: a scatter-add costs as much as eight
# gathers on CPU and is not deterministic on GPU.
@jax.custom_vjp
def _permute(x: Array, token: Array, place: Array) -> Array:
    return _take(x, token)


def _permute_fwd(x: Array, token: Array, place: Array) -> tuple[Array, Any]:
    return _take(x, token), (token, place)


def _permute_bwd(residuals: Any, dy: Array) -> tuple[Array, None, None]:
    _, place = residuals
    return _sum_of_takes(dy, place), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


# The fields ``place``, ``token`` and ``weight`` of ``Slots``.
_Index = tuple[Array, Array, Array]


@jax.custom_vjp
def _gather_weighted(rows: Array, gate: Array, index: _Index) -> Array:
    return _sum_of_takes(rows, index[0], gate)


def _gather_weighted_fwd(rows: Array, gate: Array, index: _Index) -> tuple[Array, Any]:
    return _sum_of_takes(rows, index[0], gate), (rows, gate, index)


def _gather_weighted_bwd(residuals: Any, dy: Array) -> tuple[Array, Array, None]:
    rows, gate, (place, token, weight) = residuals
    takes = [_take(rows, place[..., k]) for k in range(gate.shape[-1])]
    dgate = jnp.stack([(take * dy).sum(-1) for take in takes], axis=-1)
    groups = token.shape[0]
    weight = weight.reshape(groups, -1, 1).astype(dy.dtype)
    drows = _take(dy, token.reshape(groups, -1)) * weight
    return drows, dgate.astype(gate.dtype), None


_gather_weighted.defvjp(_gather_weighted_fwd, _gather_weighted_bwd)
