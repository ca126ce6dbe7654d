"""Problems of the benchmark: weights, tokens and a given routing for one shape."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moe_jax.benchmark.shapes import Shape
from moe_jax.errors import ConfigError

REGIMES = ("balanced", "uniform", "zipf", "one_hot", "empty")
# Logit of an expert that a token does not choose; the logits of chosen experts are near 0.
_LOW = -30.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer with its inputs, as NumPy arrays in float32.

    Attributes:
        shape: Shape of the layer.
        regime: Name of the load of the experts.
        dtype: Type in which candidates compute, ``float32`` or ``bfloat16``.
        x: Tokens ``(T, M)``.
        dy: Gradient ``(T, M)`` of the output.
        router: Weights ``(M, E)`` of the router, for rows with a router.
        matrices: Weights ``up (E, M, F)``, ``down (E, F, M)`` and, if gated, ``gate (E, M, F)``.
        choices: Given experts ``(T, K)`` of each token.
        gates: Given weights ``(T, K)`` of the experts; they sum to 1.
    """

    shape: Shape
    regime: str
    dtype: str
    x: Float[np.ndarray, "T M"]
    dy: Float[np.ndarray, "T M"]
    router: Float[np.ndarray, "M E"]
    matrices: dict[str, Float[np.ndarray, "E _ _"]]
    choices: Int[np.ndarray, "T K"]
    gates: Float[np.ndarray, "T K"]

    @property
    def logits(self) -> Float[np.ndarray, "T E"]:
        """Logits ``(T, E)`` for which a softmax over the best ``K`` gives the given routing."""
        logits = np.full((len(self.x), self.shape.experts), _LOW, np.float32)
        np.put_along_axis(logits, self.choices, np.log(self.gates), axis=1)
        return logits


def problem(shape: Shape, regime: str, dtype: str, *, empty: int = 1, seed: int = 0) -> Problem:
    """Returns the problem of a shape and a regime; equal arguments give equal arrays.

    Args:
        shape: Shape of the layer.
        regime: One of ``REGIMES``.
        dtype: Type in which candidates compute. Tokens and weights are rounded to it.
        empty: Number of experts without tokens in the regime ``empty``.
        seed: Seed of all arrays.

    Raises:
        ConfigError: If the regime is unknown, or too few experts remain.
    """
    random = np.random.default_rng(seed)
    tokens, m, f, e = shape.tokens, shape.width, shape.hidden, shape.experts

    def normal(scale: float, *size: int) -> np.ndarray:
        values = random.standard_normal(size, np.float32) * np.float32(scale)
        return np.asarray(jnp.asarray(values, dtype), np.float32)

    matrices = {"up": normal(m**-0.5, e, m, f), "down": normal(f**-0.5, e, f, m)}
    if shape.gated:
        matrices["gate"] = normal(m**-0.5, e, m, f)
    choices = choices_of(regime, tokens, e, shape.k, empty, random)
    gates = random.dirichlet(np.full(shape.k, 4.0), tokens).astype(np.float32)
    x, dy, router = normal(1.0, tokens, m), normal(1.0, tokens, m), normal(m**-0.5, m, e)
    return Problem(shape, regime, dtype, x, dy, router, matrices, choices, gates)


def choices_of(
    regime: str, tokens: int, experts: int, k: int, empty: int, random: np.random.Generator
) -> Int[np.ndarray, "T K"]:
    """Returns ``K`` different experts for each token.

    ``balanced`` takes experts in turn; ``uniform`` draws them; ``zipf`` draws expert ``i`` with a
    weight of ``1 / i``; ``one_hot`` gives every token expert 0 and draws the others; ``empty``
    draws among all experts but the last ``empty``.

    Raises:
        ConfigError: If the regime is unknown, or fewer than ``K`` experts remain.
    """
    if regime not in REGIMES:
        raise ConfigError(f"--regimes: no regime {regime!r}: use {', '.join(REGIMES)}")
    if regime == "empty" and not 1 <= empty <= experts - k:
        raise ConfigError(
            f"--empty={empty}: {experts} experts of which each token takes {k} leave from 1 to "
            f"{experts - k} empty"
        )
    if regime == "balanced":
        return (np.arange(tokens * k).reshape(tokens, k) % experts).astype(np.int32)
    weights = np.ones(experts)
    if regime == "zipf":
        weights = 1.0 / np.arange(1, experts + 1)
    elif regime == "empty":
        weights[experts - empty :] = 0.0
    # The best K of log-weights with Gumbel noise are draws without replacement.
    with np.errstate(divide="ignore"):
        scores = np.log(weights) + random.gumbel(size=(tokens, experts))
    if regime == "one_hot":
        scores[:, 0] = np.inf
    return np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
