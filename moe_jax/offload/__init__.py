"""Offloading: a device holds some experts, and the others are in host memory or in files."""

from moe_jax.offload.cache import DeviceArrays, ExpertCache, OffloadCounts
from moe_jax.offload.file_store import FileStore, write_experts
from moe_jax.offload.forms import quantised_expert, weights_of
from moe_jax.offload.policy import Clock, LeastRecentlyUsed, LeastStale, Pinned, Policy, hottest
from moe_jax.offload.predict import NextRouter, NoPrediction, Predictor, Traces
from moe_jax.offload.replay import by_position, replayed
from moe_jax.offload.store import ExpertArrays, ExpertId, HostStore, Store, arrays_of, experts_of

__all__ = [
    "Clock",
    "DeviceArrays",
    "ExpertArrays",
    "ExpertCache",
    "ExpertId",
    "FileStore",
    "HostStore",
    "LeastRecentlyUsed",
    "LeastStale",
    "NextRouter",
    "NoPrediction",
    "OffloadCounts",
    "Pinned",
    "Policy",
    "Predictor",
    "Store",
    "Traces",
    "arrays_of",
    "by_position",
    "experts_of",
    "hottest",
    "quantised_expert",
    "replayed",
    "weights_of",
    "write_experts",
]
