"""The protocols ``Dispatch`` (tokens to expert outputs) and ``Transport`` (tokens to slots)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float

from moe_jax.routing.plan import Plan

# Experts map ``T`` tokens each. They are a module: an implementation may split or select the
# parameters.
Experts = Callable[[Float[Array, "E T M"]], Float[Array, "E T N"]]
# Gates of a router scale the inputs or the outputs of the experts.
Scaled = Literal["in", "out"]
# A function of the experts' outputs by slot, such as dropout.
OnOutputs = Callable[[Float[Array, "G E C N"]], Float[Array, "G E C N"]]


@runtime_checkable
class Dispatch(Protocol):
    """Brings tokens to the experts of a plan and the experts' outputs back to the tokens.

    All implementations give the same values and the same gradients; ``moe_jax.transport.table``
    lists the requirements and the cost of each.
    """

    def __call__(
        self,
        experts: Experts,
        tokens: Float[Array, "G S M"],
        plan: Plan,
        *,
        gate_on: Scaled = "out",
        on_outputs: OnOutputs | None = None,
    ) -> Float[Array, "G S N"]:
        """Returns for each token the weighted sum of its experts' outputs, ``(G, S, N)``.

        Args:
            experts: Module that maps ``(E, T, M)`` to ``(E, T, N)``.
            tokens: Tokens ``(G, S, M)``.
            plan: Plan of all groups.
            gate_on: Gates scale the experts' inputs (``in``) or the experts' outputs (``out``).
            on_outputs: Function that is applied to the experts' outputs ``(G, E, C, N)``.
                Implementations that do not hold outputs by slot require ``None``.

        Raises:
            ConfigError: If the implementation cannot execute this plan.
        """


@runtime_checkable
class Bounded(Protocol):
    """A dispatch that has room for a bounded number of choices."""

    def within(self, plan: Plan) -> Plan:
        """Returns the plan, where the choices without room are dropped and counted as dropped."""


@runtime_checkable
class Transport(Protocol):
    """Moves tokens into slots and the contents of slots back to tokens, on one device."""

    def dispatch(self, x: Float[Array, "G S M"], plan: Plan) -> Float[Array, "G E C M"]:
        """Returns the expert inputs ``(G, E, C, M)`` for tokens ``x (G, S, M)``."""

    def combine(self, y: Float[Array, "G E C M"], plan: Plan) -> Float[Array, "G S M"]:
        """Returns the weighted sums ``(G, S, M)`` of expert outputs ``y (G, E, C, M)``."""
