"""The networks of all experts in one loop over blocks of rows, for CPUs.

A block stays in the cache from its tokens to its outputs: the rows of the choices, the hidden layer
and their gradients never exist as a whole. Blocks are computed in the order of their rows. The last
block of an expert may reach into the rows of the next expert, which that expert then overwrites.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.grouped.left import block_product
from moe_jax.grouped.loop import block_sizes, edges, over_blocks
from moe_jax.grouped.moves import gate_gradient, sum_of_taken

_Parameters = dict[str, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_choices(
    network: Any,
    gate_on: str,
    parameters: _Parameters,
    tokens: Float[Array, "T M"],
    gate: Float[Array, "T K"],
    index: tuple[Array, Array, Array, Array],
) -> Float[Array, "T N"]:
    """Returns the sums of the experts' outputs; see ``moe_jax.grouped.network.on_choices``.

    Args:
        network: The two stages of an expert.
        gate_on: ``in``, ``out`` or ``none``.
        parameters: Parameters of all experts.
        tokens: Tokens ``(T, M)``.
        gate: Gates ``(T, K)``.
        index: The fields of ``Choices``: token, weight, place and sizes.
    """
    return _forward(network, gate_on, parameters, tokens, index, keep=False)[0]


def _linear(parameters: _Parameters) -> Callable[..., Array]:
    """Returns the linear maps of one expert."""

    def linear(x: Array, name: str, gate: Array | None = None) -> Array:
        x = x if gate is None else x * gate
        y = block_product(x, parameters[name])
        bias = parameters.get(f"{name}_bias")
        if bias is None:
            return y
        return y + (bias if gate is None else bias * gate)

    return linear


def _stages(network: Any, gate_on: str) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """Returns both stages as functions of parameters, rows and their gates ``(R, 1)``."""

    def before(parameters: _Parameters, x: Array, gate: Array) -> Any:
        return network.before(_linear(parameters), x * gate if gate_on == "in" else x)

    def after(parameters: _Parameters, pre: Any, gate: Array) -> Array:
        return network.after(_linear(parameters), pre, gate if gate_on == "out" else None)

    return before, after


def _padded(index: tuple[Array, ...], tokens: int) -> tuple[tuple[int, int], Array, Array, Array]:
    """Returns the sizes of blocks, and tokens, gates and places with room for a block at the end.

    A row without a choice reads the last token, and no token reads its output.
    """
    token, weight, place, sizes = index
    rows = token.shape[0]
    blocks = block_sizes(max(rows, 1), sizes.size)
    token = jnp.pad(jnp.minimum(token, tokens - 1), (0, blocks[0]))
    weight = jnp.pad(weight, (0, blocks[0]))[:, None]
    return blocks, token, weight, jnp.where(place < rows, place, rows + blocks[0])


def _slice(array: Array, first: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, first, size)


def _update(array: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), first, 0)


def _at(tokens: Array, index: Array) -> Array:
    return tokens.at[index].get(mode="promise_in_bounds")


def _forward(
    network: Any,
    gate_on: str,
    parameters: _Parameters,
    tokens: Array,
    index: tuple[Array, ...],
    keep: bool,
) -> tuple[Array, Any]:
    """Returns the sums, and the pre-activations of all rows if ``keep``."""
    blocks, token, weight, place = _padded(index, tokens.shape[0])
    before, after = _stages(network, gate_on)

    def rows_of(own: _Parameters, first: Array, size: int) -> tuple[Array, Any]:
        gate = _slice(weight, first, size)
        pre = before(own, _at(tokens, _slice(token, first, size)), gate)
        return after(own, pre, gate), pre if keep else ()

    def one(carried: Any, expert: tuple[_Parameters, Array, Array]) -> tuple[Any, None]:
        own, start, end = expert

        def block(carried: Any, first: Array, size: int, whole: bool) -> Any:
            del whole
            found = rows_of(own, first, size)
            return jax.tree.map(lambda all_, rows: _update(all_, rows, first), carried, found)

        return over_blocks(block, carried, blocks, start, end), None

    first = jax.tree.map(lambda matrices: matrices[0], parameters)
    shapes = jax.eval_shape(lambda own: rows_of(own, jnp.int32(0), 1), first)
    empty = jax.tree.map(lambda x: jnp.zeros((len(token), *x.shape[1:]), x.dtype), shapes)
    rows, pre = jax.lax.scan(one, empty, (parameters, *edges(index[3])))[0]
    return sum_of_taken(rows, place), pre


def _kept_forward(
    network: Any,
    gate_on: str,
    parameters: _Parameters,
    tokens: Array,
    gate: Array,
    index: tuple[Array, ...],
) -> tuple[Array, Any]:
    sums, pre = _forward(network, gate_on, parameters, tokens, index, keep=True)
    return sums, (parameters, tokens, gate, index, pre)


def _backward(
    network: Any, gate_on: str, residuals: Any, gradient: Array
) -> tuple[_Parameters, Array, Array, None]:
    parameters, tokens, gate, index, pre = residuals
    blocks, token, weight, place = _padded(index, tokens.shape[0])
    before, after = _stages(network, gate_on)
    wide = jnp.promote_types(tokens.dtype, jnp.float32)

    def one(carried: Any, expert: tuple[_Parameters, Array, Array]) -> tuple[Any, _Parameters]:
        own, start, end = expert

        def block(carried: Any, first: Array, size: int, whole: bool) -> Any:
            (of_rows, of_weights), sums = carried
            from_token = _slice(token, first, size)
            dy, own_gate = _at(gradient, from_token), _slice(weight, first, size)
            if not whole:
                dy = jnp.where(first + jnp.arange(size)[:, None] < end, dy, 0)
            kept = jax.tree.map(lambda rows: _slice(rows, first, size), pre)
            _, pull = jax.vjp(after, own, kept, own_gate)
            later, dpre, gate_after = pull(dy)
            _, pull = jax.vjp(before, own, _at(tokens, from_token), own_gate)
            earlier, dx, gate_before = pull(dpre)
            add = functools.partial(jax.tree.map, lambda s, a, b: s + a.astype(wide) + b)
            moved = (
                _update(of_rows, dx, first),
                _update(of_weights, gate_after + gate_before, first),
            )
            return moved, add(sums, later, earlier)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), own)
        carried, sums = over_blocks(block, (carried, zeros), blocks, start, end)
        return carried, jax.tree.map(lambda total, x: total.astype(x.dtype), sums, own)

    empty = (jnp.zeros((len(token), tokens.shape[1]), tokens.dtype), jnp.zeros_like(weight))
    (of_rows, of_weights), sums = jax.lax.scan(one, empty, (parameters, *edges(index[3])))
    dgate = gate_gradient(of_weights[:, 0], place).astype(gate.dtype)
    return sums, sum_of_taken(of_rows, place), dgate, None


on_choices.defvjp(_kept_forward, _backward)
