"""Routers in which experts choose tokens, or mixtures of tokens."""

from __future__ import annotations

from typing import Literal

from moe_jax.ranges import CapacityFactor, Chance, Positive, Weight
from moe_jax.routing.balance import TokenBalance, ZLoss
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.head import UnitSlots
from moe_jax.routing.presets.parts import weighted
from moe_jax.routing.router import Router
from moe_jax.routing.score import Softmax, Uniform
from moe_jax.routing.select import Cap, SoftSlots, TopTokens


def expert_choice(
    capacity_factor: CapacityFactor = 2.0,
    eval_capacity_factor: CapacityFactor = 2.0,
    z_weight: Weight = 0.0,
    over: Literal["experts", "tokens"] = "experts",
) -> Router:
    """Expert Choice (Zhou et al. 2022, 2202.09368, section 3.2): experts take their top tokens."""
    return Router(
        score=Softmax(over),
        select=TopTokens(),
        balance=weighted(ZLoss(z_weight)),
        capacity=Capacity(capacity_factor, eval_capacity_factor, minimum=1, rounding="floor"),
    )


def expert_choice_capped(
    capacity_factor: CapacityFactor = 2.0,
    eval_capacity_factor: CapacityFactor = 2.0,
    experts_per_token: Positive = 2,
) -> Router:
    """Expert Choice with at most ``b`` experts per token (section 3.3, EC-CAP2 and EC-CAP3)."""
    return Router(
        score=Softmax(),
        select=TopTokens(cap=Cap(experts_per_token)),
        capacity=Capacity(capacity_factor, eval_capacity_factor, minimum=1, rounding="floor"),
    )


def expert_choice_mtf(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 0.0,
    input_jitter: Chance = 1e-2,
) -> Router:
    """Mesh-TensorFlow's expert selection: softmax over tokens, a token averages its experts.

    The balance loss is computed per group, as in the source.
    """
    return Router(
        score=Softmax("tokens"),
        select=TopTokens(average=True),
        balance=weighted(TokenBalance(balance_weight), ZLoss(z_weight)),
        capacity=Capacity(capacity_factor, eval_capacity_factor, rounding="floor"),
        input_jitter=input_jitter,
    )


def soft_moe(slots_per_expert: Positive = 1) -> Router:
    """Soft MoE (Puigcerver et al. 2023, 2308.00951): slots mix all tokens; one per expert."""
    return Router(score=Uniform(), select=SoftSlots(slots_per_expert), head=UnitSlots())
