"""Choices sorted by expert and laid into blocks, where slots for the worst case would be many."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.routing.plan import Slots

Array = jax.Array
_SMALLEST, _LARGEST = 8, 512


def block_size(choices: int, experts: int) -> int:
    """Returns the rows ``R`` of a block: as many as an expert gets on average, a power of two.

    Smaller blocks pad less, larger ones read an expert's weights less often; with these at most
    twice as many rows are computed as there are choices, and an expert's weights read twice.
    """
    even = max(choices // experts, 1)
    return min(max(1 << (even.bit_length() - 1), _SMALLEST), _LARGEST)


def in_blocks(slots: Slots) -> tuple[Slots, Array]:
    """Lays the choices of all groups into blocks of one expert each.

    Nothing is dropped that has a slot, however the tokens are spread: ``E`` experts leave at most
    one block each partly empty (MegaBlocks, Gale et al. 2022, 2211.15841, in dense blocks).

    Args:
        slots: of ``G`` groups of ``S`` tokens that choose ``K`` experts each, ``E`` in all.

    Returns:
        The slots of one group of ``G S`` tokens whose ``N`` experts are blocks with ``R`` slots
        each, ``R = block_size(G S K, E)`` and ``N = G S K // R + E``, and the expert ``(N,)`` of
        each block.

    Raises:
        ConfigError: if the experts chose.
    """
    if slots.expert is None:
        raise ConfigError("transport 'ragged' sorts the choices of tokens: here the experts chose")
    experts, (groups, size, k) = slots.token.shape[1], slots.expert.shape
    choices, block = slots.expert.size, block_size(slots.expert.size, experts)
    number = choices // block + experts

    # A choice without a slot stands behind all experts.
    expert = jnp.where(slots.expert >= 0, slots.expert, experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    count = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    blocks = -(-count // block)
    ends = jnp.cumsum(blocks)
    # Where an expert's rows begin, less how many choices are sorted before its own.
    shift = (ends - blocks) * block - (jnp.cumsum(count) - count)
    there = expert[order]
    row = jnp.take(shift, there, mode="clip") + jnp.arange(choices)
    row = jnp.where(there < experts, row, number * block).astype(jnp.int32)

    place = jnp.zeros(choices, jnp.int32).at[order].set(row)
    token = jnp.full(number * block, groups * size, jnp.int32)
    token = token.at[row].set((order // k).astype(jnp.int32), mode="drop")
    gate = slots.gate.reshape(-1)
    weight = jnp.zeros(number * block, gate.dtype).at[row].set(gate[order], mode="drop")
    laid = Slots(
        token.reshape(1, number, block),
        weight.reshape(1, number, block),
        *(x.reshape(1, groups * size, k) for x in (place, gate, slots.expert)),
        groups * size,
    )
    owner = (ends <= jnp.arange(number)[:, None]).sum(1)
    return laid, jnp.minimum(owner, experts - 1)
