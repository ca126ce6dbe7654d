"""Predictions of the experts that the next MoE layer needs."""

from __future__ import annotations

import dataclasses
import itertools
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


class Traces:
    """Predicts the experts that followed the chosen experts of a layer most often.

    The counts ``(E, E')`` of two neighbouring layers tell how many tokens chose an expert of the
    first layer and an expert of the second. They grow with every pass in which all layers, the last
    one included, ask ``next`` in order, and start from recorded passes with ``learn``.

    Examples:
        >>> import numpy as np
        >>> from moe_jax.offload import Traces
        >>> traces = Traces([4, 4])
        >>> traces.learn([np.array([[0], [1]]), np.array([[2], [3]])])  # 0 is followed by 2
        >>> traces.next(0, np.array([[0]]), None)
        [2]
    """

    def __init__(self, experts: Sequence[int]):
        """Starts with no counts.

        Args:
            experts: Number of experts of each MoE layer, such as the ``experts`` of a store.
        """
        self._counts = [np.zeros(pair, np.int64) for pair in itertools.pairwise(experts)]
        self._before: tuple[int, LayerChoices] | None = None

    def learn(self, choices: Sequence[LayerChoices]) -> None:
        """Counts the choices ``(T, K)`` of every MoE layer in one pass; negative ones are none."""
        for counts, (first, second) in zip(self._counts, itertools.pairwise(choices), strict=True):
            _add(counts, first, second)

    def next(
        self, layer: int, choices: LayerChoices, scores_of_next: LayerScores | None
    ) -> Sequence[int]:
        """Returns as many experts as tokens chose in this layer, the most probable first."""
        if self._before is not None and self._before[0] == layer - 1:
            _add(self._counts[layer - 1], self._before[1], choices)
        self._before = layer, choices
        if layer >= len(self._counts):
            return []
        counts = self._counts[layer]
        chosen, tokens = np.unique(choices[choices >= 0], return_counts=True)
        shares = counts[chosen] / np.maximum(counts[chosen].sum(axis=1, keepdims=True), 1)
        expected = tokens @ shares
        order = np.argsort(-expected, kind="stable")[: len(chosen)]
        return [int(expert) for expert in order if expected[expert]]


def _add(counts: Int[np.ndarray, "E N"], first: LayerChoices, second: LayerChoices) -> None:
    """Adds each pair of experts that a token chose in two layers; other batches are left out."""
    if len(first) != len(second):
        return
    one, other = np.broadcast_arrays(first[:, :, None], second[:, None, :])
    both = (one >= 0) & (other >= 0)
    np.add.at(counts, (one[both], other[both]), 1)
