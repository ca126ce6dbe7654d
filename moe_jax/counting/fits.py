"""Coefficients of published scaling laws, fitted to the losses of other runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from moe_jax.counting.laws import S_BASE, Clark
from moe_jax.errors import ConfigError

# Exponents between which the fit searches; Krajewski et al. find 0.58.
_EXPONENTS = (0.01, 10.0)


def expert_slope(
    experts: Sequence[float], losses: Sequence[float], law: Clark | None = None
) -> float:
    """Returns the slope of log10 loss in log10 effective experts, by least squares.

    With a fixed number of parameters of the base model, the law of Clark et al. 2022 (2202.01169,
    equation 1) is a line of this slope, and ``Clark.expert_slope`` is the published one.

    Args:
        experts: Numbers ``(n,)`` of experts per routed layer; 1 is the dense model.
        losses: Losses ``(n,)`` in nats.
        law: Law whose effective experts are used; ``S_BASE`` by default.

    Raises:
        ConfigError: If fewer than two different numbers of experts have a loss.
    """
    numbers = np.asarray(experts, float)
    _check("experts", numbers, 2)
    effective = np.log10((law or S_BASE).effective_experts(numbers))
    return float(np.polyfit(effective, np.log10(np.asarray(losses, float)), 1)[0])


def granularity_exponent(granularity: Sequence[float], losses: Sequence[float]) -> float:
    """Returns the exponent ``γ`` of ``loss = constant + scale / G^γ``, by least squares.

    With fixed parameters and tokens, the law of Krajewski et al. 2024 (2402.07871, equation 9) has
    this form. A loss that does not fall beyond some granularity has the largest exponent, 10.

    Args:
        granularity: Granularities ``(n,)``.
        losses: Losses ``(n,)`` in nats.

    Raises:
        ConfigError: If fewer than three different granularities have a loss.
    """
    parts, values = np.asarray(granularity, float), np.asarray(losses, float)
    _check("granularity", parts, 3)

    def error(exponent: float) -> float:
        columns = np.stack([np.ones_like(parts), parts**-exponent], axis=1)
        fitted = columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
        return float(np.sum((fitted - values) ** 2))

    # Grid first, since the error may have several local minima.
    grid = np.geomspace(*_EXPONENTS, 200)
    best = int(np.argmin([error(exponent) for exponent in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(optimize.minimize_scalar(error, bounds=around, method="bounded").x)


def _check(name: str, values: np.ndarray, least: int) -> None:
    if len(set(values.tolist())) < least:
        raise ConfigError(f"{name}={values.tolist()} has fewer than {least} different values")
