"""Auxiliary losses that balance the load and bound the logits; each is unweighted, of one group."""

from moe_jax.routing.balance.base import BATCH_LOAD, Balance, Evidence
from moe_jax.routing.balance.importance import Importance, Load
from moe_jax.routing.balance.load import (
    CommunicationBalance,
    DeviceBalance,
    FreeBalance,
    LoadBalance,
    SecondBalance,
)
from moe_jax.routing.balance.logits import Entropy, TokenBalance, ZLoss
from moe_jax.routing.balance.sparsity import SparsityLoss

__all__ = [
    "Balance",
    "CommunicationBalance",
    "DeviceBalance",
    "Entropy",
    "FreeBalance",
    "BATCH_LOAD",
    "Evidence",
    "Importance",
    "Load",
    "LoadBalance",
    "SecondBalance",
    "SparsityLoss",
    "TokenBalance",
    "ZLoss",
]
