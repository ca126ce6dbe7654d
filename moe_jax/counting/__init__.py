"""Counts of parameters and FLOPs without allocation, published numbers, and scaling laws."""

from moe_jax.counting.claims import PublishedNumber, record
from moe_jax.counting.count import Cost, count
from moe_jax.models.config import Tokens

__all__ = ["PublishedNumber", "Cost", "Tokens", "count", "record"]
