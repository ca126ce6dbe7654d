"""Routers of models and papers of 2025 and 2026; without a capacity factor they drop no choices.

A balance loss is a mean over spans of tokens. Each docstring names the span.
"""

from __future__ import annotations

from typing import Literal

from moe_jax.ranges import (
    CapacityFactor,
    Chance,
    Factor,
    Growth,
    Natural,
    NonNegative,
    Offset,
    Positive,
    PositiveShare,
    Share,
    Weight,
)
from moe_jax.routing.balance import FreeBalance, LoadBalance, SparsityLoss
from moe_jax.routing.free import FreeExperts
from moe_jax.routing.normed_heads import NormedLinear
from moe_jax.routing.presets.parts import every_choice_losses, slots_or_dropless, weighted
from moe_jax.routing.residual_heads import ResidualLinear, ResidualMLP
from moe_jax.routing.router import Router
from moe_jax.routing.score import Relu, Score, Sigmoid, Softmax, SqrtSoftplus
from moe_jax.routing.select import (
    Active,
    Bias,
    ByToken,
    ComputeBias,
    PIBias,
    QuantileBias,
    RoundedTopK,
    SparseMixer,
    Threshold,
    TopK,
)


def glm4_moe(
    k: Positive = 8,
    balance_weight: Weight = 1e-4,
    bias_rate: NonNegative = 1e-3,
    scale: Factor = 1.0,
    capacity_factor: CapacityFactor | None = None,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """GLM-4.5 (2508.06471): DeepSeek-V3's sigmoid and bias without groups of experts.

    The balance loss is computed per sequence. ``scale`` is 1 in GLM-4.5-Air and 2.5 in GLM-4.5.
    """
    return _biased(Sigmoid(), k, balance_weight, bias_rate, scale, capacity_factor, span)


def kimi_k2(
    k: Positive = 8,
    balance_weight: Weight = 1e-4,
    bias_rate: NonNegative = 1e-3,
    scale: Factor = 2.827,
    capacity_factor: CapacityFactor | None = None,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """Kimi K2 (2507.20534): DeepSeek-V3's router without groups, 8 of 384 experts.

    The balance loss is computed per sequence, with the weights of DeepSeek-V3.
    """
    return _biased(Sigmoid(), k, balance_weight, bias_rate, scale, capacity_factor, span)


def minimax_m2(
    k: Positive = 8,
    balance_weight: Weight = 1e-3,
    bias_rate: NonNegative = 1e-3,
    capacity_factor: CapacityFactor | None = None,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """MiniMax-M2 (transformers): sigmoid, a bias in the choice, gates divided by their sum.

    The preset computes the balance loss per sequence, with the weight in the configuration.
    """
    return _biased(Sigmoid(), k, balance_weight, bias_rate, 1.0, capacity_factor, span)


def deepseek_v4(
    k: Positive = 6,
    balance_weight: Weight = 1e-4,
    bias_rate: NonNegative = 1e-3,
    scale: Factor = 1.5,
    capacity_factor: CapacityFactor | None = None,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """DeepSeek-V4 (transformers): the root of the softplus as score, a bias, no groups.

    The balance loss is computed per sequence, with the weights of DeepSeek-V3. The first three
    layers have the router ``deepseek_v4_hash``.
    """
    return _biased(SqrtSoftplus(), k, balance_weight, bias_rate, scale, capacity_factor, span)


def deepseek_v4_hash(
    k: Positive = 6,
    scale: Factor = 1.5,
    table: str = "",
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """DeepSeek-V4's first layers (transformers): experts by token id, with learned gates.

    ``table`` is a NumPy file with the experts of every id (``tid2eid``), which ``moe-jax tables``
    writes from the released weights; without it a hash of the id selects them.
    """
    return Router(
        score=SqrtSoftplus(),
        select=TopK(k, normalize=True, scale=scale, rank=ByToken(table=table)),
        capacity=slots_or_dropless(capacity_factor),
    )


def ernie4_5_moe(
    k: Positive = 6,
    balance_weight: Weight = 1e-3,
    bias_rate: NonNegative = 1e-3,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """ERNIE 4.5 (transformers): softmax, a bias in the choice, gates divided by their sum.

    The preset computes the balance loss per group, ``transformers`` over the batch and all layers.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, normalize=True, rank=Bias(bias_rate)),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
    )


def cohere2_moe(
    k: Positive = 2,
    gate: Literal["softmax", "sigmoid"] = "softmax",
    balance_weight: Weight = 1e-2,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Cohere2-MoE (transformers): a softmax of the best logits, or their normalised sigmoids.

    The preset computes a balance loss per group; the released code has no balance loss.
    """
    return Router(
        score=Softmax() if gate == "softmax" else Sigmoid(),
        select=TopK(k, normalize=True),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
    )


def moe_plus_plus(
    k: Positive = 2,
    constant: Natural = 2,
    copy: Natural = 1,
    zero: Natural = 1,
    balance_weight: Weight = 1e-2,
    free_share: Share = 0.75,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """MoE++ (Jin et al. 2024, 2410.07348): free experts beside the others, residual logits.

    A map of the logits of the MoE layer before is added to the logits of each layer. The balance
    loss is computed per group; free experts count with ``free_share``, the paper's ``tau``. Gates
    are the paper's; the released code also divides them by their sum.
    """
    free = FreeExperts(constant, copy, zero)
    return Router(
        score=Softmax(),
        select=TopK(k),
        balance=weighted(FreeBalance(balance_weight, free.count, free_share)),
        capacity=slots_or_dropless(capacity_factor),
        head=ResidualLinear(),
        free=free,
    )


def longcat_flash(
    k: Positive = 12,
    copy: Natural = 256,
    compute: PositiveShare = 2 / 3,
    bias_rate: NonNegative = 1e-3,
    scale: Factor = 6.0,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """LongCat-Flash (2509.01322; transformers): 12 of 512 experts and 256 copies of the token.

    The bias keeps the share ``compute`` of the choices with computation, 8 of 12 in the paper.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, scale=scale, rank=ComputeBias(bias_rate, copy, compute)),
        capacity=slots_or_dropless(capacity_factor),
        free=FreeExperts(copy=copy),
    )


def gemma4(
    k: Positive = 8,
    balance_weight: Weight = 1e-2,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Gemma 4 (transformers): logits of the normalised token, and a learned scale per expert.

    The preset computes a balance loss per group; the released code has no balance loss.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, normalize=True, expert_scale=True),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
        head=NormedLinear(),
    )


def zaya(
    dim: Positive = 256,
    zero: Natural = 1,
    offset: Offset = -1.0,
    bias_rate: NonNegative = 1e-3,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """ZAYA1 (transformers): logits by a network, one expert, and an expert that skips the layer.

    The bias of the skipping expert is ``offset``. The network reads a projection of the token plus
    the scaled sum of the layer before. The preset moves the other biases as in LongCat-Flash,
    because the released code does not move them.
    """
    return Router(
        score=Softmax(),
        select=TopK(1, rank=ComputeBias(bias_rate, zero, offset=offset)),
        capacity=slots_or_dropless(capacity_factor),
        head=ResidualMLP(dim),
        free=FreeExperts(zero=zero),
    )


def phimoe(
    k: Positive = 2,
    jitter: Share = 1e-2,
    balance_weight: Weight = 1e-3,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Phi-3.5-MoE (GRIN, 2409.12136): experts drawn near the best, with SparseMixer's gradient.

    The preset computes the balance loss per group, ``transformers`` over the batch and all layers.
    """
    return Router(
        score=Softmax(),
        select=SparseMixer(k, jitter),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
    )


def token_rounding(
    k: Positive = 8,
    tile: Positive = 128,
    rounding: Literal["nearest", "up", "down"] = "nearest",
    balance_weight: Weight = 1e-2,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Token rounding (SonicMoE, 2512.14080): in training each expert takes whole tiles of tokens.

    Tiles are filled per group of tokens, and the balance loss is computed per group.
    """
    return Router(
        score=Softmax(),
        select=RoundedTopK(k, tile, rounding),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
    )


def remoe(
    k: Positive = 2,
    l1_weight: Weight = 1e-8,
    growth: Growth = 1.2,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """ReMoE (Wang et al. 2024, 2412.14711): ReLU gates, and a loss that keeps their number at k.

    The loss is computed per group, and each layer adapts a weight of its own.
    """
    return Router(
        score=Relu(),
        select=Active(k),
        balance=weighted(SparsityLoss(l1_weight, k, growth)),
        capacity=slots_or_dropless(capacity_factor),
    )


def expert_threshold(
    k: Positive = 1,
    decay: Chance = 0.99,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Expert threshold routing (2603.11535): an expert takes all tokens above its average cut."""
    return Router(
        score=Sigmoid(),
        select=Threshold(k, decay),
        capacity=slots_or_dropless(capacity_factor),
    )


def quantile_balancing(
    k: Positive = 8,
    decay: Chance = 0.0,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Quantile balancing (Megatron-LM ``qb_dual_update``): biases from quantiles of the scores.

    There is no loss: each step sets the bias of an expert so that an even share of the step's
    tokens would have chosen it.
    """
    return Router(
        score=Sigmoid(),
        select=TopK(k, normalize=True, rank=QuantileBias(decay)),
        capacity=slots_or_dropless(capacity_factor),
    )


def pi_balancing(
    k: Positive = 8,
    bias_rate: NonNegative = 1e-3,
    bias_gain: NonNegative = 1e-2,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Loss-Free Balancing whose bias is a proportional-integral controller of the load."""
    return Router(
        score=Sigmoid(),
        select=TopK(k, normalize=True, rank=PIBias(bias_rate, bias_gain)),
        capacity=slots_or_dropless(capacity_factor),
    )


def _biased(
    score: Score,
    k: Positive,
    balance_weight: Weight,
    bias_rate: NonNegative,
    scale: Factor,
    capacity_factor: CapacityFactor | None,
    span: Literal["group", "sequence"],
) -> Router:
    """Returns DeepSeek-V3's router without groups of experts, with another score."""
    return Router(
        score=score,
        select=TopK(k, normalize=True, scale=scale, rank=Bias(bias_rate)),
        balance=weighted(LoadBalance(balance_weight, choices="mean", per_token=True, span=span)),
        capacity=slots_or_dropless(capacity_factor),
    )
