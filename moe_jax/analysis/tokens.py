"""Counts the tokens of each expert, and measures how well experts match known domains."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenShare:
    """One row of the table: a token of an expert.

    Attributes:
        token: Id of the token.
        count: Number of times that the expert processed the token.
        share: ``count`` divided by the number of times that any expert of the layer processed it.
        lift: ``share`` divided by the expert's share of all tokens; 1 without preference.
    """

    token: int
    count: int
    share: float
    lift: float


class TokenExpertTable:
    """Counts of each token id, by expert of each layer."""

    def __init__(self, num_layers: int, num_experts: int, vocab_size: int):
        """Initialises the counts ``(layers, E, V)`` with zeros."""
        self._counts = np.zeros((num_layers, num_experts, vocab_size), np.int32)

    def add(self, layer: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Counts a batch in one layer.

        Args:
            layer: Index among the layers of the table.
            tokens: Ids ``(N,)`` of the tokens.
            experts: Array ``(N, E)``, nonzero (True, or a gate) if the expert processed the token.

        Raises:
            ValueError: If the shapes do not fit, or an id is outside the vocabulary.
        """
        tokens, experts = np.asarray(tokens), np.asarray(experts)
        _, num_experts, vocab_size = self._counts.shape
        if tokens.ndim != 1 or experts.shape != (tokens.size, num_experts):
            raise ValueError(
                f"tokens {tokens.shape} and experts {experts.shape} must be (N,) and "
                f"(N, {num_experts})"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"token ids must be in 0..{vocab_size - 1}")
        position, expert = np.nonzero(experts)
        np.add.at(self._counts[layer], (expert, tokens[position]), 1)

    def top_tokens(
        self, k: int, *, rank: Literal["count", "lift"] = "count", min_count: int = 1
    ) -> list[list[list[TokenShare]]]:
        """Returns the first ``k`` tokens of each expert of each layer.

        Args:
            k: Largest number of rows per expert.
            rank: Value to sort by, largest first; ties are sorted by count, then by id.
            min_count: Least count of a token in the table.
        """
        return [
            [_top(counts, layer, k, rank, max(min_count, 1)) for counts in layer]
            for layer in self._counts
        ]


def _top(
    counts: np.ndarray, layer: np.ndarray, k: int, rank: str, min_count: int
) -> list[TokenShare]:
    tokens = np.flatnonzero(counts >= min_count)
    share = counts[tokens] / layer[:, tokens].sum(0)
    lift = share / (counts.sum() / max(layer.sum(), 1))
    key = {"count": counts[tokens], "lift": lift}[rank]
    order = np.lexsort((tokens, -counts[tokens], -key))[:k]
    return [
        TokenShare(int(tokens[i]), int(counts[tokens[i]]), float(share[i]), float(lift[i]))
        for i in order
    ]


def mutual_information(counts: np.ndarray) -> float:
    """Returns the mutual information of expert and domain in nats for counts ``(E, D)``.

    The value is 0 if all experts have the same distribution of domains, or if all counts are 0. It
    is at most ``log min(E, D)``.
    """
    joint = np.asarray(counts, np.float64) / (np.sum(counts) or 1.0)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))


def purity(counts: np.ndarray) -> float:
    """Returns the share of the counts ``(E, D)`` that belong to their expert's main domain.

    The value is between the share of the most frequent domain and 1, and 0 if all counts are 0.
    """
    return float(np.max(counts, axis=1).sum() / (np.sum(counts) or 1.0))
