"""The networks of experts whose matrices are separate arrays, forward alone, for CPUs.

A product with a part of a stacked array first copies the part, which takes longer than the product
of a few rows. Here each product reads its matrix where it is, and experts without rows are not
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.grouped.loop import edges
from moe_jax.grouped.moves import sum_of_taken
from moe_jax.grouped.network import Choices, GateOn, LinearMaps, Network
from moe_jax.precision import exact

_LARGEST = 512


def on_separate(
    network: Network,
    parameters: Sequence[Mapping[str, Array]],
    tokens: Float[Array, "T M"],
    choices: Choices,
    gate_on: GateOn = "out",
) -> Float[Array, "T N"]:
    """Returns for each token the sum of its experts' outputs, as ``on_choices`` does.

    Args:
        network: The two stages of an expert.
        parameters: Parameters of each expert by name, in the type of the tokens: matrices
            ``name (N, M)``, which map ``M`` features to ``N``, and biases ``name_bias (N,)``.
        tokens: Tokens ``(T, M)``.
        choices: The choices in the order of their experts.
        gate_on: Gates scale the ``in``puts, the ``out``puts, or nothing.
    """
    count, rows = len(tokens), len(choices.token)
    size = block_size(count, rows, len(parameters))
    token = jnp.pad(jnp.minimum(choices.token, count - 1), (0, size))
    weight = jnp.pad(choices.weight.astype(tokens.dtype), (0, size))[:, None]

    def outputs(own: Mapping[str, Array], first: Array) -> Array:
        x = tokens[jax.lax.dynamic_slice_in_dim(token, first, size)]
        gate = jax.lax.dynamic_slice_in_dim(weight, first, size)
        linear = _linear(own)
        pre = network.before(linear, x * gate if gate_on == "in" else x)
        return network.after(linear, pre, gate if gate_on == "out" else None)

    shape = jax.eval_shape(outputs, parameters[0], jnp.int32(0))
    found = jnp.zeros((rows + size, *shape.shape[1:]), shape.dtype)
    for own, start, end in zip(parameters, *edges(choices.sizes), strict=True):

        def block(i: Array, found: Array, own: Any = own, start: Array = start) -> Array:
            first = start + i * size
            # A block may reach into the rows of the next expert, which that expert overwrites.
            return jax.lax.dynamic_update_slice_in_dim(found, outputs(own, first), first, 0)

        found = jax.lax.fori_loop(0, -(-(end - start) // size), block, found)
    return sum_of_taken(found, jnp.where(choices.place < rows, choices.place, rows + size))


def block_size(tokens: int, rows: int, experts: int) -> int:
    """Returns the number of rows of a block: twice an expert's mean load, as a power of two.

    An expert with more rows needs a second block, which reads its matrices again. No expert has
    more rows than there are tokens.

    Args:
        tokens: Number ``T`` of tokens.
        rows: Number ``R`` of rows.
        experts: Number ``E`` of experts.
    """
    twice = 2 * max(rows // experts, 1)
    return min(1 << (twice.bit_length() - 1), _LARGEST, tokens)


def _linear(parameters: Mapping[str, Array]) -> LinearMaps:
    """Returns the linear maps of one expert."""

    def linear(x: Array, name: str, gate: Array | None = None) -> Array:
        x = x if gate is None else x * gate
        y = jnp.einsum("rm,nm->rn", x, parameters[name], precision=exact(x.dtype))
        bias = parameters.get(f"{name}_bias")
        if bias is None:
            return y
        return y + (bias if gate is None else bias * gate)

    return linear
