"""A head of a router in which no token chooses some of the experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxtyping import Array, Float

from moe_jax.routing.head import Head, Parameter

NEVER = -1e9
SILENT = "silent"


@dataclasses.dataclass(frozen=True)
class Silent:
    """Another head, with a number that is added to the logits of each expert.

    It has the methods of ``Head`` that a router calls. It is no setting, so it is no subclass.

    The parameter ``silent (E,)`` is 0 for an expert that tokens may choose, and ``NEVER`` for an
    expert that is left out. Models without other experts so have one shape.

    Attributes:
        inner: The head. If it has several logits per token and expert, the number is added to the
            first one, which ranks the experts.
    """

    inner: Head

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns the parameters of the head, and ``silent (E,)``."""
        own = Parameter((experts,), ("router",), "zeros")
        return {**self.inner.parameters(width, experts, planes), SILENT: own}

    def carried_width(self, experts: int) -> int:
        """Returns ``D``, the values per token that the router of the next MoE layer reads."""
        return self.inner.carried_width(experts)

    def read(
        self,
        x: Float[Array, "*B M"],
        parameters: Mapping[str, Array],
        experts: int,
        carried: Float[Array, "*B D"] | None,
    ) -> tuple[Float[Array, "*B E"] | Float[Array, "*B E P"], Float[Array, "*B D"] | None]:
        """Returns the logits, and the values for the next MoE layer; see ``Head``."""
        logits, carried = self.inner.read(x, parameters, experts, carried)
        silent = parameters[SILENT]
        if logits.ndim == x.ndim:
            return logits + silent, carried
        return logits.at[..., 0].add(silent), carried
