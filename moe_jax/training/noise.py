"""The gradient noise scale (McCandlish et al. 2018, 1812.06162, appendix A.1).

The noise scale ``B = tr(S) / |G|^2`` is the batch size, in tokens, at which the noise of a batch's
gradient is as large as the true gradient ``G``. Here ``S`` is the covariance of the gradient of one
token. Far below ``B``, a batch of twice the size needs about half the steps; far above, about as
many steps.

The microbatches of one step suffice for both numbers. Let microbatch ``i`` of ``M`` have ``n_i`` of
the ``N`` target tokens of a batch, and let ``g_i`` be the mean gradient of its tokens. Padding and
masks make the numbers ``n_i`` unequal. The gradient of the batch is the sum of the shares
``s_i = (n_i / N) g_i``. If microbatches are independent samples and the noise of ``g_i`` falls with
its number of tokens, then ``E g_i = G`` and ``E |g_i|^2 = |G|^2 + tr(S) / n_i``. So, with
``q = sum_i (n_i / N)^2``::

    E shares = E sum_i |s_i|^2   = q |G|^2 + tr(S) / N
    E whole  = E |sum_i s_i|^2   =   |G|^2 + tr(S) / N

The solution of these two equations is unbiased for any ``n_i``::

    |G|^2 = (whole - shares) / (1 - q)
    tr(S) = N (shares - q whole) / (1 - q)

For equal microbatches, ``q = 1 / M``. With ``small = M shares``, the mean squared norm of ``g_i``,
these are the paper's ``(M whole - small) / (M - 1)`` and ``N (small - whole) / (M - 1)``.

Three things bound the meaning of the numbers. Tokens of one row are correlated, so ``S`` is the
noise per token of whole rows. The losses of routers are part of the gradient, with weights by
routed tokens. The ratio of two estimates is biased and has heavy tails, so a noise scale is a ratio
of averages over steps, never an average of ratios.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
NOISE = "gradient_noise"
_DRAWS, _SHARE = 2000, 0.9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """The estimates of one step, before clipping and before the rule of the optimizer.

    Attributes:
        squared_gradient: Estimate of ``|G|^2``; noise can make it negative.
        trace: Estimate of ``tr(S)``, the variance of the gradient of one token.
        tokens: Number of target tokens of the batch.
    """

    squared_gradient: Array
    trace: Array
    tokens: Array


def squared_norm(gradient: Any) -> Array:
    """Returns the squared global norm of a gradient, in float32."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    return optax.tree.norm(wide, squared=True)


def gradient_noise(shares: Array, whole: Array, tokens: Array) -> GradientNoise:
    """Returns the estimates of one step; see the derivation above.

    Args:
        shares: Sum over microbatches of the squared norms of their shares of the gradient.
        whole: Squared norm of the gradient of the batch.
        tokens: Number of target tokens ``(M,)`` of each microbatch.

    Returns:
        The estimates; both are NaN if fewer than two microbatches have tokens.
    """
    total = tokens.sum()
    q = jnp.square(tokens / jnp.maximum(total, 1)).sum()
    scale = jnp.where((tokens > 0).sum() > 1, 1 / (1 - q), jnp.nan)
    return GradientNoise((whole - shares) * scale, total * (shares - q * whole) * scale, total)


@dataclasses.dataclass(frozen=True)
class Estimates:
    """The finite estimates of the logged steps of a run.

    Attributes:
        steps: Steps ``(T,)``.
        squared_gradient: Estimates ``(T,)`` of ``|G|^2``.
        trace: Estimates ``(T,)`` of ``tr(S)``.
        tokens: Number of target tokens ``(T,)`` of each batch.
    """

    steps: np.ndarray
    squared_gradient: np.ndarray
    trace: np.ndarray
    tokens: np.ndarray

    def __getitem__(self, part: slice) -> Estimates:
        """Returns the estimates of a part of the steps."""
        fields = dataclasses.fields(self)
        return Estimates(*(getattr(self, field.name)[part] for field in fields))

    @property
    def scale(self) -> float:
        """Noise scale in tokens, a ratio of averages over steps; infinite without a signal."""
        signal = self.squared_gradient.mean()
        return float(self.trace.mean() / signal) if signal > 0 else float("inf")

    def interval(self, share: float = _SHARE, seed: int = 0) -> tuple[float, float]:
        """Returns a bootstrap interval of the noise scale in tokens, which resamples the steps.

        The inverse ``|G|^2 / tr(S)`` has light tails, so its quantiles are taken. The upper end is
        infinite if the signal is not above the noise.

        Args:
            share: Probability of the interval.
            seed: Seed of the samples.
        """
        size = len(self.steps)
        drawn = np.random.default_rng(seed).integers(0, size, (_DRAWS, size))
        inverse = self.squared_gradient[drawn].mean(1) / self.trace[drawn].mean(1)
        low, high = np.quantile(inverse, [(1 - share) / 2, (1 + share) / 2])
        return _inverted(high), _inverted(low)


def _inverted(value: float) -> float:
    return float(1 / value) if value > 0 else float("inf")


def estimates(records: Iterable[Mapping[str, Any]]) -> Estimates:
    """Returns the estimates in the training records of ``metrics.jsonl``, in their order."""
    rows = [
        (record["step"], *(record[NOISE][name] for name in ("squared_gradient", "trace", "tokens")))
        for record in records
        if record["kind"] == "train" and NOISE in record
    ]
    finite = [row for row in rows if None not in row]
    return Estimates(*np.array(finite, np.float64).reshape(-1, 4).T)


def smoothed(found: Estimates, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the noise scale over steps: each value is the ratio of averages over a window.

    Args:
        found: Estimates of ``T`` steps.
        window: Number of estimates ``W`` in a window.

    Returns:
        The middle steps ``(T - W + 1,)`` of the windows, and the noise scales in tokens, infinite
        where the signal is not above the noise.
    """
    signal, noise = (_sums(values, window) for values in (found.squared_gradient, found.trace))
    scales = np.full(len(signal), np.inf)
    np.divide(noise, signal, out=scales, where=signal > 0)
    return found.steps[window // 2 :][: len(scales)], scales


def _sums(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the sums ``(T - W + 1,)`` over windows of values ``(T,)``."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total[window:] - total[:-window]
