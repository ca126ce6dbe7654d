"""Dispatch by slots: a device fills the slots of its groups and exchanges them with all experts."""

from __future__ import annotations

import dataclasses

import jax

from moe_jax.parallel import Exchange
from moe_jax.routing.plan import Plan
from moe_jax.transport.dispatch import Experts, OnOutputs, Transport
from moe_jax.transport.gather import slot_table

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class InSlots:
    """Every expert has ``C`` slots per group, and computes all of them.

    Attributes:
        transport: moves tokens into slots and back, on one device.
        exchange: moves slots between the devices of their groups and those of their experts.
    """

    transport: Transport
    exchange: Exchange

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
        with jax.named_scope("dispatch"):
            sent, plan = dispatched(self.transport, tokens, plan, gate_on)
            sent = self.exchange.to_experts(sent)
        with jax.named_scope("experts"):
            done = experts(sent)
        with jax.named_scope("combine"):
            # Outputs are back in groups: a random mask must not depend on how many the mesh adds.
            done = self.exchange.to_groups(done, tokens.shape[0])
            done = done if on_outputs is None else on_outputs(done)
            return self.transport.combine(done, plan)


def dispatched(transport: Transport, tokens: Array, plan: Plan, gate_on: str) -> tuple[Array, Plan]:
    """Returns tokens by slot, times their gates if ``gate_on="in"``, and the plan of combining."""
    sent = transport.dispatch(tokens, plan)
    if gate_on == "out":
        return sent, plan
    slots = slot_table(plan)
    sent *= slots.weight[..., None].astype(sent.dtype)
    return sent, dataclasses.replace(plan, slots=slots.with_unit_weights())
