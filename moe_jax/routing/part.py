"""The common interface of a router's parts: checks, and state between steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxtyping import Array, Float

from moe_jax.ranges import Ranged

NOTHING: Mapping[str, Array] = MappingProxyType({})


class Part(Ranged):
    """A part of a router. By default a part checks nothing and has no state."""

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the part cannot work with ``num_experts``."""
        del num_experts

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ConfigError`` if the part cannot route all ids below ``vocab_size``."""
        del vocab_size

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the part's state, which is zero before the first step."""
        del num_experts
        return {}

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state after an optimizer step.

        Args:
            state: Arrays of the router's state by name, each ``(..., *shape)``.
            demand: Number ``(..., E)`` of tokens that chose each expert in the whole step.
            observed: Sums ``(..., *shape)`` of what ``observe`` returned, over the whole step.
        """
        del demand, observed
        return state
