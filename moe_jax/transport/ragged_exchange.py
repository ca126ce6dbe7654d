"""Dispatch without slots over devices: each choice is sent to the device of its expert."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.grouped import Choices
from moe_jax.parallel import axis_size, exchange_rows, on_each_device, on_expert_devices
from moe_jax.routing.plan import Counts, Plan, Slots
from moe_jax.transport.dispatch import Experts, OnOutputs, Scaled
from moe_jax.transport.gather import Gather, slot_table
from moe_jax.transport.ragged import Ragged, SortedExperts, in_order_of_experts, sorted_experts
from moe_jax.transport.requirements import check_no_outputs_by_slot
from moe_jax.transport.slots import dispatched

_GATHER = Gather()


@dataclasses.dataclass(frozen=True)
class RaggedExchange:
    """Each device sends the choices of its groups, sorted by expert, to the experts' devices.

    The received rows are sorted by expert again, grouped products compute them, and the outputs
    travel the same way back.

    Attributes:
        exchange_buffer: Rows that a device can receive, see ``buffer_rows``.
    """

    exchange_buffer: float | None = None

    def within(self, plan: Plan) -> Plan:
        """Returns the plan without the choices that no device has a row for; see ``Bounded``."""
        return within_buffers(plan, self.exchange_buffer)

    def __call__(
        self,
        experts: Experts,
        tokens: Float[Array, "G S M"],
        plan: Plan,
        *,
        gate_on: Scaled = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Float[Array, "G S N"]:
        """Returns the outputs of a plan ``within`` the buffers; see ``Dispatch``."""
        shards = axis_size("expert")
        if shards == 1:
            return Ragged()(experts, tokens, plan, gate_on=gate_on, on_outputs=on_outputs)
        check_no_outputs_by_slot("exchange='ragged'", on_outputs)
        module = sorted_experts(experts, "exchange='ragged'")

        def local(module, x: Array, slots: Slots) -> Array:
            with jax.named_scope("dispatch"):
                slots, sizes = in_order_of_experts(slots)
                part = dataclasses.replace(plan, slots=slots)
                rows, part = dispatched(_GATHER, x.reshape(1, -1, x.shape[-1]), part, gate_on)
            with jax.named_scope("exchange"):
                counts = jax.lax.all_gather(sizes, "expert").reshape(shards, shards, -1)
                to_device = counts.sum(2)
                length = buffer_rows(rows.shape[2], shards, self.exchange_buffer)
                received = exchange_rows(rows[0, 0], to_device, length)
            with jax.named_scope("experts"):
                mine = counts[:, jax.lax.axis_index("expert")]
                outputs = _on_received(module, received, mine)
            with jax.named_scope("exchange"):
                returned = exchange_rows(outputs, to_device.T, rows.shape[2])
            with jax.named_scope("combine"):
                return _GATHER.combine(returned[None, None], part).reshape(*x.shape[:2], -1)

        return on_expert_devices(local, module, tokens, slot_table(plan))


def _on_received(
    module: SortedExperts, rows: Float[Array, "R M"], counts: Int[Array, "D E"]
) -> Float[Array, "R N"]:
    """Returns the outputs of received rows; see ``by_expert`` for ``counts``."""
    place, inverse = by_expert(counts, len(rows))
    # A row that was not received has no output.
    place = jnp.where(jnp.arange(len(rows)) < counts.sum(), place, len(rows))[:, None]
    unweighted = jnp.ones_like(rows[:, 0])
    choices = Choices(inverse, unweighted, place, counts.sum(0))
    return module.on_choices(rows, unweighted[:, None], choices, "none")


def by_expert(counts: Int[Array, "D E"], length: int) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """Sorts received rows by expert, and by sender within an expert.

    Args:
        counts: Rows ``(D, E)`` that each of ``D`` devices sent for each of the ``E`` experts here.
            The received rows are in the order of this table.
        length: Number ``T`` of rows, received or not.

    Returns:
        The new place ``(T,)`` of each row, and the row ``(T,)`` of each new place; rows that were
        not received keep their places.
    """
    experts, row = counts.shape[1], jnp.arange(length, dtype=jnp.int32)
    if experts == 1:
        # The rows are in order. libtpu aborts if a scatter has its indices as values.
        return row, row
    begin = (jnp.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape)
    sorted_begin = (jnp.cumsum(counts.T) - counts.T.reshape(-1)).reshape(experts, -1).T
    owner = jnp.searchsorted(jnp.cumsum(counts), row, side="right", method="scan_unrolled")
    shift = jnp.take((sorted_begin - begin).reshape(-1), owner, mode="fill", fill_value=0)
    place = row + shift.astype(jnp.int32)
    inverse = jnp.zeros_like(row).at[place].set(row, unique_indices=True)
    return place, inverse


def buffer_rows(rows: int, shards: int, buffer: float | None) -> int:
    """Returns the number of rows that a device can receive.

    Args:
        rows: Number of choices on each device, which is an even share.
        shards: Number of devices that hold the experts.
        buffer: Rows relative to an even share; ``None`` gives every choice a row.
    """
    every = rows * shards
    return every if buffer is None else min(every, math.ceil(round(buffer * rows, 9)))


def within_buffers(plan: Plan, buffer: float | None) -> Plan:
    """Drops the choices that the device of their expert has no row for.

    A device receives the choices of the first device first, in the order of the experts.

    Args:
        plan: Plan of all groups.
        buffer: See ``buffer_rows``.

    Returns:
        The plan, where such choices are dropped and counted as dropped.
    """
    shards = axis_size("expert")
    if buffer is None or shards == 1:
        return plan

    def local(_: None, slots: Slots, counts: Counts) -> tuple[Slots, Counts]:
        return _dropped(slots, counts, _fits(slots, shards, buffer))

    slots, counts = on_each_device(local, None, slot_table(plan), plan.counts)
    return dataclasses.replace(plan, slots=slots, counts=counts)


def _fits(slots: Slots, shards: int, buffer: float) -> Array:
    """Returns the mask ``(G, S, K)``, True if the choice has a slot and a row."""
    in_order, sizes = in_order_of_experts(slots)
    assert slots.expert is not None and in_order.place is not None
    to_device = jax.lax.all_gather(sizes.reshape(shards, -1).sum(1), "expert")
    room = buffer_rows(slots.expert.size, shards, buffer)
    before = jnp.cumsum(to_device, 0) - to_device
    sent = to_device[jax.lax.axis_index("expert")]
    quota = jnp.clip(room - before[jax.lax.axis_index("expert")], 0, sent)
    experts_here = sizes.size // shards
    device = jnp.maximum(slots.expert, 0) // experts_here
    rank = in_order.place.reshape(slots.expert.shape) - (jnp.cumsum(sent) - sent)[device]
    return (slots.expert >= 0) & (rank < quota[device])


def _dropped(slots: Slots, counts: Counts, kept: Array) -> tuple[Slots, Counts]:
    """Drops the choices ``(G, S, K)`` of a device that ``kept`` does not mark."""
    assert slots.expert is not None and slots.gate is not None and slots.place is not None
    lost = (slots.expert >= 0) & ~kept
    groups, experts, capacity = slots.token.shape
    expert = jnp.where(lost, -1 - slots.expert, slots.expert)
    none = experts * capacity
    emptied = jnp.where(lost, slots.place, none).reshape(groups, -1)
    empty = jax.vmap(lambda i: jnp.zeros((none,), bool).at[i].set(True, mode="drop"))(emptied)
    empty = empty.reshape(slots.token.shape)
    fewer = ((slots.expert[..., None] == jnp.arange(experts)) & lost[..., None]).sum((1, 2))
    unrouted = ((slots.expert >= 0).any(-1) & ~kept.any(-1)).sum(-1)
    slots = dataclasses.replace(
        slots,
        token=jnp.where(empty, slots.num_tokens, slots.token),
        weight=jnp.where(empty, 0, slots.weight),
        place=jnp.where(lost, none, slots.place),
        gate=jnp.where(lost, 0, slots.gate),
        expert=expert,
    )
    counts = dataclasses.replace(
        counts, load=counts.load - fewer, unrouted=counts.unrouted + unrouted
    )
    return slots, counts
