"""Measures how well the experts of a model match the known domains of its texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_jax.analysis.tokens import mutual_information, purity


class DomainTable:
    """Counts of the tokens of each domain, by expert of each layer and by token id."""

    def __init__(self, num_layers: int, num_experts: int, num_domains: int, vocab_size: int):
        """Initialises the counts ``(layers, E, D)`` of experts and ``(V, D)`` of ids with zeros."""
        self._experts = np.zeros((num_layers, num_experts, num_domains), np.int64)
        self._tokens = np.zeros((vocab_size, num_domains), np.int64)

    def add_tokens(self, tokens: np.ndarray, domains: np.ndarray) -> None:
        """Counts the token ids ``(N,)`` of the domains ``(N,)``."""
        np.add.at(self._tokens, (tokens, domains), 1)

    def add(self, layer: int, domains: np.ndarray, experts: np.ndarray) -> None:
        """Counts a batch in one layer.

        Args:
            layer: Index among the layers of the table.
            domains: Domain ``(N,)`` of each token.
            experts: Array ``(N, E)``, nonzero if the expert processed the token.

        Raises:
            ValueError: If the shapes do not fit, or a domain is not below ``D``.
        """
        domains, experts = np.asarray(domains), np.asarray(experts)
        _, num_experts, num_domains = self._experts.shape
        if domains.ndim != 1 or len(experts) != len(domains) or experts.shape[1] > num_experts:
            raise ValueError(
                f"domains {domains.shape} and experts {experts.shape} must be (N,) and "
                f"(N, {num_experts} or fewer)"
            )
        if domains.size and not 0 <= domains.min() <= domains.max() < num_domains:
            raise ValueError(f"domains must be in 0..{num_domains - 1}")
        position, expert = np.nonzero(experts)
        np.add.at(self._experts[layer], (expert, domains[position]), 1)

    @property
    def token_information(self) -> float:
        """Mutual information of token id and domain in nats.

        It bounds the mutual information of any router that reads only the token id.
        """
        return mutual_information(self._tokens)

    def layer(self, index: int, num_experts: int) -> dict[str, Any]:
        """Returns the scores of one layer.

        Args:
            index: Index among the layers of the table.
            num_experts: Number of experts of the layer, at most the table's number.

        Returns:
            The ``mutual_information`` of expert and domain in nats, this number divided by
            ``log D`` as ``share_of_domain``, the ``purity``, and the ``counts (E, D)``.
        """
        counts = self._experts[index, :num_experts]
        information = mutual_information(counts)
        domains = counts.shape[1]
        return {
            "mutual_information": information,
            "share_of_domain": information / math.log(domains) if domains > 1 else 0.0,
            "purity": purity(counts),
            "counts": counts.tolist(),
        }
