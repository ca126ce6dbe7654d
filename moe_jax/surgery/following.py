"""A change of experts that the state of an optimizer can follow."""

from __future__ import annotations

from typing import Protocol

from moe_jax.surgery.weights import LayerWeights


class FollowedChange(Protocol):
    """A change of experts, of the parameters and of arrays that have their shapes."""

    def __call__(self, weights: LayerWeights) -> tuple[LayerWeights, str]:
        """Returns the changed model, and the reason for which its function differs, or ""."""

    def average(self, tree: str, average: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns an average of the parameters, changed as the parameters are.

        Args:
            tree: Name of the average in the state, such as ``opt_state/4/average``.
            average: The average, in place of the parameters.
            weights: The model before the change.
        """

    def moments(self, tree: str, moments: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the moments of an optimizer, each with the expert of its parameter.

        Args:
            tree: Name of the moments in the state, such as ``opt_state/1/0/mu``.
            moments: Moments in place of the parameters; some may be missing.
            weights: The model before the change.
        """
