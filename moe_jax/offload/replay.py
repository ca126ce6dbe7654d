"""The hits of a cache on recorded routing, without a model and without weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.offload.cache import DeviceArrays, ExpertCache, OffloadCounts
from moe_jax.offload.policy import Policy
from moe_jax.offload.predict import LayerChoices, Predictor
from moe_jax.offload.store import ExpertArrays, HostStore

Trace = Iterable[Sequence[LayerChoices]]


def replayed(
    trace: Trace, experts: Sequence[int], budget: int, policy: Policy, predictor: Predictor
) -> OffloadCounts:
    """Returns the counts of a cache that serves recorded forward passes.

    Every expert takes one byte, and a predicted expert is there before its layer. The trace has no
    scores, so ``NextRouter`` predicts nothing.

    Args:
        trace: Forward passes: the choices ``(T, K)`` of each MoE layer; negative ones are none.
        experts: Number of experts of each MoE layer.
        budget: Number of experts that the device holds.
        policy: Chooses the experts that leave.
        predictor: Predicts the experts of the next layer.

    Raises:
        ConfigError: If the budget is below 1.

    Examples:
        >>> import numpy as np
        >>> from moe_jax.offload import LeastRecentlyUsed, LeastStale, NoPrediction, replayed
        >>> trace = [[np.array([[0]])] * 3] * 4  # four tokens, which choose expert 0 three times
        >>> [
        ...     replayed(trace, [2] * 3, 2, policy, NoPrediction()).hits
        ...     for policy in (LeastRecentlyUsed(), LeastStale())
        ... ]
        [0, 3]
    """
    cache = ExpertCache(_unit_store(experts), budget, policy, put=_as_it_is, workers=0)
    for choices in trace:
        for layer, own in enumerate(choices):
            for _ in cache.take(layer, np.unique(own[own >= 0]).tolist()):
                pass
            cache.prefetch(layer + 1, predictor.next(layer, own, None))
    return cache.counts


def by_position(choices: Sequence[Int[np.ndarray, "B L K"]]) -> Iterator[list[LayerChoices]]:
    """Yields the passes that would decode recorded sequences one position at a time.

    Args:
        choices: Choices ``(B, L, K)`` of each MoE layer, as ``RoutingRecord.passes`` yields them.

    Returns:
        For each of ``L`` positions, the choices ``(B, K)`` of each MoE layer.
    """
    for position in range(choices[0].shape[1]):
        yield [own[:, position] for own in choices]


def _unit_store(experts: Sequence[int]) -> HostStore:
    """Returns a store whose experts have one byte each."""
    return HostStore([[{"up": np.zeros(1, np.int8)}] * number for number in experts])


def _as_it_is(arrays: ExpertArrays) -> DeviceArrays:
    return arrays  # type: ignore[return-value]  # no device has a part in a replay
