"""Serving: requests that share the steps of one model, and an endpoint for them."""

from moe_jax.serving.balance import BalancedEngine
from moe_jax.serving.engine import Engine
from moe_jax.serving.offloading import Offload
from moe_jax.serving.placement import copy_experts, device_loads, place
from moe_jax.serving.request import Ended, Generator, Request, Token
from moe_jax.serving.speculation import DraftModel, LookaheadModule, NGram, Speculation

__all__ = [
    "BalancedEngine",
    "DraftModel",
    "Ended",
    "Engine",
    "Generator",
    "LookaheadModule",
    "NGram",
    "Offload",
    "Request",
    "Speculation",
    "Token",
    "copy_experts",
    "device_loads",
    "place",
]
