"""Which tokens each expert takes, and how well experts match known domains."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenShare:
    """One row of the table.

    Attributes:
        token: its id.
        count: how often the expert took it.
        share: of all the times this token was routed in the layer.
    """

    token: int
    count: int
    share: float


class TokenExpertTable:
    """Counts how often each expert of each layer took each token."""

    def __init__(self, num_layers: int, num_experts: int, vocab_size: int):
        """Starts with zeros ``(layers, E, V)``."""
        self._counts = np.zeros((num_layers, num_experts, vocab_size), np.int64)

    def add(self, layer: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Counts tokens ``(N,)`` taken by experts ``(N, E)`` bool in one layer."""
        for expert in range(experts.shape[1]):
            taken = tokens[experts[:, expert].astype(bool)]
            self._counts[layer, expert] += np.bincount(taken, minlength=self._counts.shape[2])

    def top_tokens(self, k: int) -> list[list[list[TokenShare]]]:
        """Returns per layer and expert its ``k`` most frequent tokens, most frequent first."""
        return [[_top(counts, layer.sum(0), k) for counts in layer] for layer in self._counts]


def _top(counts: np.ndarray, totals: np.ndarray, k: int) -> list[TokenShare]:
    order = np.argsort(-counts, kind="stable")[:k]
    return [
        TokenShare(int(t), int(counts[t]), float(counts[t] / totals[t]))
        for t in order
        if counts[t] > 0
    ]


def mutual_information(counts: np.ndarray) -> float:
    """Returns the mutual information in nats of expert and domain for counts ``(E, D)``."""
    joint = np.asarray(counts, np.float64) / np.sum(counts)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))


def purity(counts: np.ndarray) -> float:
    """Returns the fraction of assignments ``(E, D)`` that are of their expert's main domain."""
    return float(np.max(counts, axis=1).sum() / np.sum(counts))
