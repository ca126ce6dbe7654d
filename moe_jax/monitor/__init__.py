"""Alarms of a run: rules on its log that warn or stop it."""

from moe_jax.monitor.alarms import (
    Alarm,
    DeadExperts,
    Drift,
    Drops,
    LowEntropy,
    Overload,
    SilentBalance,
)
from moe_jax.monitor.watch import Seen, Watch

__all__ = [
    "Alarm",
    "DeadExperts",
    "Drift",
    "Drops",
    "LowEntropy",
    "Overload",
    "Seen",
    "SilentBalance",
    "Watch",
]
