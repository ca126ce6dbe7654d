"""The networks of experts whose matrices are separate arrays, forward alone, for CPUs.

A product with a part of a stacked array first copies the part, which takes longer than the product
of a few rows. Here each product reads its matrix where it is, and experts without rows are not
read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.grouped.left import product_by_rows
from moe_jax.grouped.loop import edges
from moe_jax.grouped.moves import sum_of_taken
from moe_jax.grouped.network import Choices, GateOn, LinearMaps, Network

# A product of fewer rows takes as long.
_SMALLEST = 4
# From this mean load of an expert on, the sizes of blocks are so many multiples of this step.
_MANY, _STEPS, _STEP = 32, 4, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The rows of sorted choices, from which an expert takes blocks of one of some sizes.

    Attributes:
        tokens: Tokens ``(T, M)``.
        token: Token ``(R + size,)`` of each row; ``size`` is the largest size.
        weight: Gate ``(R + size, 1)`` of each row.
        sizes: Numbers of rows of a block in ascending order. An expert takes blocks of the last
            size. With one or two sizes, an expert whose rows fit takes one block of the first size;
            with more, the last block has the smallest size that holds the rows that are left.
    """

    tokens: Float[Array, "T M"]
    token: Int[Array, " P"]
    weight: Float[Array, "P 1"]
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tokens: Float[Array, "T M"], choices: Choices) -> Blocks:
        """Returns the rows of choices, with a block of padding after the last one."""
        count, rows = len(tokens), len(choices.token)
        sizes = block_sizes(count, rows, len(choices.sizes))
        token = jnp.pad(jnp.minimum(choices.token, count - 1), (0, sizes[-1]))
        weight = jnp.pad(choices.weight.astype(tokens.dtype), (0, sizes[-1]))[:, None]
        return cls(tokens, token, weight, sizes)

    def outputs(
        self, network: Network, own: Mapping[str, Array], first: Array, size: int, gate_on: GateOn
    ) -> Float[Array, "size N"]:
        """Returns the outputs of one expert for the block of ``size`` rows from ``first``."""
        x = self.tokens[jax.lax.dynamic_slice_in_dim(self.token, first, size)]
        # The rows of a single token are the same in every block: without a barrier XLA would move
        # their products before the loop, and read the matrices of experts without rows.
        x, first = jax.lax.optimization_barrier((x, first))
        gate = jax.lax.dynamic_slice_in_dim(self.weight, first, size)
        linear = _linear(own)
        pre = network.before(linear, x * gate if gate_on == "in" else x)
        return network.after(linear, pre, gate if gate_on == "out" else None)


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
    blocks = Blocks.of(tokens, choices)
    first = jnp.int32(0)
    shape = jax.eval_shape(
        lambda own: blocks.outputs(network, own, first, 1, gate_on), parameters[0]
    )
    found = jnp.zeros((len(blocks.token), *shape.shape[1:]), shape.dtype)
    for own, start, end in zip(parameters, *edges(choices.sizes), strict=True):
        found = with_expert(network, own, blocks, found, (start, end), gate_on)
    return sum_of_found(found, choices)


def with_expert(
    network: Network,
    own: Mapping[str, Array],
    blocks: Blocks,
    found: Float[Array, "P N"],
    edge: tuple[Int[Array, ""], Int[Array, ""]],
    gate_on: GateOn = "out",
) -> Float[Array, "P N"]:
    """Returns the outputs of all rows, of which those of one expert are new.

    Args:
        network: The two stages of an expert.
        own: Parameters of the expert by name, as those of ``on_separate``.
        blocks: The rows of all choices.
        found: Outputs ``(R + size, N)`` of the rows.
        edge: The first row of the expert, and the row after its last.
        gate_on: Gates scale the ``in``puts, the ``out``puts, or nothing.
    """
    start, end = edge
    *smaller, largest = blocks.sizes

    def outputs(first: Array, size: int) -> Array:
        return blocks.outputs(network, own, first, size, gate_on)

    def of_fitting_size(first: Array) -> Array:
        too_small = [end - first > size for size in smaller]
        # Branches that returned the outputs of all rows would copy them.
        padded = [
            lambda first, size=size: jnp.pad(outputs(first, size), ((0, largest - size), (0, 0)))
            for size in blocks.sizes
        ]
        return jax.lax.switch(sum(too_small, start=jnp.int32(0)), padded, first)

    def loop(found: Array, size: int, outputs: Callable[[Array], Array]) -> Array:
        def block(i: Array, found: Array) -> Array:
            first = start + i * size
            # The last block may reach into the rows of other experts, which may be done already.
            inside = (first + jnp.arange(size) < end)[:, None]
            old = jax.lax.dynamic_slice_in_dim(found, first, size)
            new = jnp.where(inside, outputs(first), old)
            return jax.lax.dynamic_update_slice_in_dim(found, new, first, 0)

        return jax.lax.fori_loop(0, -(-(end - start) // size), block, found)

    if len(blocks.sizes) > 2:
        return loop(found, largest, of_fitting_size)
    # Most experts have one block, for which a branch outside of the loop is faster.
    loops = [
        functools.partial(loop, size=size, outputs=functools.partial(outputs, size=size))
        for size in blocks.sizes
    ]
    if not smaller:
        return loops[0](found)
    return jax.lax.cond(end - start <= smaller[0], loops[0], loops[1], found)


def sum_of_found(found: Float[Array, "P N"], choices: Choices) -> Float[Array, "T N"]:
    """Returns the sums over the choices of each token of their rows in ``found (R + size, N)``."""
    place = choices.place
    return sum_of_taken(found, jnp.where(place < len(choices.token), place, len(found)))


def block_sizes(tokens: int, rows: int, experts: int) -> tuple[int, ...]:
    """Returns the numbers of rows of a block, in ascending order.

    With few rows per expert, a block has twice their mean load, so that few experts need a second
    block, which would read their matrices again. Most experts have at most half of its rows, and
    for them there is a second size; a block of 2 rows takes as long as one of 4. With many rows the
    time of a block grows with its rows, and several sizes bound its padding to 15 rows.
    No expert has more rows than there are tokens.

    Args:
        tokens: Number ``T`` of tokens.
        rows: Number ``R`` of rows.
        experts: Number ``E`` of experts.
    """
    mean = max(rows // experts, 1)
    if mean >= _MANY:
        return tuple(range(_STEP, min(_STEPS * _STEP, tokens + _STEP - 1) + 1, _STEP))
    size = min(1 << mean.bit_length(), tokens)
    half = size // 2
    return (half, size) if half >= _SMALLEST and mean < size else (size,)


def _linear(parameters: Mapping[str, Array]) -> LinearMaps:
    """Returns the linear maps of one expert."""

    def linear(x: Array, name: str, gate: Array | None = None) -> Array:
        x = x if gate is None else x * gate
        y = product_by_rows(parameters[name], x)
        bias = parameters.get(f"{name}_bias")
        if bias is None:
            return y
        return y + (bias if gate is None else bias * gate)

    return linear
