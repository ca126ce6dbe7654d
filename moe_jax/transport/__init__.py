"""Transports bring tokens to experts and back; all of them have equal values and gradients."""

from moe_jax.transport.dispatch import Bounded, Dispatch, Transport
from moe_jax.transport.einsum import Einsum
from moe_jax.transport.gather import Gather
from moe_jax.transport.ragged import Ragged, SortedExperts, choices_of, in_order_of_experts
from moe_jax.transport.ragged_exchange import RaggedExchange
from moe_jax.transport.ring import Ring
from moe_jax.transport.slots import InSlots
from moe_jax.transport.table import (
    TABLE,
    AnyWidthExchangeName,
    ExchangeName,
    Implementation,
    TransportCost,
    TransportName,
    check,
    implementation,
)

__all__ = [
    "TABLE",
    "AnyWidthExchangeName",
    "Bounded",
    "TransportCost",
    "Dispatch",
    "Einsum",
    "ExchangeName",
    "Gather",
    "Implementation",
    "InSlots",
    "Ragged",
    "RaggedExchange",
    "Ring",
    "SortedExperts",
    "Transport",
    "TransportName",
    "check",
    "implementation",
    "choices_of",
    "in_order_of_experts",
]
