"""Dispatch by a ring: tokens visit the devices of the experts in turn; no slot is sent."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from moe_jax.parallel import GSPMD, around_the_ring, axis_size
from moe_jax.routing.plan import Plan, Slots
from moe_jax.transport.dispatch import Experts, OnOutputs, Scaled
from moe_jax.transport.gather import Gather, slot_table
from moe_jax.transport.requirements import check_no_outputs_by_slot
from moe_jax.transport.slots import InSlots

# The dispatch on one device, and inside the ring, where every array is local to a device.
_LOCAL = InSlots(Gather(), GSPMD)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Every device sends its tokens and their sums once per step of the ring.

    The number of bytes sent depends neither on the number of experts nor on the capacity. This
    suits dropless routing, where an expert has a slot for every token.
    """

    def __call__(
        self,
        experts: Experts,
        tokens: Float[Array, "G S M"],
        plan: Plan,
        *,
        gate_on: Scaled = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Float[Array, "G S M"]:
        """Returns the tokens' outputs, which are as wide as the tokens; see ``Dispatch``."""
        check_no_outputs_by_slot("exchange='ring'", on_outputs)
        if axis_size("expert") == 1:
            return _LOCAL(experts, tokens, plan, gate_on=gate_on)

        def visited(experts: Experts, x: Array, table: tuple[Array, Array]) -> Array:
            slots = Slots(*table, None, None, None, x.shape[1])
            part = dataclasses.replace(plan, slots=slots)
            return _LOCAL(experts, x, part, gate_on=gate_on)

        slots = slot_table(plan)
        return around_the_ring(visited, experts, tokens, (slots.token, slots.weight))
