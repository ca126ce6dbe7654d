"""Alarms of a run: rules on its log that warn or stop it."""

from moe_jax.monitor.alarms import (
    Alarm,
    DeadExperts,
    Drift,
    Drops,
    LowEntropy,
    Overload,
    Plateau,
    SaturatedGates,
    SilentBalance,
)
from moe_jax.monitor.watch import ALARMS, Seen, Watch, in_words, on_stream

__all__ = [
    "ALARMS",
    "Alarm",
    "DeadExperts",
    "Drift",
    "Drops",
    "LowEntropy",
    "Overload",
    "Plateau",
    "SaturatedGates",
    "Seen",
    "SilentBalance",
    "Watch",
    "in_words",
    "on_stream",
]
