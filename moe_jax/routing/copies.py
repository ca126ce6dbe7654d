"""Copies of experts: several places hold the weights of one expert and share its tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from moe_jax.errors import ConfigError
from moe_jax.routing.plan import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """The expert of each of ``P`` places, of one MoE layer or of several with a leading axis.

    Attributes:
        expert: Expert ``(..., P)`` int32 whose weights are in each place.
        order: Number ``(..., P)`` int32 of earlier places with the same expert.
        number: Number ``(..., E)`` int32 of places of each expert, at least 1.
        place: Place ``(..., E, R)`` int32 of each copy of an expert, with ``R = P - E + 1``; the
            entries after the last copy are 0.
    """

    expert: Int32[Array, "*layers P"]
    order: Int32[Array, "*layers P"]
    number: Int32[Array, "*layers E"]
    place: Int32[Array, "*layers E R"]

    @classmethod
    def of(cls, expert: Int[np.ndarray, "*layers P"], num_experts: int) -> Copies:
        """Returns the copies that are in each place.

        Args:
            expert: Expert ``(..., P)`` of each place.
            num_experts: Number ``E`` of experts.

        Raises:
            ConfigError: If an expert has no place, or there is no such expert.
        """
        expert = np.asarray(expert, np.int32)
        *layers, places = expert.shape
        order = np.zeros_like(expert)
        number = np.zeros((*layers, num_experts), np.int32)
        place = np.zeros((*layers, num_experts, max(places - num_experts + 1, 1)), np.int32)
        for layer in np.ndindex(*layers):
            if set(expert[layer].tolist()) != set(range(num_experts)):
                raise ConfigError(
                    f"each of the {num_experts} experts needs a place, and {places} places hold "
                    f"the experts {sorted(set(expert[layer].tolist()))}: list every expert"
                )
            for where, e in enumerate(expert[layer]):
                order[(*layer, where)] = number[(*layer, e)]
                place[(*layer, e, number[(*layer, e)])] = where
                number[(*layer, e)] += 1
        return cls(*(jnp.asarray(a) for a in (expert, order, number, place)))

    def seat(self, slots: Slots) -> Slots:
        """Returns slots of places ``(..., P, C)`` for slots of experts ``(..., E, C)``.

        Token ``s`` of a group goes to copy ``s mod n`` of an expert with ``n`` copies, at the
        position that it had in the expert, so no choice is dropped and no gate changes.

        Raises:
            ConfigError: If the experts chose the tokens.
        """
        if slots.expert is None or slots.place is None:
            raise ConfigError(
                "copies of experts need tokens that choose experts: use the model without copies"
            )
        capacity = slots.token.shape[-1]
        token = jnp.take(slots.token, self.expert, axis=-2)
        weight = jnp.take(slots.weight, self.expert, axis=-2)
        mine = token % self.number[self.expert][:, None] == self.order[:, None]
        index = jnp.arange(slots.num_tokens, dtype=jnp.int32)[:, None]
        expert = jnp.maximum(slots.expert, 0)
        where = self.place[expert, index % self.number[expert]]
        kept = slots.expert >= 0
        position = slots.place % capacity
        return dataclasses.replace(
            slots,
            token=jnp.where(mine, token, slots.num_tokens),
            weight=jnp.where(mine, weight, 0),
            place=jnp.where(kept, where * capacity + position, self.expert.size * capacity),
            # A dropped choice names its expert, which has no place.
            expert=jnp.where(kept, where, slots.expert),
        )
