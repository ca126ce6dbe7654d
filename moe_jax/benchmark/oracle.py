"""The layer in float32 without dispatch, and the distance of a candidate from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.benchmark.given import Problem

Values = Mapping[str, np.ndarray]
_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
}


def oracle(problem: Problem, part: str) -> Values:
    """Returns output and gradients in float32, from every expert on every token.

    Args:
        problem: Weights, tokens and routing.
        part: ``experts`` for the given routing, ``layer`` for the routing of the router's weights.

    Returns:
        The output ``y (T, M)``, and the gradients ``x``, ``up``, ``down``, ``gate`` if the experts
        are gated, and ``router`` of a layer, of its product with ``dy``.
    """
    run = functools.partial(_output, problem, part)

    def loss(x: Array, matrices: dict[str, Array]) -> tuple[Array, Array]:
        y = run(x, matrices)
        return jnp.vdot(y, problem.dy), y

    weights = problem.matrices | ({"router": problem.router} if part == "layer" else {})
    with jax.default_matmul_precision("highest"):
        grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        (dx, dmatrices), y = grad(problem.x, weights)
    return {name: np.asarray(value) for name, value in {"y": y, "x": dx, **dmatrices}.items()}


def _output(problem: Problem, part: str, x: Array, matrices: dict[str, Array]) -> Array:
    activation, weights = (
        _ACTIVATIONS[problem.shape.activation],
        _weights(problem, part, x, matrices),
    )
    matrices = {name: value for name, value in matrices.items() if name != "router"}

    @jax.checkpoint
    def add(y: Array, expert: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
        own, weight = expert
        up = x @ own["up"]
        hidden = activation(x @ own["gate"]) * up if "gate" in own else activation(up)
        return y + weight[:, None] * (hidden @ own["down"]), None

    return jax.lax.scan(add, jnp.zeros_like(x), (matrices, weights.T))[0]


def _weights(
    problem: Problem, part: str, x: Array, matrices: dict[str, Array]
) -> Float[Array, "T E"]:
    """Returns the weight ``(T, E)`` of each expert in each token, 0 if it is not chosen."""
    if part == "experts":
        gates, choices = jnp.asarray(problem.gates), jnp.asarray(problem.choices)
    else:
        logits, choices = jax.lax.top_k(x @ matrices["router"], problem.shape.k)
        gates = jax.nn.softmax(logits, axis=-1)
    chosen = choices[..., None] == jnp.arange(problem.shape.experts)
    return (chosen * gates[..., None]).sum(1)


def error(found: Values, wanted: Values) -> float:
    """Returns the largest relative error, by norm, of the arrays of a candidate.

    Args:
        found: Arrays of the candidate.
        wanted: Arrays of the oracle, which has every name of ``found``.
    """
    errors = [_relative(np.asarray(value), wanted[name]) for name, value in found.items()]
    # NaN is no small error.
    return float("inf") if any(map(np.isnan, errors)) else max(errors)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    difference = np.linalg.norm((found.astype(np.float32) - wanted).ravel())
    return float(difference / max(float(np.linalg.norm(wanted.ravel())), 1e-30))
