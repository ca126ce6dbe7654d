"""Dispatch by slots: a device fills the slots of its groups and exchanges them with all experts."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float

from moe_jax.parallel import Exchange
from moe_jax.routing.plan import Plan
from moe_jax.transport.dispatch import Experts, OnOutputs, Scaled, Transport
from moe_jax.transport.gather import slot_table


@dataclasses.dataclass(frozen=True)
class InSlots:
    """Every expert has ``C`` slots per group and computes all of them.

    Attributes:
        transport: Transport of tokens into slots and back, on one device.
        exchange: Exchange of slots between the devices of groups and the devices of experts.
    """

    transport: Transport
    exchange: Exchange

    def __call__(
        self,
        experts: Experts,
        tokens: Float[Array, "G S M"],
        plan: Plan,
        *,
        gate_on: Scaled = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Float[Array, "G S N"]:
        """Returns the tokens' outputs; see ``Dispatch``."""
        with jax.named_scope("dispatch"):
            sent, plan = dispatched(self.transport, tokens, plan, gate_on)
            with jax.named_scope("exchange"):
                sent = self.exchange.to_experts(sent)
        with jax.named_scope("experts"):
            outputs = experts(sent)
        with jax.named_scope("combine"):
            # A random mask is drawn per group, so that it does not depend on the mesh.
            with jax.named_scope("exchange"):
                outputs = self.exchange.to_groups(outputs, tokens.shape[0])
            outputs = outputs if on_outputs is None else on_outputs(outputs)
            return self.transport.combine(outputs, plan)


def dispatched(
    transport: Transport, tokens: Float[Array, "G S M"], plan: Plan, gate_on: Scaled
) -> tuple[Float[Array, "G E C M"], Plan]:
    """Returns the tokens by slot, times their gates if ``gate_on="in"``, and the combine plan."""
    sent = transport.dispatch(tokens, plan)
    if gate_on == "out":
        return sent, plan
    slots = slot_table(plan)
    sent *= slots.weight[..., None].astype(sent.dtype)
    return sent, dataclasses.replace(plan, slots=slots.with_unit_weights())
