"""Parts that several presets share."""

from __future__ import annotations

from moe_jax.ranges import CapacityFactor, Weight
from moe_jax.routing.balance import Balance, LoadBalance, ZLoss
from moe_jax.routing.capacity import Capacity


def weighted(*parts: Balance) -> tuple[Balance, ...]:
    """Returns the losses with a nonzero weight."""
    return tuple(part for part in parts if part.weight)


def switch_losses(balance_weight: Weight, z_weight: Weight) -> tuple[Balance, ...]:
    """Returns Switch's balance loss and ST-MoE's z-loss."""
    return weighted(LoadBalance(balance_weight), ZLoss(z_weight))


def every_choice_losses(balance_weight: Weight, z_weight: Weight = 0.0) -> tuple[Balance, ...]:
    """Returns the balance loss of ``transformers``, over all choices, and the z-loss."""
    return weighted(LoadBalance(balance_weight, choices="all"), ZLoss(z_weight))


def slots_or_dropless(capacity_factor: CapacityFactor | None) -> Capacity:
    """Returns a capacity rule that drops no choices, or a rule with this factor per choice."""
    if capacity_factor is None:
        return Capacity(dropless="always")
    return Capacity(capacity_factor, capacity_factor, per_choice=True)
