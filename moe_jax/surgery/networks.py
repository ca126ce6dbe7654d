"""Dense feed-forward networks as arrays, which are added up, projected, gated and widened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from moe_jax.precision import wide_einsum
from moe_jax.surgery.mixture import UNITS

Network = Mapping[str, Array]
"""Parameters of a network: ``up (M, F)``, ``gate (M, F)`` if gated, ``down (F, M)``, biases."""
INPUTS = ("up", "gate")


def side_by_side(experts: Network, gates: Float[np.ndarray, " G"]) -> dict[str, Array]:
    """Returns a dense network that adds up experts with constant gates.

    Args:
        experts: Parameters ``(G, ...)`` by name, such as ``up (G, M, F)``.
        gates: Gate of each expert.

    Returns:
        The parameters by name, such as ``up (M, G * F)``.
    """
    network = {}
    for name, array in experts.items():
        if name.startswith("down"):
            array = array * jnp.asarray(gates, array.dtype)[:, None, None]
        joined = jnp.concatenate(list(array), UNITS[name]) if name in UNITS else array.sum(0)
        network[name] = joined[0] if name.endswith("_bias") else joined
    return network


def added(networks: Sequence[Network]) -> dict[str, Array]:
    """Returns the network that computes the sum of networks of the same kind.

    Args:
        networks: At least one network; the networks have the same names and width ``M``.
    """
    return {
        name: jnp.concatenate([one[name] for one in networks], axis=UNITS[name])
        if name in UNITS
        else sum((one[name] for one in networks[1:]), networks[0][name])
        for name in networks[0]
    }


def scaled(
    network: Network, inputs: float | Float[Array, " M"], outputs: float | Float[Array, " M"]
) -> dict[str, Array]:
    """Returns the network that multiplies its inputs and its outputs by factors.

    Args:
        network: Network of width ``M``.
        inputs: Factor of all inputs, or of each.
        outputs: Factor of all outputs, or of each.
    """
    before, after = (jnp.asarray(factor, jnp.float32) for factor in (inputs, outputs))
    found = dict(network)
    found |= {name: network[name] * before[..., None] for name in INPUTS if name in network}
    return found | {n: a * after for n, a in network.items() if n.startswith("down")}


def projected(
    network: Network, down: Float[Array, "M R"], up: Float[Array, "R M"]
) -> dict[str, Array]:
    """Returns the network of width ``M`` that computes a network between two projections.

    Args:
        network: Network of width ``R``.
        down: Projection of the network's inputs.
        up: Projection of the network's outputs.
    """
    found = dict(network)
    for name in INPUTS:
        if name in network:
            found[name] = wide_einsum("mr,rf->mf", down, network[name])
    found["down"] = wide_einsum("fr,rm->fm", network["down"], up)
    if "down_bias" in network:
        found["down_bias"] = wide_einsum("r,rm->m", network["down_bias"], up)
    return found


def gated(network: Network, up_offset: float) -> dict[str, Array]:
    """Returns the gated network with biases that computes a network; a gated one gets biases.

    The hidden units without a gate become the gates of a linear factor that is 1 for every token.

    Args:
        network: Network with or without gate and biases.
        up_offset: ``FeedForwardConfig.up_offset``, which the linear factor contains.
    """
    hidden, width = network["down"].shape
    zeros = {n: jnp.zeros(hidden, jnp.float32) for n in ("up_bias", "gate_bias")}
    found = {**zeros, "down_bias": jnp.zeros(width, jnp.float32), **network}
    if "gate" in network:
        return found
    found |= {"gate": found["up"], "gate_bias": found["up_bias"]}
    one = jnp.full(hidden, 1 - up_offset, jnp.float32)
    return found | {"up": jnp.zeros_like(found["up"]), "up_bias": one}


def widened(network: Network, hidden: int, key: PRNGKeyArray) -> dict[str, Array]:
    """Returns the network with more hidden units, which computes the same function.

    The input weights of new units have the deviation of the old input weights, and their output
    weights are zero, as in ``moe_jax.surgery.grow.widened``.

    Args:
        network: Network of at most ``hidden`` units.
        hidden: Hidden width ``F`` of the new network.
        key: Random key of the new units.
    """
    units = hidden - network["down"].shape[0]
    new = {}
    for index, name in enumerate(name for name in UNITS if name in network):
        array = network[name]
        shape = list(array.shape)
        shape[UNITS[name]] = units
        draw = jax.random.normal(jax.random.fold_in(key, index), shape, array.dtype)
        new[name] = draw * (array.std() if name in INPUTS else 0)
    return added([network, {**{n: jnp.zeros_like(a) for n, a in network.items()}, **new}])
