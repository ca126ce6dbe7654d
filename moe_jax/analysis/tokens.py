"""Which tokens each expert takes, and how well experts match known domains."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenShare:
    """One row of the table.

    Attributes:
        token: its id.
        count: how often the expert took it.
        share: of all the times this token was routed in the layer.
        lift: ``share`` over the expert's share of all tokens; 1 if it has no preference.
    """

    token: int
    count: int
    share: float
    lift: float


class TokenExpertTable:
    """Counts how often each expert of each layer took each token."""

    def __init__(self, num_layers: int, num_experts: int, vocab_size: int):
        """Starts with zeros ``(layers, E, V)``."""
        self._counts = np.zeros((num_layers, num_experts, vocab_size), np.int32)

    def add(self, layer: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Counts a batch in one layer.

        Args:
            layer: index among the table's layers.
            tokens: ids ``(N,)``.
            experts: ``(N, E)``; not zero (true, or a gate's weight) where the expert took the
                token.

        Raises:
            ValueError: if shapes do not fit or an id is outside the vocabulary.
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
        """Returns per layer and expert its first ``k`` tokens.

        Args:
            k: rows per expert at most.
            rank: largest first; equal ones in the order of count, then of id.
            min_count: tokens that the expert took less often are left out.
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
    """Returns the mutual information in nats of expert and domain for counts ``(E, D)``.

    0 when every expert takes every domain alike, at most ``log min(E, D)``; 0 for no counts.
    """
    joint = np.asarray(counts, np.float64) / (np.sum(counts) or 1.0)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))


def purity(counts: np.ndarray) -> float:
    """Returns the fraction of assignments ``(E, D)`` that are of their expert's main domain.

    At most 1; never below the share of the most frequent domain; 0 for no counts.
    """
    return float(np.max(counts, axis=1).sum() / (np.sum(counts) or 1.0))
