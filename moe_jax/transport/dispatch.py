"""The protocols of dispatch: from tokens to expert outputs, and from tokens to slots and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax

from moe_jax.routing.plan import Plan

Array = jax.Array
# ``(E, T, M)`` to ``(E, T, N)``; a module, whose parameters an implementation may split or select.
Experts = Callable[[Array], Array]
# ``(G, E, C, N)`` to the same shape, such as dropout.
OnOutputs = Callable[[Array], Array]


class Dispatch(Protocol):
    """Brings tokens to the experts of a plan and the experts' outputs back to the tokens.

    All implementations give the same values and the same gradients; ``moe_jax.transport.table``
    says what each requires and costs.
    """

    def __call__(
        self,
        experts: Experts,
        tokens: Array,
        plan: Plan,
        *,
        gate_on: str = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Array:
        """Returns for each token the weighted sum of its experts' outputs, ``(G, S, N)``.

        Args:
            experts: from ``(E, T, M)`` to ``(E, T, N)``.
            tokens: ``(G, S, M)``.
            plan: the plan of all groups.
            gate_on: gates scale the tokens that experts read (``in``) or the outputs that experts
                give (``out``).
            on_outputs: is applied to the experts' outputs ``(G, E, C, N)``. Implementations that
                do not hold outputs by slot require ``None``.

        Raises:
            ConfigError: if the implementation cannot execute this plan.
        """


class Transport(Protocol):
    """Moves tokens into slots and the contents of slots back to tokens, on one device."""

    def dispatch(self, x: Array, plan: Plan) -> Array:
        """Returns the expert inputs ``(G, E, C, M)`` for tokens ``x (G, S, M)``."""

    def combine(self, y: Array, plan: Plan) -> Array:
        """Returns the weighted sums ``(G, S, M)`` of expert outputs ``y (G, E, C, M)``."""
