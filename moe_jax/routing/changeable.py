"""The settings of a router that can change from step to step, without another program.

A step passes the values as scalars, by the names of this module, to ``Router.plan_group``. Arrays
keep the shapes that the router's own settings give them, so these settings are the largest values
of ``capacity_factor`` and ``top_k``.
"""

from __future__ import annotations

import math

from moe_jax.ranges import CapacityFactor, Chance, NonNegative, Positive, Range, Weight, ranges_of
from moe_jax.routing.head import NoHead
from moe_jax.routing.router import Router
from moe_jax.routing.score import GaussianNoise, Softmax
from moe_jax.routing.select import QuantileBias, TopK, TopTokens

_RANGES = {
    "capacity_factor": CapacityFactor,
    "top_k": Positive,
    "input_jitter": Chance,
    "noise": NonNegative,
}


def range_of(setting: str) -> Range:
    """Returns the range of a setting; a setting without a row is a weight of a loss."""
    return ranges_of(_RANGES.get(setting, Weight))[0]


def weight_name(loss: str) -> str:
    """Returns the name of the setting that is the weight of a loss."""
    return f"{loss}_weight"


def changeable(router: Router) -> dict[str, float]:
    """Returns the largest value of each setting that can change while the router trains.

    ``capacity_factor`` and ``top_k`` are at most the values of the router, for which slots and
    choices are allocated; other settings have no such bound. A setting that the router does not
    read in training is missing.

    Args:
        router: The router.
    """
    largest = {weight_name(part.name): math.inf for part in router.balance}
    select, score = router.select, router.score
    bounded = isinstance(select, TopTokens) and select.cap is not None
    if router.capacity.shares and select.slots() is None and not bounded:
        largest["capacity_factor"] = router.capacity.factor
    second = any(part.needs_second_choice for part in router.balance)
    sized = isinstance(select, TopK) and isinstance(select.rank, QuantileBias)
    if isinstance(select, TopK) and not sized and not second and not router.capacity.devices:
        largest["top_k"] = select.k
    if not isinstance(router.head, NoHead):
        largest["input_jitter"] = math.inf
    if isinstance(score, Softmax) and isinstance(score.noise, GaussianNoise):
        largest["noise"] = math.inf
    return largest
