"""Routers of models with released weights; without a capacity factor they drop no choices.

A balance loss is a mean over spans of tokens. Each docstring names the span of the source, and the
span of the preset if it differs.
"""

from __future__ import annotations

from typing import Literal

from moe_jax.ranges import CapacityFactor, Factor, NonNegative, Positive, Weight
from moe_jax.routing.balance import (
    CommunicationBalance,
    DeviceBalance,
    LoadBalance,
    ZLoss,
)
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.head import Linear
from moe_jax.routing.presets.parts import every_choice_losses, slots_or_dropless, weighted
from moe_jax.routing.router import Router
from moe_jax.routing.score import Sigmoid, Softmax
from moe_jax.routing.select import Bias, Limit, TopK


def mixtral(
    k: Positive = 2, balance_weight: Weight = 0.02, capacity_factor: CapacityFactor | None = None
) -> Router:
    """Mixtral (Jiang et al. 2024, 2401.04088): softmax over the logits of the top 2.

    The preset computes the balance loss per group of each layer; ``transformers`` computes one over
    all tokens of the batch in all layers together.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, normalize=True),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
    )


def qwen2_moe(
    k: Positive = 4, balance_weight: Weight = 1e-3, capacity_factor: CapacityFactor | None = None
) -> Router:
    """Qwen1.5/2-MoE: raw top-4; the layer adds a shared expert with a sigmoid gate.

    The preset computes the balance loss per group, ``transformers`` over the batch and all layers.
    """
    return Router(
        score=Softmax(),
        select=TopK(k),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
    )


def qwen3_moe(
    k: Positive = 8,
    balance_weight: Weight = 1e-3,
    capacity_factor: CapacityFactor | None = None,
    over: Literal["span", "batch"] = "batch",
) -> Router:
    """Qwen3-MoE (2505.09388): normalised top-8, no shared expert.

    The fractions of the balance loss are counted over the global batch (Qiu et al. 2025,
    2501.11873), so a group or a device may prefer some experts; ``over="span"`` counts them per
    group.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, normalize=True),
        balance=weighted(LoadBalance(balance_weight, choices="all", over=over)),
        capacity=slots_or_dropless(capacity_factor),
    )


def olmoe(
    k: Positive = 8,
    balance_weight: Weight = 1e-2,
    z_weight: Weight = 1e-3,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """OLMoE (Muennighoff et al. 2024, 2409.02060, section 2): raw top-8 with z-loss.

    The preset computes the balance loss per group, OLMoE over the tokens of one device.
    """
    return Router(
        score=Softmax(),
        select=TopK(k),
        balance=weighted(LoadBalance(balance_weight, choices="mean"), ZLoss(z_weight)),
        capacity=slots_or_dropless(capacity_factor),
    )


def dbrx(
    k: Positive = 4, balance_weight: Weight = 0.05, capacity_factor: CapacityFactor | None = None
) -> Router:
    """DBRX's released configuration: top-4 of softmax, divided by their L1 norm.

    The preset computes the balance loss per group, ``transformers`` over the batch and all layers.
    """
    return mixtral(k, balance_weight, capacity_factor)


def deepseek_moe(
    k: Positive = 6,
    balance_weight: Weight = 1e-3,
    device_weight: Weight = 0.0,
    devices: Positive = 8,
    capacity_factor: CapacityFactor | None = None,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """DeepSeekMoE (Dai et al. 2024, 2401.06066): raw top-k, expert and device balance.

    Both losses are computed per sequence, independent of the groups. The length of the sequence is
    the paper's ``T`` (``seq_aux`` in the released configuration).
    """
    return Router(
        score=Softmax(),
        select=TopK(k),
        balance=weighted(
            LoadBalance(balance_weight, choices="mean", span=span),
            DeviceBalance(device_weight, devices, span=span),
        ),
        capacity=slots_or_dropless(capacity_factor),
    )


def deepseek_v2(
    k: Positive = 6,
    balance_weight: Weight = 3e-3,
    device_weight: Weight = 0.05,
    communication_weight: Weight = 0.02,
    devices: Positive = 8,
    keep_devices: Positive = 3,
    scale: Factor = 16.0,
    drop: bool = True,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """DeepSeek-V2 (2405.04434, section 2.2): experts on few devices, three balance losses.

    In training each device drops the choices of lowest gate beyond an even share of the group. All
    three losses are computed per sequence (equations 23 to 31), independent of the groups.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, scale=scale, limit=Limit(devices, keep_devices)),
        balance=weighted(
            LoadBalance(balance_weight, choices="mean", span=span),
            DeviceBalance(device_weight, devices, span=span),
            CommunicationBalance(communication_weight, devices, keep_devices, span=span),
        ),
        capacity=Capacity(
            factor=1.0, dropless="eval" if drop else "always", devices=devices if drop else 0
        ),
    )


def deepseek_v3(
    k: Positive = 8,
    balance_weight: Weight = 1e-4,
    bias_rate: NonNegative = 1e-3,
    groups: Positive = 8,
    keep_groups: Positive = 4,
    scale: Factor = 2.5,
    capacity_factor: CapacityFactor | None = None,
    span: Literal["group", "sequence"] = "sequence",
) -> Router:
    """DeepSeek-V3 (2412.19437, equations 12-20): sigmoid, bias update, groups by their two best.

    The balance loss is computed per sequence, a row of the batch, independent of the groups. The
    bias follows the load of the whole batch.
    """
    return Router(
        score=Sigmoid(),
        select=TopK(
            k,
            normalize=True,
            scale=scale,
            rank=Bias(bias_rate),
            limit=Limit(groups, keep_groups, by="top2"),
        ),
        balance=weighted(LoadBalance(balance_weight, choices="mean", per_token=True, span=span)),
        capacity=slots_or_dropless(capacity_factor),
    )


def loss_free(
    k: Positive = 6,
    bias_rate: NonNegative = 1e-3,
    rule: Literal["sign", "proportional", "centred"] = "sign",
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Loss-Free Balancing (Wang et al. 2024, 2408.15664, algorithm 1): a bias and no loss."""
    return Router(
        score=Sigmoid(),
        select=TopK(k, rank=Bias(bias_rate, rule)),
        capacity=slots_or_dropless(capacity_factor),
    )


def llama4(
    k: Positive = 1, balance_weight: Weight = 1e-3, capacity_factor: CapacityFactor | None = None
) -> Router:
    """Llama 4 (transformers): the sigmoid of the top logit scales the input of the expert.

    The preset computes a balance loss per group; the released code has no balance loss.
    """
    return Router(
        score=Sigmoid(),
        select=TopK(k),
        balance=weighted(LoadBalance(balance_weight, choices="mean", per_token=True)),
        capacity=slots_or_dropless(capacity_factor),
        gate_on="in",
    )


def gpt_oss(
    k: Positive = 4, balance_weight: Weight = 0.9, capacity_factor: CapacityFactor | None = None
) -> Router:
    """gpt-oss (transformers): logits with a bias, softmax over the logits of the top 4.

    The preset computes the balance loss per group, ``transformers`` over the batch and all layers.
    """
    return Router(
        score=Softmax(),
        select=TopK(k, normalize=True),
        balance=every_choice_losses(balance_weight),
        capacity=slots_or_dropless(capacity_factor),
        head=Linear(bias=True),
    )
