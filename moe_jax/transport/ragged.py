"""Dispatch by blocks: choices are sorted by expert, so no slots for the worst case are needed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel import on_each_device
from moe_jax.routing.plan import Plan, Slots
from moe_jax.transport.dispatch import Experts, OnOutputs
from moe_jax.transport.gather import Gather, slot_table
from moe_jax.transport.requirements import TOKENS_CHOOSE, check_no_outputs_by_slot, refusal
from moe_jax.transport.slots import dispatched

_GATHER = Gather()
_SMALLEST, _LARGEST = 8, 512


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Each device sorts the choices of its groups into blocks of one expert, for all experts."""

    def __call__(
        self,
        experts: Experts,
        tokens: Float[Array, "G S M"],
        plan: Plan,
        *,
        gate_on: str = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Float[Array, "G S N"]:
        """Returns the tokens' outputs; see ``Dispatch``."""
        check_no_outputs_by_slot("transport='ragged'", on_outputs)

        def here(experts: Experts, x: Array, slots: Slots) -> Array:
            with jax.named_scope("dispatch"):
                slots, owner = in_blocks(slots)
                part = dataclasses.replace(plan, slots=slots)
                tokens_in_line = x.reshape(1, -1, x.shape[-1])
                sent, part = dispatched(_GATHER, tokens_in_line, part, gate_on)
            with jax.named_scope("experts"):
                of_blocks = jax.tree.map(lambda weights: weights[owner], experts)
                outputs = of_blocks(sent[0])
            with jax.named_scope("combine"):
                return _GATHER.combine(outputs[None], part).reshape(*x.shape[:2], -1)

        return on_each_device(here, experts, tokens, slot_table(plan))


def block_size(choices: int, experts: int) -> int:
    """Returns the number ``R`` of rows of a block: an expert's mean load as a power of two.

    Small blocks need less padding, and large blocks read an expert's weights less often. At this
    size the experts compute at most two rows per choice and read their weights at most twice.
    """
    even = max(choices // experts, 1)
    return min(max(1 << (even.bit_length() - 1), _SMALLEST), _LARGEST)


def in_blocks(slots: Slots) -> tuple[Slots, Int[Array, " N"]]:
    """Sorts the choices of all groups into blocks, each of one expert.

    Every choice with a slot keeps one, whatever the load: each of the ``E`` experts leaves at most
    one block partly empty (MegaBlocks, 2211.15841, with dense blocks).

    Args:
        slots: Slots of ``G`` groups of ``S`` tokens that choose ``K`` of ``E`` experts each.

    Returns:
        The slots of one group of ``G S`` tokens, whose ``N`` experts are blocks with ``R`` slots
        each, and the expert ``(N,)`` of each block. ``R`` is ``block_size(G S K, E)`` and ``N`` is
        ``G S K // R + E``.

    Raises:
        ConfigError: If the experts chose the tokens.
    """
    if slots.expert is None or slots.gate is None:
        needed, instead = TOKENS_CHOOSE.needed, "transport='gather'"
        raise refusal("transport='ragged'", needed, "slots.expert", None, instead)
    experts, (groups, size, k) = slots.token.shape[1], slots.expert.shape
    choices, block = slots.expert.size, block_size(slots.expert.size, experts)
    number = choices // block + experts

    # A dropped choice is sorted after all experts.
    expert = jnp.where(slots.expert >= 0, slots.expert, experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    count = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    blocks = -(-count // block)
    ends = jnp.cumsum(blocks)
    # An expert's first row, less the number of choices that are sorted before this expert's.
    shift = (ends - blocks) * block - (jnp.cumsum(count) - count)
    sorted_expert = expert[order]
    row = jnp.take(shift, sorted_expert, mode="clip") + jnp.arange(choices)
    row = jnp.where(sorted_expert < experts, row, number * block).astype(jnp.int32)

    place = jnp.zeros(choices, jnp.int32).at[order].set(row)
    token = jnp.full(number * block, groups * size, jnp.int32)
    token = token.at[row].set((order // k).astype(jnp.int32), mode="drop")
    gate = slots.gate.reshape(-1)
    weight = jnp.zeros(number * block, gate.dtype).at[row].set(gate[order], mode="drop")
    laid = Slots(
        token.reshape(1, number, block),
        weight.reshape(1, number, block),
        place.reshape(1, groups * size, k),
        gate.reshape(1, groups * size, k),
        slots.expert.reshape(1, groups * size, k),
        num_tokens=groups * size,
    )
    owner = (ends <= jnp.arange(number)[:, None]).sum(1)
    return laid, jnp.minimum(owner, experts - 1)
