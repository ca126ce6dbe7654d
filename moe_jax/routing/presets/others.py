"""Older, balanced, hashed and forced routers."""

from __future__ import annotations

from typing import Literal

from moe_jax.ranges import (
    CapacityFactor,
    Chance,
    Factor,
    Iterations,
    NonNegative,
    Positive,
    PositiveShare,
    Vocabulary,
    Weight,
)
from moe_jax.routing.balance import Entropy, Importance, Load, LoadBalance
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.head import Linear, NoHead
from moe_jax.routing.presets.parts import slots_or_dropless, weighted
from moe_jax.routing.router import Router
from moe_jax.routing.score import (
    GaussianNoise,
    LearnedNoise,
    Sigmoid,
    Softmax,
    TwoLevelSoftmax,
    Uniform,
)
from moe_jax.routing.select import (
    Balanced,
    Everyone,
    Forced,
    Hash,
    Random,
    Sinkhorn,
    TopGroups,
    TopK,
    TopP,
)


def jacobs_1991() -> Router:
    """Adaptive mixtures of local experts (Jacobs et al. 1991): every expert, softly gated."""
    return Router(Softmax(), Everyone(), capacity=Capacity(dropless="always"))


def noisy_top_k(
    k: Positive = 4,
    importance_weight: Weight = 0.1,
    load_weight: Weight = 0.1,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Sparsely-gated MoE (Shazeer et al. 2017, 1701.06538): learned noise, two spread losses.

    The preset computes both losses per group, the paper over the whole batch.
    """
    return Router(
        score=Softmax(noise=LearnedNoise()),
        select=TopK(k, normalize=True),
        balance=weighted(Importance(importance_weight), Load(load_weight)),
        capacity=slots_or_dropless(capacity_factor),
        head=Linear(init="zeros"),
    )


def hierarchical(
    groups: Positive = 4,
    k_groups: Positive = 2,
    k: Positive = 2,
    importance_weight: Weight = 0.1,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Two-level gating (Shazeer et al. 2017, appendix B): groups of experts, then experts.

    The preset computes the importance loss per group of tokens, the paper over the whole batch.
    """
    return Router(
        score=TwoLevelSoftmax(groups),
        select=TopGroups(groups, k_groups, k),
        balance=weighted(Importance(importance_weight)),
        capacity=slots_or_dropless(capacity_factor),
    )


def base() -> Router:
    """BASE layers (Lewis et al. 2021, 2103.16716): balanced in training, greedy at test time."""
    return Router(
        Sigmoid(),
        Balanced(),
        capacity=Capacity(factor=1.0, dropless="eval", minimum=1),
    )


def sinkhorn(
    iterations: Iterations = 30,
    capacity_factor: CapacityFactor = 2.0,
    eval_capacity_factor: CapacityFactor = 2.0,
) -> Router:
    """S-BASE (Clark et al. 2022, 2202.01169): top-1 of a transport plan, greedy at test time."""
    return Router(
        Softmax(),
        TopK(1, rank=Sinkhorn(iterations)),
        capacity=Capacity(capacity_factor, eval_capacity_factor),
    )


def hash(  # noqa: A001
    kind: Literal["random", "modulo", "balanced"] = "random",
    vocab_size: Vocabulary = 32000,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Hash layers (Roller et al. 2021, 2106.04426): a fixed expert per token id."""
    return Router(
        Uniform(),
        Hash(kind, vocab_size),
        capacity=slots_or_dropless(capacity_factor),
        head=NoHead(),
    )


def adaptive_top_p(
    p: PositiveShare = 0.4,
    k_max: Positive = 4,
    balance_weight: Weight = 1e-2,
    entropy_weight: Weight = 1e-4,
    capacity_factor: CapacityFactor | None = None,
) -> Router:
    """Dynamic routing (Huang et al. 2024, 2403.07652): experts up to probability ``p``.

    The balance loss is computed per group; the entropy is a mean over tokens.
    """
    return Router(
        score=Softmax(),
        select=TopP(p, k_max),
        balance=weighted(LoadBalance(balance_weight, choices="all"), Entropy(entropy_weight)),
        capacity=slots_or_dropless(capacity_factor),
    )


def random(k: Positive = 1, capacity_factor: CapacityFactor | None = None) -> Router:
    """Random experts, for benchmarks; in evaluation tokens take turns, so that the load is even."""
    return Router(Uniform(), Random(k), capacity=slots_or_dropless(capacity_factor), head=NoHead())


def forced(
    k: Positive = 1,
    scored_by: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = False,
    scale: Factor = 1.0,
    renormalize: bool = False,
    noise_std: NonNegative = 0.0,
    input_jitter: Chance = 0.0,
    input_dropout: Chance = 0.0,
) -> Router:
    """The experts of a recorded routing, with this model's own gates; for replay.

    The arguments equal the settings of the recorded router; if experts chose tokens there, ``k`` is
    the number of experts.
    """
    noise = GaussianNoise(noise_std) if noise_std else None
    return Router(
        score=Softmax(noise=noise) if scored_by == "softmax" else Sigmoid(),
        select=Forced(k, normalize, scale),
        capacity=Capacity(dropless="always", renormalize=renormalize),
        input_jitter=input_jitter,
        input_dropout=input_dropout,
    )
