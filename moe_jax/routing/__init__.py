"""Who goes where: routers on one group of tokens, and the plans they make."""

from moe_jax.routing.balance import LoadBalance, SecondBalance, TokenBalance, ZLoss
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.plan import Counts, Plan, Slots
from moe_jax.routing.presets import PRESETS, choices_of, preset
from moe_jax.routing.router import Router, route
from moe_jax.routing.score import Sigmoid, Softmax
from moe_jax.routing.select import Top2, TopK, TopTokens

__all__ = [
    "PRESETS",
    "Capacity",
    "Counts",
    "LoadBalance",
    "Plan",
    "Router",
    "SecondBalance",
    "Sigmoid",
    "Slots",
    "Softmax",
    "TokenBalance",
    "Top2",
    "TopK",
    "TopTokens",
    "ZLoss",
    "choices_of",
    "preset",
    "route",
]
