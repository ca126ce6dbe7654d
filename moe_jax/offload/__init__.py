"""Offloading: a device holds some experts, and the others are in host memory."""

from moe_jax.offload.cache import DeviceArrays, ExpertCache, OffloadCounts
from moe_jax.offload.policy import Clock, LeastRecentlyUsed, Policy
from moe_jax.offload.predict import NextRouter, NoPrediction, Predictor
from moe_jax.offload.store import ExpertArrays, ExpertId, HostStore, Store, arrays_of, experts_of

__all__ = [
    "Clock",
    "DeviceArrays",
    "ExpertArrays",
    "ExpertCache",
    "ExpertId",
    "HostStore",
    "LeastRecentlyUsed",
    "NextRouter",
    "NoPrediction",
    "OffloadCounts",
    "Policy",
    "Predictor",
    "Store",
    "arrays_of",
    "experts_of",
]
