"""What the parts of a router have in common: checks, and state between steps."""

from __future__ import annotations

import jax

from moe_jax.ranges import Ranged

Array = jax.Array


class Part(Ranged):
    """A part of a router. Most check nothing and carry nothing."""

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the part cannot work with ``num_experts``."""
        del num_experts

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what is carried between steps; it starts as zeros."""
        del num_experts
        return {}

    def next_state(self, state: dict[str, Array], demand: Array) -> dict[str, Array]:
        """Returns the state after a step in which ``demand (E,)`` tokens asked for each expert."""
        del demand
        return state
