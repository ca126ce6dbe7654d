"""Dispatch by blocks: choices sorted by expert, where slots for the worst case would be many."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.parallel import on_each_device
from moe_jax.routing.plan import Plan, Slots
from moe_jax.transport.dispatch import Experts, OnOutputs
from moe_jax.transport.gather import Gather, slot_table
from moe_jax.transport.requirements import TOKENS_CHOOSE, check_no_outputs_by_slot, refusal
from moe_jax.transport.slots import dispatched

Array = jax.Array
_GATHER = Gather()
_SMALLEST, _LARGEST = 8, 512


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Each device sorts the choices of its groups into blocks of one expert, for all experts."""

    def __call__(
        self,
        experts: Experts,
        tokens: Array,
        plan: Plan,
        *,
        gate_on: str = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Array:
        """See ``Dispatch``."""
        check_no_outputs_by_slot("transport='ragged'", on_outputs)

        def here(experts: Experts, x: Array, slots: Slots) -> Array:
            with jax.named_scope("dispatch"):
                slots, owner = in_blocks(slots)
                part = dataclasses.replace(plan, slots=slots)
                tokens_in_line = x.reshape(1, -1, x.shape[-1])
                sent, part = dispatched(_GATHER, tokens_in_line, part, gate_on)
            with jax.named_scope("experts"):
                of_blocks = jax.tree.map(lambda weights: weights[owner], experts)
                done = of_blocks(sent[0])
            with jax.named_scope("combine"):
                return _GATHER.combine(done[None], part).reshape(*x.shape[:2], -1)

        return on_each_device(here, experts, tokens, slot_table(plan))


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
        needed, instead = TOKENS_CHOOSE.needed, "transport='gather'"
        raise refusal("transport='ragged'", needed, "slots.expert", None, instead)
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
