"""The copies of a layer's experts as arrays of a module, which change without compilation."""

from __future__ import annotations

import dataclasses

from flax import nnx

from moe_jax.routing import Copies, Plan, Slots


class CopiesState(nnx.Variable):
    """Places of the copies of experts: neither trained nor checkpointed."""


class CopiesLayer(nnx.Module):
    """Copies of the experts of one MoE layer, or of stacked layers with a leading axis."""

    def __init__(self, copies: Copies):
        """Holds the arrays of ``copies``."""
        for field in dataclasses.fields(Copies):
            setattr(self, field.name, CopiesState(getattr(copies, field.name), axes=()))

    @property
    def copies(self) -> Copies:
        """The copies as arrays."""
        return Copies(**{f.name: getattr(self, f.name)[...] for f in dataclasses.fields(Copies)})

    def seat(self, plan: Plan) -> Plan:
        """Returns the plan with slots of places in place of slots of experts."""
        slots = plan.slots
        assert isinstance(slots, Slots)
        return dataclasses.replace(plan, slots=self.copies.seat(slots))
