"""What a configuration costs, known without running it."""

from moe_jax.planning.count import Cost, count

__all__ = ["Cost", "count"]
