"""Predictions of the experts that the next MoE layer needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

LayerChoices = Int[np.ndarray, "T K"]
LayerScores = Float[np.ndarray, "T E"]


class Predictor(Protocol):
    """Predicts the experts of the next MoE layer."""

    def next(
        self, layer: int, choices: LayerChoices, scores_of_next: LayerScores | None
    ) -> Sequence[int]:
        """Returns experts of MoE layer ``layer + 1``, the most probable first.

        Args:
            layer: MoE layer that has chosen its experts.
            choices: Experts ``(T, K)`` that the tokens chose in this layer.
            scores_of_next: Scores ``(T, E)`` that the router of the next layer gives to the hidden
                states of this layer; ``None`` if they are not computed or there is no next layer.
        """


@dataclasses.dataclass(frozen=True)
class NoPrediction:
    """Predicts no expert, so that every load starts when its layer has chosen."""

    def next(
        self, layer: int, choices: LayerChoices, scores_of_next: LayerScores | None
    ) -> Sequence[int]:
        """Returns no experts."""
        return ()


@dataclasses.dataclass(frozen=True)
class NextRouter:
    """Predicts the experts that the next layer's router prefers on this layer's hidden states.

    Examples:
        >>> import numpy as np
        >>> from moe_jax.offload import NextRouter
        >>> scores = np.array([[0.1, 0.7, 0.2], [0.1, 0.3, 0.6]])
        >>> NextRouter().next(0, np.array([[0], [2]]), scores)  # The larger score is first.
        [1, 2]
    """

    def next(
        self, layer: int, choices: LayerChoices, scores_of_next: LayerScores | None
    ) -> Sequence[int]:
        """Returns each token's ``K`` experts of the highest scores; those of most tokens first."""
        if scores_of_next is None:
            return []
        count = min(choices.shape[1], scores_of_next.shape[1])
        best = np.argsort(-scores_of_next, axis=1, kind="stable")[:, :count]
        tokens = np.bincount(best.ravel(), minlength=scores_of_next.shape[1])
        order = np.lexsort((-scores_of_next.sum(axis=0), -tokens))
        return [int(expert) for expert in order if tokens[expert]]
