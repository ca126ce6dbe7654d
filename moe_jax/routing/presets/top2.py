"""Two experts per token: GShard, GLaM, Mesh-TensorFlow, ST-MoE, fairseq and X-MoE."""

from __future__ import annotations

from typing import Literal

from moe_jax.ranges import CapacityFactor, EvalShare, Positive, Share, Weight
from moe_jax.routing.balance import LoadBalance, SecondBalance, ZLoss
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.head import Cosine
from moe_jax.routing.presets.parts import switch_losses, weighted
from moe_jax.routing.router import Router
from moe_jax.routing.score import Softmax
from moe_jax.routing.select import Top2, TopK


def gshard(
    capacity_factor: CapacityFactor = 2.0,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 0.0,
    second: Literal["all", "none", "threshold", "random"] = "random",
) -> Router:
    """GShard (Lepikhin et al. 2020, 2006.16668, Algorithm 1): top-2, random second expert.

    The balance loss is computed per group, as in Algorithm 1, with Switch's normalisation; GShard's
    own value is this loss divided by ``E**2``.
    """
    return Router(
        score=Softmax(),
        select=Top2(second, threshold=0.5, lost_choices_queue=True),
        balance=switch_losses(balance_weight, z_weight),
        capacity=Capacity(capacity_factor, eval_capacity_factor, minimum=1),
    )


def glam(
    capacity_factor: CapacityFactor = 2.0,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
) -> Router:
    """GLaM (Du et al. 2021, 2112.06905): GShard's top-2 where both experts always count.

    The balance loss is computed per group, as in GShard.
    """
    return gshard(capacity_factor, eval_capacity_factor, balance_weight, second="all")


def top2_mtf(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 0.0,
    second: Literal["all", "none", "threshold", "random"] = "random",
    threshold: Share = 0.2,
    second_balance_weight: Weight = 0.0,
) -> Router:
    """Mesh-TensorFlow's top-2 gating: second expert kept with probability ``min(1, g2/0.2)``.

    The balance losses of first and second choices are computed per group, as in the source.
    """
    return Router(
        score=Softmax(),
        select=Top2(second, threshold),
        balance=weighted(
            LoadBalance(balance_weight, padding="diluted"),
            SecondBalance(second_balance_weight),
            ZLoss(z_weight),
        ),
        capacity=Capacity(capacity_factor, eval_capacity_factor, rounding="floor"),
    )


def st_moe(
    capacity_factor: CapacityFactor = 1.25,
    eval_capacity_factor: CapacityFactor = 2.0,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 1e-3,
    threshold: Share = 0.2,
    priority: Literal["choice", "score"] = "choice",
) -> Router:
    """ST-MoE (Zoph et al. 2022, 2202.08906, section 3 and appendix G): top-2 with z-loss.

    The balance loss is computed per group, as in Mesh-TensorFlow.
    """
    return Router(
        score=Softmax(),
        select=Top2("random", threshold),
        balance=switch_losses(balance_weight, z_weight),
        capacity=Capacity(capacity_factor, eval_capacity_factor, priority=priority),
    )


def fairseq_top2(
    balance_weight: Weight = 1.0,
    second: Literal["sampling", "random", "all"] = "sampling",
    normalize_before_dropping: bool = False,
    eval_token_fraction: EvalShare = 0.25,
    pad_mask: bool = False,
    batch_prioritized: bool = False,
    fp32_gating: bool = True,
) -> Router:
    """Fairseq's Top2Gate (branch ``moe``) with its flags by name, ``2 * ceil(S / E)`` slots.

    Without a key the second expert is the second best; fairseq samples in evaluation too. Fairseq's
    default computes the gate in half precision, here ``fp32_gating=False``. The preset computes the
    balance loss per group, fairseq over the tokens of one device.
    """
    return Router(
        score=Softmax(),
        select=Top2(second, threshold=0.5, normalize=normalize_before_dropping),
        balance=weighted(LoadBalance(balance_weight, padding="unsent")),
        capacity=Capacity(
            factor=2.0,
            eval_factor=2.0,
            eval_fraction=max(eval_token_fraction, 0.0),
            minimum=1,
            rounding="share",
            priority="score" if batch_prioritized else "choice",
            renormalize=not normalize_before_dropping,
        ),
        precision="float32" if fp32_gating else "input",
        mask_padding=pad_mask,
    )


def fairseq_top1(
    balance_weight: Weight = 1.0,
    capacity_factor: CapacityFactor = 1.0,
    eval_token_fraction: EvalShare = 0.25,
    pad_mask: bool = False,
    batch_prioritized: bool = False,
    fp32_gating: bool = True,
) -> Router:
    """Fairseq's Top1Gate (``--moe-top1-expert``): ``int(1.0 * ceil(S / E))`` slots, raw gate.

    The preset computes the balance loss per group, fairseq over the tokens of one device.
    """
    return Router(
        score=Softmax(),
        select=TopK(1),
        balance=weighted(LoadBalance(balance_weight, padding="unsent")),
        capacity=Capacity(
            factor=capacity_factor,
            eval_factor=capacity_factor,
            eval_fraction=max(eval_token_fraction, 0.0),
            minimum=1,
            rounding="share",
            priority="score" if batch_prioritized else "choice",
        ),
        precision="float32" if fp32_gating else "input",
        mask_padding=pad_mask,
    )


def xmoe(
    balance_weight: Weight = 1e-2,
    dim: Positive = 16,
    unit_tokens: bool = False,
    eval_token_fraction: EvalShare = 0.25,
) -> Router:
    """X-MoE (Chi et al. 2022, 2204.09179) as in torchscale: cosine logits, random second expert.

    The preset computes the balance loss per group, torchscale over the tokens of one device.
    """
    return Router(
        score=Softmax(),
        select=Top2("random", threshold=0.5),
        balance=weighted(LoadBalance(balance_weight, padding="unsent")),
        capacity=Capacity(
            2.0,
            2.0,
            eval_fraction=max(eval_token_fraction, 0.0),
            minimum=1,
            rounding="share",
        ),
        head=Cosine(dim, unit_tokens),
    )
