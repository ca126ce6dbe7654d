"""Policies of a cache of experts: which held expert leaves when another one needs its room."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

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
