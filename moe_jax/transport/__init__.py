"""How tokens travel to experts and back: executors of a plan, equal in value and gradient."""

from moe_jax.transport.einsum import Einsum
from moe_jax.transport.gather import Gather
from moe_jax.transport.ragged import in_blocks

Transport = Einsum | Gather

__all__ = ["Einsum", "Gather", "Transport", "in_blocks"]
