"""Dispatch without slots: choices are sorted by expert, and grouped products compute them."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.grouped import Choices, GateOn
from moe_jax.parallel import on_each_device
from moe_jax.routing.plan import Plan, Slots
from moe_jax.transport.dispatch import Experts, OnOutputs, Scaled
from moe_jax.transport.gather import slot_table
from moe_jax.transport.requirements import TOKENS_CHOOSE, check_no_outputs_by_slot, refusal


@runtime_checkable
class SortedExperts(Protocol):
    """Experts that compute choices sorted by expert."""

    def on_choices(
        self,
        tokens: Float[Array, "T M"],
        gate: Float[Array, "T K"],
        choices: Choices,
        gate_on: GateOn = "out",
    ) -> Float[Array, "T N"]:
        """Returns for each token the sum of its experts' outputs; see ``moe_jax.grouped``."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Each device sorts the choices of its groups by expert, for all experts."""

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
        check_no_outputs_by_slot("transport='ragged'", on_outputs)
        module = sorted_experts(experts, "transport='ragged'")

        def here(experts: SortedExperts, x: Array, slots: Slots) -> Array:
            with jax.named_scope("dispatch"):
                slots, sizes = in_order_of_experts(slots)
                gate, choices = choices_of(slots, sizes)
            y = experts.on_choices(x.reshape(-1, x.shape[-1]), gate, choices, gate_on)
            return y.reshape(*x.shape[:2], -1)

        return on_each_device(here, module, tokens, slot_table(plan))


def sorted_experts(experts: Experts, chosen: str) -> SortedExperts:
    """Returns experts that compute sorted rows.

    Args:
        experts: Module of the experts.
        chosen: Setting that requires such experts, for the message.

    Raises:
        ConfigError: If the experts compute slots alone.
    """
    if isinstance(experts, SortedExperts):
        return experts
    needed, name = "experts with the function on_choices", type(experts).__name__
    raise refusal(chosen, needed, "experts", name, "transport='gather'")


def choices_of(slots: Slots, sizes: Int[Array, " E"]) -> tuple[Float[Array, "T K"], Choices]:
    """Returns the gates and the choices of slots in the order of their experts.

    Args:
        slots: Slots of one group, from ``in_order_of_experts``.
        sizes: Number ``(E,)`` of slots of each expert.
    """
    assert slots.gate is not None and slots.place is not None
    token, weight = slots.token[0, 0], slots.weight[0, 0]
    return slots.gate[0], Choices(token, weight, slots.place[0], sizes)


def in_order_of_experts(slots: Slots) -> tuple[Slots, Int[Array, " E"]]:
    """Sorts the choices of all groups by expert, and by token within an expert.

    Args:
        slots: Slots of ``G`` groups of ``S`` tokens that choose ``K`` of ``E`` experts each.

    Returns:
        The slots of one group of ``G S`` tokens and one list of ``G S K`` slots, and the number
        ``(E,)`` of slots of each expert. Every choice with a slot keeps one, whatever the load;
        the slots of dropped choices are empty and last.

    Raises:
        ConfigError: If the experts chose the tokens.
    """
    if slots.expert is None or slots.gate is None:
        needed, instead = TOKENS_CHOOSE.needed, "transport='gather'"
        raise refusal("transport='ragged'", needed, "slots.expert", None, instead)
    experts, (groups, size, k) = slots.token.shape[1], slots.expert.shape
    tokens, choices = groups * size, slots.expert.size

    # A dropped choice is sorted after all experts.
    expert = jnp.where(slots.expert >= 0, slots.expert, experts).reshape(-1)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    sizes = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    row = jnp.arange(choices, dtype=jnp.int32)
    filled = row < sizes.sum()
    place = jnp.zeros(choices, jnp.int32).at[order].set(row, unique_indices=True)
    gate = slots.gate.reshape(-1)
    in_order = Slots(
        jnp.where(filled, order // k, tokens).reshape(1, 1, choices),
        jnp.where(filled, gate[order], 0).reshape(1, 1, choices),
        jnp.where(expert < experts, place, choices).reshape(1, tokens, k),
        gate.reshape(1, tokens, k),
        slots.expert.reshape(1, tokens, k),
        num_tokens=tokens,
    )
    return in_order, sizes
