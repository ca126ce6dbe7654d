"""What a configuration costs, known without running it."""

from moe_jax.planning.claims import Claim, record
from moe_jax.planning.count import Cost, Tokens, count

__all__ = ["Claim", "Cost", "Tokens", "count", "record"]
