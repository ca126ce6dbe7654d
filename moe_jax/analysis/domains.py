"""How well the experts of a model match the domains that its text is known to be of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_jax.analysis.tokens import mutual_information, purity


class DomainTable:
    """Counts which expert of each layer took tokens of which domain, and the tokens themselves."""

    def __init__(self, num_layers: int, num_experts: int, num_domains: int, vocab_size: int):
        """Starts with zeros: experts ``(layers, E, D)``, tokens ``(V, D)``."""
        self._experts = np.zeros((num_layers, num_experts, num_domains), np.int64)
        self._tokens = np.zeros((vocab_size, num_domains), np.int64)

    def add_tokens(self, tokens: np.ndarray, domains: np.ndarray) -> None:
        """Counts tokens ``(N,)`` of domains ``(N,)``."""
        np.add.at(self._tokens, (tokens, domains), 1)

    def add(self, layer: int, domains: np.ndarray, experts: np.ndarray) -> None:
        """Counts a batch in one layer.

        Args:
            layer: index among the table's layers.
            domains: of each token ``(N,)``.
            experts: ``(N, E)``, not zero where the expert took the token.

        Raises:
            ValueError: if shapes do not fit or a domain is not one of ``D``.
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
        """Mutual information in nats of token and domain.

        No router that reads the token alone can have more.
        """
        return mutual_information(self._tokens)

    def layer(self, index: int, num_experts: int) -> dict[str, Any]:
        """Returns one layer's scores.

        Args:
            index: of the layer.
            num_experts: that it has; the table may have room for more.

        Returns:
            ``mutual_information`` of expert and domain in nats, the same over ``log D`` as
            ``share_of_domain``, ``purity``, and the counts ``(E, D)``.
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
