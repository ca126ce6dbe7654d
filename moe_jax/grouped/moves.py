"""Moves of rows whose gradients are moves too.

The transposes gather through the other index: a scatter-add costs as much as eight gathers on a CPU
and is not deterministic on a GPU.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def taken(rows: Float[Array, "R ..."], index: Int[Array, " N"]) -> Float[Array, "N ..."]:
    """Returns the rows ``index``; zeros for an index past the end."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def sum_of_taken(rows: Float[Array, "R ..."], place: Int[Array, "T K"]) -> Float[Array, "T ..."]:
    """Returns the sums over ``K`` of the rows ``place (T, K)``."""
    terms = (taken(rows, place[:, k]) for k in range(place.shape[1]))
    return functools.reduce(operator.add, terms)


@jax.custom_vjp
def spread(
    tokens: Float[Array, "T M"], token: Int[Array, " R"], place: Int[Array, "T K"]
) -> Float[Array, "R M"]:
    """Returns the row of each choice.

    Args:
        tokens: Tokens ``(T, M)``.
        token: Token ``(R,)`` of each row, ``T`` for none.
        place: Rows ``(T, K)`` of each token, ``R`` for none.
    """
    return taken(tokens, token)


def _spread_forward(tokens: Array, token: Array, place: Array) -> tuple[Array, Array]:
    return taken(tokens, token), place


def _spread_backward(place: Array, gradient: Array) -> tuple[Array, None, None]:
    return sum_of_taken(gradient, place), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def gathered(
    rows: Float[Array, "R M"], token: Int[Array, " R"], place: Int[Array, "T K"]
) -> Float[Array, "T M"]:
    """Returns the sum of the rows of each token, the transpose of ``spread``."""
    return sum_of_taken(rows, place)


def _gathered_forward(rows: Array, token: Array, place: Array) -> tuple[Array, Array]:
    return sum_of_taken(rows, place), token


def _gathered_backward(token: Array, gradient: Array) -> tuple[Array, None, None]:
    return taken(gradient, token), None, None


gathered.defvjp(_gathered_forward, _gathered_backward)


@jax.custom_vjp
def by_choice(
    weight: Float[Array, " R"], gate: Float[Array, "T K"], place: Int[Array, "T K"]
) -> Float[Array, " R"]:
    """Returns ``weight``, the gates in the order of the rows; its gradient goes to ``gate``."""
    return weight


def _by_choice_forward(weight: Array, gate: Array, place: Array) -> tuple[Array, Any]:
    return weight, (gate, place)


def _by_choice_backward(residuals: Any, gradient: Array) -> tuple[None, Array, None]:
    gate, place = residuals
    return None, gate_gradient(gradient, place).astype(gate.dtype), None


by_choice.defvjp(_by_choice_forward, _by_choice_backward)


def gate_gradient(gradient: Float[Array, " R"], place: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """Returns the gradient ``(T, K)`` of the gates, given the gradient ``(R,)`` of the weights."""
    return taken(gradient, place.reshape(-1)).reshape(place.shape)
