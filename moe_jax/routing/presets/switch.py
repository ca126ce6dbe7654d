"""Switch Transformer and its descendants: one expert per token, and V-MoE."""

from __future__ import annotations

from typing import Literal

from moe_jax.ranges import CapacityFactor, Chance, NonNegative, Positive, Weight
from moe_jax.routing.balance import Importance, Load, LoadBalance, ZLoss
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.head import Linear
from moe_jax.routing.presets.parts import switch_losses, weighted
from moe_jax.routing.router import Router
from moe_jax.routing.score import GaussianNoise, Softmax
from moe_jax.routing.select import Sampled, TopK


def switch(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 0.0,
    input_jitter: Chance = 1e-2,
    precision: Literal["float32", "input", "bfloat16_product"] = "float32",
    sample: bool = False,
    input_dropout: Chance = 0.0,
) -> Router:
    """Switch Transformer (Fedus et al. 2021, 2101.03961, section 2.2): top-1, raw gate.

    The balance loss is computed per group; Mesh-TensorFlow computes it over the tokens of one core.
    Appendix C explores by jitter, by ``sample`` (a draw from the softmax, with the probability of
    the drawn expert as gate), and by ``input_dropout`` (0.1 in Mesh-TensorFlow).
    """
    return Router(
        score=Softmax(),
        select=TopK(1, rank=Sampled() if sample else None),
        balance=switch_losses(balance_weight, z_weight),
        capacity=Capacity(capacity_factor, eval_capacity_factor),
        input_jitter=input_jitter,
        precision=precision,
        input_dropout=input_dropout,
    )


def switch_mtf(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 0.0,
    input_jitter: Chance = 1e-2,
    priority: Literal["choice", "score"] = "choice",
) -> Router:
    """The code the Switch paper cites (Mesh-TensorFlow): its capacity rule and padding.

    The balance loss is computed per group, as in the source, and counts padding.
    """
    return Router(
        score=Softmax(),
        select=TopK(1),
        balance=weighted(LoadBalance(balance_weight, padding="counted"), ZLoss(z_weight)),
        capacity=Capacity(
            capacity_factor, eval_capacity_factor, rounding="floor", priority=priority
        ),
        input_jitter=input_jitter,
    )


def switch_t5x(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 0.0,
    k: Positive = 1,
    priority: Literal["choice", "score"] = "choice",
) -> Router:
    """The released T5X/flaxformer configs: no jitter, router from N(0, 0.02), rounded capacity.

    With ``k=2`` the preset is their ``tokens_choose``, with raw gates and a balance loss over all
    choices. The balance loss is computed per group, as in the source.
    """
    return Router(
        score=Softmax(),
        select=TopK(k),
        balance=weighted(
            LoadBalance(balance_weight, choices="all", padding="diluted"),
            ZLoss(z_weight, padding="zeroed"),
        ),
        capacity=Capacity(
            capacity_factor, eval_capacity_factor, rounding="round", priority=priority
        ),
        head=Linear(init="normal"),
    )


def switch_max(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    input_jitter: Chance = 1e-2,
) -> Router:
    """Mesh-TensorFlow's ``switch_max``: Switch with slots in order of the gates.

    The balance loss is computed per group, as in the source.
    """
    return switch_mtf(
        capacity_factor,
        eval_capacity_factor,
        balance_weight,
        input_jitter=input_jitter,
        priority="score",
    )


def no_token_left_behind(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    k: Positive = 4,
    input_jitter: Chance = 1e-2,
) -> Router:
    """Switch appendix B: a token whose expert is full tries its next best, up to ``k``.

    The balance loss is computed per group, as in ``switch_mtf``.
    """
    return Router(
        score=Softmax(),
        select=TopK(k),
        balance=(LoadBalance(balance_weight, choices="mean", padding="counted"),),
        capacity=Capacity(capacity_factor, eval_capacity_factor, rounding="floor", reroute=True),
        input_jitter=input_jitter,
    )


def vmoe(
    capacity_factor: CapacityFactor = 1.05,
    eval_capacity_factor: CapacityFactor = 1.05,
    k: Positive = 2,
    noise_std: NonNegative = 1.0,
    importance_weight: Weight = 5e-3,
    load_weight: Weight = 5e-3,
    priority: Literal["choice", "score"] = "score",
) -> Router:
    """V-MoE (Riquelme et al. 2021, 2106.05974): noise, raw top-2, batch-prioritised slots.

    The released models were trained with ``priority="choice"``. Both losses are computed per group,
    as in the released code.
    """
    return Router(
        score=Softmax(noise=GaussianNoise(noise_std)),
        select=TopK(k),
        balance=weighted(
            Importance(importance_weight, of="scores"), Load(load_weight, excluding=False)
        ),
        capacity=Capacity(
            capacity_factor,
            eval_capacity_factor,
            minimum=1,
            multiple=4,
            per_choice=True,
            priority=priority,
        ),
    )
