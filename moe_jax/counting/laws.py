"""Published scaling laws of MoE models: the expected loss, and the best model for a budget.

Clark et al. 2022 (2202.01169) vary parameters and experts at a fixed 130B tokens; Krajewski et al.
2024 (2402.07871) vary parameters, tokens and granularity at a fixed 64 experts. Losses are in nats
per token of each paper's own data and tokenizer, so losses of different papers do not compare.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError

Number = float | np.ndarray

# Krajewski et al.: width per block (d = 64 n_blocks), FLOPs per parameter, FLOPs of the router.
WIDTH_PER_BLOCK, FLOPS_PER_PARAMETER, FLOPS_OF_ROUTING = 64, 6, 14
GRANULARITIES = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_BLOCKS = 4096


def _checked(name: str, value: Number, minimum: float | None = None) -> Any:
    """Returns ``value`` as a float or as an array of floats, the same form as the argument.

    Raises:
        ConfigError: If a number is not finite, or not above 0, or below ``minimum`` if it is given.
    """
    if isinstance(value, numbers.Real | np.ndarray):
        values = np.asarray(value, float)
        enough = values > 0 if minimum is None else values >= minimum
        if np.all(enough & np.isfinite(values)):
            return values[()]
    wanted = "above 0" if minimum is None else f"of at least {minimum:g}"
    raise ConfigError(f"{name}={value!r} must be a finite number {wanted}")


@dataclasses.dataclass(frozen=True)
class Clark:
    """The loss by parameters and experts (Clark et al. 2022, equation 1 and table 3).

    The law was fitted to models of 15M to 1.3B parameters and up to 512 experts, all trained on
    130B tokens.

    Attributes:
        a: Slope of log10 loss in log10 parameters.
        b: Slope of log10 loss in log10 effective experts.
        c: Interaction: loss of slope ``b`` per tenfold of parameters.
        d: Log10 loss at one parameter and one effective expert.
        e_start: Effective experts of the dense model.
        e_max: Upper bound of the effective experts.
        n_cutoff: Parameters of the base model above which routing does not reduce the loss.
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
        """Returns the effective experts: ``e_start`` for one expert, at most ``e_max``.

        The saturating transform of equation 1 is
        ``1/Ê = 1/(E - 1 + 1/(1/e_start - 1/e_max)) + 1/e_max``.
        """
        experts = _checked("experts", experts, 1)
        start = 1 / (1 / self.e_start - 1 / self.e_max)
        return 1 / (1 / (experts - 1 + start) + 1 / self.e_max)

    def loss(self, params: Number, experts: Number) -> Number:
        """Returns the loss in nats per token after 130B tokens (equation 1).

        Args:
            params: Parameters of the dense base model, which has one expert per layer.
            experts: Experts per routed layer; 1 is the dense model.
        """
        params = _checked("params", params)
        n, e = np.log10(params), np.log10(self.effective_experts(experts))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def expert_slope(self, params: Number) -> Number:
        """Returns the slope of log10 loss in log10 effective experts.

        Args:
            params: Parameters of the base model.
        """
        return self.b + self.c * np.log10(_checked("params", params))

    @property
    def no_gain(self) -> float:
        """Parameters above which more experts do not reduce the loss.

        The number is the lesser of the published cutoff and ``10^(-b/c)``, where the slope in
        experts of equation 8 is 0. The two differ because coefficients are printed with three
        decimals (RL-R: 31.6B, published 85B).
        """
        return min(self.n_cutoff, 10 ** (-self.b / self.c)) if self.c > 0 else self.n_cutoff

    def effective_parameters(self, params: float, experts: float) -> float:
        """Returns the parameters of the dense model of equal loss (equation 11).

        Args:
            params: Parameters of the base model, below ``no_gain``.
            experts: Experts per routed layer; 1 returns ``params``.

        Raises:
            ConfigError: If ``params`` is not below ``no_gain``.
        """
        params = _checked("params", params)
        if params >= self.no_gain:
            raise ConfigError(
                f"params={params:.4g} is beyond the cutoff of {self.no_gain:.4g}, above which more "
                "experts do not reduce the loss; train a dense model or a smaller one"
            )
        effective: Any = self.effective_experts(experts)
        dense_slope = self.a + self.c * math.log10(self.e_start)
        slope = self.a + self.c * math.log10(effective)
        gain = (effective / self.e_start) ** (self.b / dense_slope)
        return float(params ** (slope / dense_slope) * gain)


S_BASE = Clark(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478, 937e9)
RL_R = Clark(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982, 85e9)
HASH = Clark(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741, 83e9)


@dataclasses.dataclass(frozen=True)
class Krajewski:
    """The loss by parameters, tokens and granularity (Krajewski et al. 2024, equation 9, table 1).

    The law was fitted to 129M to 3.7B total parameters, 16B to 130B tokens and granularity 1 to 16;
    the RMSE of the fit is .015, and .019 on held-out runs. The printed coefficients give the
    paper's own optima a loss up to .023 too low; coefficients that differ in the last digit
    (alpha .1145, beta .1467) give all of them within .001.

    Attributes:
        a: Scale of the term in parameters.
        alpha: Exponent of the parameters.
        b: Scale of the term in tokens.
        beta: Exponent of the tokens.
        g: Part of the scale ``a + g`` that granularity reduces.
        gamma: Exponent of the granularity.
        c: Loss in the limit of infinite parameters and tokens, in nats per token.
        experts: Experts at granularity 1 for which the law was fitted; 1 is a dense model.
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
            params: Total parameters of all experts, without embeddings. The paper names its models
                by active parameters and experts ("64 x 100M"); neither number nor their product
                reproduces its losses.
            tokens: Training tokens.
            granularity: Number of experts, at least 1, that have the size of one feed-forward
                layer together.
        """
        params = _checked("params", params)
        tokens = _checked("tokens", tokens)
        granularity = _checked("granularity", granularity, 1)
        width = (self.g / granularity**self.gamma + self.a) / params**self.alpha
        return self.c + width + self.b / tokens**self.beta


MOE = Krajewski(18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47, experts=64)
DENSE = Krajewski(16.3, 0.126, 26.7, 0.127, 0.0, 0.0, 0.47, experts=1)


def active_parameters(blocks: Number) -> Number:
    """Returns active parameters, ``12 d^2`` per block, without embeddings (Krajewski et al.)."""
    blocks = _checked("blocks", blocks)
    return 12 * WIDTH_PER_BLOCK**2 * blocks**3


def blocks_of(active_params: float) -> float:
    """Returns the number of blocks, in general fractional, of a model by active parameters."""
    active_params = _checked("active_params", active_params)
    return (active_params / (12 * WIDTH_PER_BLOCK**2)) ** (1 / 3)


def total_parameters(blocks: Number, experts: Number = MOE.experts) -> Number:
    """Returns total parameters without embeddings, ``(4 + 8 experts) d^2`` per block.

    Attention has ``4 d^2`` and every expert ``8 d^2`` parameters at any granularity; routers do not
    count. With this ``N`` the law reproduces table 2 of Krajewski et al.
    """
    blocks = _checked("blocks", blocks)
    experts = _checked("experts", experts, 1)
    return (4 + 8 * experts) * WIDTH_PER_BLOCK**2 * blocks**3


def flops(
    blocks: Number, tokens: Number, granularity: Number = 1, experts: int = MOE.experts
) -> Number:
    """Returns the FLOPs of training: ``(12 d^2 c_f + d E G c_r) D n_blocks`` (Krajewski et al.).

    Args:
        blocks: Number of transformer blocks, each of width ``d = 64 blocks``.
        tokens: Training tokens, ``D``.
        granularity: ``G``.
        experts: ``E``; 1 is a dense model, which has no router.
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
    """The model and the number of tokens of least loss for a budget.

    Attributes:
        blocks: Number of transformer blocks, each of width ``64 blocks``.
        tokens: Training tokens.
        granularity: Granularity of the experts.
        flops: Training FLOPs, equal to the budget.
        loss: Loss in nats per token.
        active_params: Active parameters per token, without embeddings.
        total_params: Total parameters, without embeddings.
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
    """Returns the model of least loss for ``budget`` FLOPs (Krajewski et al. 2024, table 2).

    The search covers every whole number of blocks at every granularity; the budget then determines
    the number of tokens.

    Args:
        budget: Training FLOPs.
        law: Scaling law, which also gives the number of experts for FLOPs and parameters.
        granularities: Granularities to search; the first of several best ones is returned.

    Raises:
        ConfigError: If there is no granularity, or the budget is too small or large for the search.
    """
    budget = _checked("budget", budget)
    choices = np.array([_checked("granularity", choice, 1) for choice in granularities])
    if not choices.size:
        raise ConfigError("granularities is empty; name at least one")
    blocks = np.arange(1.0, _MOST_BLOCKS + 1)
    tokens = budget / flops(blocks, 1, choices[:, None], law.experts)
    tokens = np.broadcast_to(tokens, (choices.size, blocks.size))
    losses = np.asarray(law.loss(total_parameters(blocks, law.experts), tokens, choices[:, None]))
    choice, column = np.unravel_index(np.argmin(losses), losses.shape)
    best = int(blocks[column])
    # An optimum at either end of the search means that the true optimum is outside.
    if best in (1, _MOST_BLOCKS):
        size = "small" if best == 1 else "large"
        raise ConfigError(f"budget={budget:.4g} FLOPs is too {size} for the search")
    return Optimum(
        best,
        float(tokens[choice, column]),
        float(choices[choice]),
        float(budget),
        float(losses[choice, column]),
        float(active_parameters(best)),
        float(total_parameters(best, law.experts)),
    )


def saving(budget: float) -> float:
    """Returns the FLOPs of the dense model of equal loss, as a multiple of ``budget``.

    Both models are compute-optimal by the laws ``MOE`` and ``DENSE`` (Krajewski et al. 2024).
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
class PublishedOptimum:
    """A row of table 2 of Krajewski et al. 2024: a compute-optimal model of 64 experts.

    Attributes:
        active_params: Active parameters per token; the table prints ``64 x`` this number.
        tokens: Training tokens.
        granularity: Granularity of the experts.
        flops: Training FLOPs.
        loss: Loss in nats per token.
    """

    active_params: float
    tokens: float
    granularity: int
    flops: float
    loss: float

    def predicted_flops(self) -> float:
        """Returns the FLOPs of this row by the formula ``flops``."""
        return float(flops(blocks_of(self.active_params), self.tokens, self.granularity))

    def predicted_loss(self, law: Krajewski = MOE) -> float:
        """Returns the loss of this row by ``law``, in nats per token."""
        total = total_parameters(blocks_of(self.active_params), law.experts)
        return float(law.loss(total, self.tokens, self.granularity))


PUBLISHED = (
    PublishedOptimum(100e6, 4.37e9, 8, 2.95e18, 3.133),
    PublishedOptimum(1e9, 28.94e9, 16, 1.93e20, 2.491),
    PublishedOptimum(3e9, 72.9e9, 16, 1.41e21, 2.245),
    PublishedOptimum(7e9, 137.6e9, 32, 6.46e21, 2.076),
    PublishedOptimum(70e9, 941e9, 32, 4.16e23, 1.694),
    PublishedOptimum(300e9, 2.96e12, 64, 5.69e24, 1.503),
    PublishedOptimum(1e12, 7.94e12, 64, 4.97e25, 1.367),
)
