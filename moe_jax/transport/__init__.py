"""How tokens travel to experts and back: executors of a plan, equal in value and gradient."""

from moe_jax.transport.dispatch import Dispatch, Transport
from moe_jax.transport.einsum import Einsum
from moe_jax.transport.gather import Gather
from moe_jax.transport.ragged import Ragged, in_blocks
from moe_jax.transport.ring import Ring
from moe_jax.transport.slots import InSlots
from moe_jax.transport.table import (
    TABLE,
    AnyWidthExchangeName,
    Cost,
    ExchangeName,
    Implementation,
    TransportName,
    check,
    implementation,
)

__all__ = [
    "TABLE",
    "AnyWidthExchangeName",
    "Cost",
    "Dispatch",
    "Einsum",
    "ExchangeName",
    "Gather",
    "Implementation",
    "InSlots",
    "Ragged",
    "Ring",
    "Transport",
    "TransportName",
    "check",
    "implementation",
    "in_blocks",
]
