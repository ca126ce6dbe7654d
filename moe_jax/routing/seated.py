"""Slots of the choices of a group, for routers with free experts or with redirected logits too."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.capacity import Capacity
from moe_jax.routing.free import free_gates, split
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.plan import Counts, Mixture, Slots
from moe_jax.routing.redirect import best_of_logits, chosen_logits, redirected
from moe_jax.routing.select import Selection, TokenChoice

# Name of the observed tokens (Z,) of the free experts.
FREE = "free"
# Name of the observed choices (V,) of the logits, if several logits share an expert.
CHOSEN = "chosen"

Places = tuple[Slots | Mixture, Counts, Float[Array, "S Z"] | None]


def seated(
    selection: Selection,
    scored: Scored,
    inputs: Inputs,
    *,
    capacity: Capacity,
    free: int,
    redirect: tuple[int, ...],
) -> Places:
    """Returns the slots, the counts, and the gates ``(S, Z)`` of free experts if there are any.

    Args:
        selection: Choices of a group.
        scored: Scores of the group.
        inputs: Inputs of the router.
        capacity: Assignment of choices to slots.
        free: ``Z``, the number of experts without computation.
        redirect: Expert of each logit, if several logits share an expert; else empty.
    """
    if redirect and isinstance(selection, TokenChoice):
        return _of_redirected(selection, scored, inputs, capacity, redirect)
    if free and isinstance(selection, TokenChoice):
        return _beside_free(selection, scored, inputs, capacity, free)
    return *capacity.seat(selection, scored.log_scores, inputs), None


def _of_redirected(
    selection: TokenChoice,
    scored: Scored,
    inputs: Inputs,
    capacity: Capacity,
    redirect: tuple[int, ...],
) -> Places:
    """Returns the slots of choices among logits, several of which share an expert."""
    ranking = best_of_logits(scored.log_scores, redirect)
    slots, counts = capacity.seat(redirected(selection, redirect), ranking, inputs)
    chosen = chosen_logits(selection, len(redirect))
    return slots, dataclasses.replace(counts, observed={CHOSEN: chosen}), None


def _beside_free(
    selection: TokenChoice, scored: Scored, inputs: Inputs, capacity: Capacity, free: int
) -> Places:
    """Returns the slots of the choices that need one, and the gates of free experts."""
    num_experts = scored.scores.shape[1] - free
    choice, taken = split(selection, num_experts)
    slots, counts = capacity.seat(choice, scored.log_scores[:, :num_experts], inputs)
    assert isinstance(slots, Slots) and slots.expert is not None and slots.wanted is not None
    routed = (slots.expert >= 0).any(-1) | taken.any(-1)
    gate, demand = free_gates(selection, taken, num_experts, free)
    unrouted = (inputs.valid & ~routed).sum().astype(jnp.float32)
    counts = dataclasses.replace(counts, unrouted=unrouted, observed={FREE: demand})
    expert = jnp.where(selection.expert >= num_experts, -1 - selection.expert, slots.expert)
    return dataclasses.replace(slots, expert=expert, wanted=slots.wanted | taken), counts, gate
