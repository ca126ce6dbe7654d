"""Policies of a cache of experts: which held expert leaves when another one needs its room."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

from moe_jax.offload.store import ExpertId


@dataclasses.dataclass(frozen=True)
class Clock:
    """The place of a forward pass in the model, and the last use of every held expert.

    Attributes:
        layer: MoE layer that is being computed.
        used: Time of the last use or load of each held expert; a later time is a larger number.
    """

    layer: int
    used: Mapping[ExpertId, int]


class Policy(Protocol):
    """Chooses the held expert that leaves the device."""

    def leaves(self, held: Sequence[ExpertId], now: Clock) -> ExpertId:
        """Returns one of the held experts, of which there is at least one."""


@dataclasses.dataclass(frozen=True)
class LeastRecentlyUsed:
    """The expert whose last use is the longest ago leaves first.

    Examples:
        >>> from moe_jax.offload import Clock, LeastRecentlyUsed
        >>> now = Clock(layer=1, used={(0, 3): 7, (1, 2): 4})
        >>> LeastRecentlyUsed().leaves([(0, 3), (1, 2)], now)
        (1, 2)
    """

    def leaves(self, held: Sequence[ExpertId], now: Clock) -> ExpertId:
        """Returns the held expert with the earliest last use."""
        return min(held, key=lambda expert: now.used[expert])


@dataclasses.dataclass(frozen=True)
class LeastStale:
    """Experts of layers that the forward pass has left behind leave first.

    A pass visits the layers in order, so an expert of an earlier layer is not used again in this
    pass: it is stale. The stale expert with the earliest last use leaves first. If no expert is
    stale, an expert of the last layer leaves, since its use is the farthest ahead; of the same
    layer, again the one with the earliest last use. The idea is from SpecMD (2602.03921), whose
    abstract alone was read.

    Examples:
        >>> from moe_jax.offload import Clock, LeastStale
        >>> now = Clock(layer=1, used={(0, 3): 7, (1, 2): 4})
        >>> LeastStale().leaves([(0, 3), (1, 2)], now)  # The pass is past layer 0.
        (0, 3)
    """

    def leaves(self, held: Sequence[ExpertId], now: Clock) -> ExpertId:
        """Returns a held expert of a layer before this one, or else of the last layer."""
        stale = [expert for expert in held if expert[0] < now.layer]
        if stale:
            return LeastRecentlyUsed().leaves(stale, now)
        return min(held, key=lambda expert: (-expert[0], now.used[expert]))


@dataclasses.dataclass(frozen=True)
class Pinned:
    """Hot experts leave only if no other expert can.

    Attributes:
        policy: Chooses among the experts that are not hot, and among the hot ones without others.
        hot: The experts that stay, such as from ``hottest``.

    Examples:
        >>> from moe_jax.offload import Clock, LeastRecentlyUsed, Pinned
        >>> now = Clock(layer=1, used={(0, 3): 7, (1, 2): 4})
        >>> policy = Pinned(LeastRecentlyUsed(), hot=frozenset({(1, 2)}))
        >>> policy.leaves([(0, 3), (1, 2)], now)
        (0, 3)
    """

    policy: Policy
    hot: frozenset[ExpertId]

    def leaves(self, held: Sequence[ExpertId], now: Clock) -> ExpertId:
        """Returns the choice of the policy among experts that are not hot, if there are any."""
        others = [expert for expert in held if expert not in self.hot]
        return self.policy.leaves(others or held, now)


def hottest(loads: Sequence[Shaped[np.ndarray, " E"]], number: int) -> frozenset[ExpertId]:
    """Returns the experts with the largest loads, for ``Pinned``.

    Args:
        loads: Tokens ``(E,)`` of each expert, for every MoE layer.
        number: Number of experts; fewer than the budget holds, so that others can be loaded.

    Examples:
        >>> import numpy as np
        >>> from moe_jax.offload import hottest
        >>> sorted(hottest([np.array([9, 1]), np.array([2, 8])], 2))
        [(0, 0), (1, 1)]
    """
    each = [(-load, (layer, e)) for layer, own in enumerate(loads) for e, load in enumerate(own)]
    return frozenset(expert for _, expert in sorted(each)[:number])
