"""The experts without computation of a layer, as a module that holds their parameters."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moe_jax.nn.init import described
from moe_jax.routing import FreeExperts


class Free(nnx.Module):
    """The free experts of a layer, which read and return tokens without slots."""

    def __init__(self, experts: FreeExperts, width: int, key: PRNGKeyArray, scale: float):
        """Initialises the parameters of the constant experts.

        Args:
            experts: The free experts.
            width: Width ``M`` of the tokens.
            key: Random key.
            scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.
        """
        parameters = experts.parameters(width)
        for i, (name, parameter) in enumerate(parameters.items()):
            setattr(self, name, described(parameter, jax.random.fold_in(key, i), scale))
        self.names = tuple(parameters)
        self.experts = experts

    def __call__(
        self, x: Float[Array, "G S M"], gate: Float[Array, "G S Z"]
    ) -> Float[Array, "G S M"]:
        """Returns the sum of the outputs, each times its gate; see ``FreeExperts.output``."""
        parameters = {name: getattr(self, name)[...] for name in self.names}
        return self.experts.output(x, gate, parameters)
