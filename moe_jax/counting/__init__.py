"""Parameters and FLOPs of a model, published numbers, and scaling laws; nothing is allocated."""

from moe_jax.counting.claims import Claim, record
from moe_jax.counting.count import Cost, count
from moe_jax.models.config import Tokens

__all__ = ["Claim", "Cost", "Tokens", "count", "record"]
