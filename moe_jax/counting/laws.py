"""Published scaling laws of MoE models: the loss to expect, and the model to train on a budget.

Clark et al. 2022 (2202.01169) vary parameters and experts at a fixed 130B tokens; Krajewski et al.
2024 (2402.07871) vary parameters, tokens and granularity at a fixed 64 experts. Losses are in nats
per token of each paper's own data and tokenizer, so one paper's do not compare with the other's.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable

import numpy as np

from moe_jax.errors import ConfigError

Number = float | np.ndarray

# Krajewski et al.: width per block (d = 64 n_blocks), FLOPs per parameter and of the router.
WIDTH_PER_BLOCK, FLOPS_PER_PARAMETER, FLOPS_OF_ROUTING = 64, 6, 14
GRANULARITIES = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_BLOCKS = 4096


def _checked(name: str, value: Number, minimum: float | None = None) -> Number:
    """Returns ``value`` as float; refuses it unless finite, and above 0 or from ``minimum`` up."""
    if isinstance(value, numbers.Real | np.ndarray):
        values = np.asarray(value, float)
        enough = values > 0 if minimum is None else values >= minimum
        if np.all(enough & np.isfinite(values)):
            return values[()]
    wanted = "above 0" if minimum is None else f"of at least {minimum:g}"
    raise ConfigError(f"{name}={value!r} must be a finite number {wanted}")


@dataclasses.dataclass(frozen=True)
class Clark:
    """Loss against parameters and experts (Clark et al. 2022, equation 1 and table 3).

    Measured on 15M to 1.3B parameters and up to 512 experts, all trained on 130B tokens.

    Attributes:
        a: slope of log10 loss in log10 parameters.
        b: slope of log10 loss in log10 effective experts.
        c: how much of the experts' gain each tenfold of parameters takes away.
        d: log10 loss of one parameter and one effective expert.
        e_start: effective experts of the dense model.
        e_max: effective experts that no number of experts exceeds.
        n_cutoff: parameters of the base model from which routing no longer helps.
    """

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float
    n_cutoff: float

    def __post_init__(self):
        _checked("e_start", self.e_start)
        _checked("n_cutoff", self.n_cutoff)
        if not self.e_max > self.e_start:
            raise ConfigError(f"e_max={self.e_max!r} must be above e_start={self.e_start!r}")

    def effective_experts(self, experts: Number) -> Number:
        """Returns the experts as the law counts them: from ``e_start`` at 1 to ``e_max``.

        Equation 1's saturating transform: ``1/Ê = 1/(E - 1 + 1/(1/e_start - 1/e_max)) + 1/e_max``.
        """
        experts = _checked("experts", experts, 1)
        start = 1 / (1 / self.e_start - 1 / self.e_max)
        return 1 / (1 / (experts - 1 + start) + 1 / self.e_max)

    def loss(self, params: Number, experts: Number) -> Number:
        """Returns the loss in nats per token after 130B tokens (equation 1).

        Args:
            params: parameters of the dense base model, the experts beyond the first not counted.
            experts: experts per routed layer; 1 is the dense model.
        """
        params = _checked("params", params)
        n, e = np.log10(params), np.log10(self.effective_experts(experts))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    @property
    def no_gain(self) -> float:
        """Parameters from which more experts do not lower the loss.

        The lesser of the published cutoff and ``10^(-b/c)``, where equation 8's slope in experts
        is 0: coefficients of three decimals put that elsewhere (RL-R 31.6B, published 85B).
        """
        return min(self.n_cutoff, 10 ** (-self.b / self.c)) if self.c > 0 else self.n_cutoff

    def effective_parameters(self, params: float, experts: float) -> float:
        """Returns the parameters of the dense model of equal loss (equation 11).

        Args:
            params: parameters of the base model, below ``no_gain``.
            experts: experts per routed layer; 1 returns ``params``.
        """
        params = _checked("params", params)
        if params >= self.no_gain:
            raise ConfigError(
                f"params={params:.4g} is beyond the cutoff of {self.no_gain:.4g}, from which more "
                "experts do not help; train a dense model or a smaller one"
            )
        effective = self.effective_experts(experts)
        dense_slope = self.a + self.c * math.log10(self.e_start)
        slope = self.a + self.c * math.log10(effective)
        gain = (effective / self.e_start) ** (self.b / dense_slope)
        return float(params ** (slope / dense_slope) * gain)


S_BASE = Clark(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478, 937e9)
RL_R = Clark(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982, 85e9)
HASH = Clark(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741, 83e9)


@dataclasses.dataclass(frozen=True)
class Krajewski:
    """Loss against parameters, tokens and granularity (Krajewski et al. 2024, equation 9, table 1).

    Measured on 129M to 3.7B total parameters, 16B to 130B tokens and granularity 1 to 16; the fit's
    RMSE is .015, and .019 on held-out runs. The printed coefficients put the paper's own optima up
    to .023 too low: within their last digit (alpha .1145, beta .1467) all come out within .001.

    Attributes:
        a: scale of the parameters' term.
        alpha: exponent of the parameters.
        b: scale of the tokens' term.
        beta: exponent of the tokens.
        g: what granularity can save of ``a + g``.
        gamma: exponent of granularity.
        c: loss of an unlimited model, in nats per token.
        experts: experts of granularity 1 that the law was fitted for; 1 is a dense model.
    """

    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float
    experts: int

    def __post_init__(self):
        _checked("experts", self.experts, 1)

    def loss(self, params: Number, tokens: Number, granularity: Number = 1) -> Number:
        """Returns the loss in nats per token (equation 9).

        Args:
            params: total parameters without embeddings, every expert counted. The paper names its
                models by active parameters and experts ("64 x 100M"); neither those nor their
                product give its losses.
            tokens: tokens of the training.
            granularity: how many experts each feed-forward layer's worth is split into, from 1 up.
        """
        params = _checked("params", params)
        tokens = _checked("tokens", tokens)
        granularity = _checked("granularity", granularity, 1)
        width = (self.g / granularity**self.gamma + self.a) / params**self.alpha
        return self.c + width + self.b / tokens**self.beta


MOE = Krajewski(18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47, experts=64)
DENSE = Krajewski(16.3, 0.126, 26.7, 0.127, 0.0, 0.0, 0.47, experts=1)


def active_parameters(blocks: Number) -> Number:
    """Returns a token's parameters, ``12 d^2`` a block, without embeddings (Krajewski et al.)."""
    blocks = _checked("blocks", blocks)
    return 12 * WIDTH_PER_BLOCK**2 * blocks**3


def blocks_of(active_params: float) -> float:
    """Returns the blocks, in general no whole number, of a model of so many active parameters."""
    active_params = _checked("active_params", active_params)
    return (active_params / (12 * WIDTH_PER_BLOCK**2)) ** (1 / 3)


def total_parameters(blocks: Number, experts: Number = MOE.experts) -> Number:
    """Returns total parameters without embeddings, ``(4 + 8 experts) d^2`` a block.

    Attention has ``4 d^2`` and every expert ``8 d^2``, whatever the granularity; routers are left
    out. This is the ``N`` with which the law gives Krajewski et al.'s table 2.
    """
    blocks = _checked("blocks", blocks)
    experts = _checked("experts", experts, 1)
    return (4 + 8 * experts) * WIDTH_PER_BLOCK**2 * blocks**3


def flops(
    blocks: Number, tokens: Number, granularity: Number = 1, experts: int = MOE.experts
) -> Number:
    """Returns FLOPs of a training: ``(12 d^2 c_f + d E G c_r) D n_blocks`` (Krajewski et al.).

    Args:
        blocks: transformer blocks, of width ``d = 64 blocks``.
        tokens: tokens of the training, ``D``.
        granularity: ``G``.
        experts: ``E``; 1 is a dense model, which has no router to pay for.
    """
    blocks = _checked("blocks", blocks)
    tokens = _checked("tokens", tokens)
    granularity = _checked("granularity", granularity, 1)
    experts = _checked("experts", experts, 1)
    width = WIDTH_PER_BLOCK * blocks
    routing = width * experts * granularity * FLOPS_OF_ROUTING if experts > 1 else 0
    return (12 * width**2 * FLOPS_PER_PARAMETER + routing) * tokens * blocks


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The training of least loss on a budget.

    Attributes:
        blocks: transformer blocks, of width ``64 blocks``.
        tokens: tokens of the training.
        granularity: granularity of the experts.
        flops: the budget, all of it used.
        loss: in nats per token.
        active_params: parameters that a token meets, without embeddings.
        total_params: all parameters, without embeddings.
    """

    blocks: int
    tokens: float
    granularity: float
    flops: float
    loss: float
    active_params: float
    total_params: float


def compute_optimal(
    budget: float, law: Krajewski = MOE, granularities: Iterable[float] = GRANULARITIES
) -> Optimum:
    """Returns the least loss that ``budget`` FLOPs buy (Krajewski et al. 2024, table 2).

    Every whole number of blocks is tried at every granularity; the tokens are what is left to pay.

    Args:
        budget: FLOPs of the training.
        law: the loss, and the experts to count FLOPs and parameters with.
        granularities: what to choose from; of equal ones the first is taken.
    """
    budget = _checked("budget", budget)
    choices = np.array([_checked("granularity", choice, 1) for choice in granularities])
    if not choices.size:
        raise ConfigError("granularities is empty; name one at least")
    blocks = np.arange(1.0, _MOST_BLOCKS + 1)
    tokens = budget / flops(blocks, 1, choices[:, None], law.experts)
    tokens = np.broadcast_to(tokens, (choices.size, blocks.size))
    losses = law.loss(total_parameters(blocks, law.experts), tokens, choices[:, None])
    choice, place = np.unravel_index(np.argmin(losses), losses.shape)
    best = int(blocks[place])
    # At either end of the search the true optimum lies outside it.
    if best in (1, _MOST_BLOCKS):
        size = "small" if best == 1 else "large"
        raise ConfigError(f"budget={budget:.4g} FLOPs is too {size} for the search")
    return Optimum(
        best,
        float(tokens[choice, place]),
        float(choices[choice]),
        float(budget),
        float(losses[choice, place]),
        float(active_parameters(best)),
        float(total_parameters(best, law.experts)),
    )


def saving(budget: float) -> float:
    """Returns how many times ``budget`` FLOPs the dense model of equal loss costs.

    Both are compute-optimal, by ``MOE`` and ``DENSE`` (Krajewski et al. 2024).
    """
    target = compute_optimal(budget).loss
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        if compute_optimal(budget * 10**middle, DENSE).loss > target:
            low = middle
        else:
            high = middle
    return 10**high


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of Krajewski et al. 2024, table 2: compute-optimal models of 64 experts.

    Attributes:
        active_params: parameters that a token meets; the table prints ``64 x`` this.
        tokens: tokens of the training.
        granularity: granularity of the experts.
        flops: FLOPs of the training.
        loss: in nats per token.
    """

    active_params: float
    tokens: float
    granularity: int
    flops: float
    loss: float

    def predicted_flops(self) -> float:
        """Returns the FLOPs that the formula gives for this row."""
        return flops(blocks_of(self.active_params), self.tokens, self.granularity)

    def predicted_loss(self, law: Krajewski = MOE) -> float:
        """Returns the loss in nats per token that ``law`` gives for this row."""
        total = total_parameters(blocks_of(self.active_params), law.experts)
        return law.loss(total, self.tokens, self.granularity)


PUBLISHED = (
    Published(100e6, 4.37e9, 8, 2.95e18, 3.133),
    Published(1e9, 28.94e9, 16, 1.93e20, 2.491),
    Published(3e9, 72.9e9, 16, 1.41e21, 2.245),
    Published(7e9, 137.6e9, 32, 6.46e21, 2.076),
    Published(70e9, 941e9, 32, 4.16e23, 1.694),
    Published(300e9, 2.96e12, 64, 5.69e24, 1.503),
    Published(1e12, 7.94e12, 64, 4.97e25, 1.367),
)
