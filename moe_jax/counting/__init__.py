"""Counts of parameters and FLOPs without allocation, published numbers, and scaling laws."""

from moe_jax.counting.claims import Claim, record
from moe_jax.counting.count import Cost, count
from moe_jax.models.config import Tokens

__all__ = ["Claim", "Cost", "Tokens", "count", "record"]
