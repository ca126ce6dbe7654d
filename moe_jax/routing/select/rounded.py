"""Token choice with the load of each expert rounded to whole tiles of a grouped product."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.ranges import Positive
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import Select, TokenChoice, best, gates


@dataclasses.dataclass(frozen=True)
class RoundedTopK(Select):
    """Every token chooses its ``k`` best experts; in training experts then round their loads.

    Token rounding (SonicMoE, 2512.14080, ``moe-token-rounding.py``): the number of tokens of an
    expert in a group becomes a multiple of ``tile``. An expert with too many tokens gives up those
    of lowest gate, relative to the gates of the token's other choices. An expert with too few takes
    the tokens of highest score that did not choose it. Gates are scores. Evaluation does not round.

    Attributes:
        k: Experts per token before rounding.
        tile: Tokens per tile of the grouped product.
        rounding: Multiple of the tile: the ``nearest`` (a half to the even one), the next one
            ``up`` or ``down``.
    """

    k: Positive = 1
    tile: Positive = 128
    rounding: Literal["nearest", "up", "down"] = "nearest"

    def choices(self, num_experts: int) -> int:
        """Returns ``K``, here ``E``, because any expert may take a token to fill its tile."""
        return num_experts

    def expected_choices(self, num_experts: int) -> float:
        """Returns the mean number of choices per token, about ``k``."""
        del num_experts
        return float(self.k)

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        num_experts = scored.scores.shape[1]
        first = best(scored.noisy, self.k)
        chosen = (first[..., None] == jnp.arange(num_experts)).any(1) & inputs.valid[:, None]
        if inputs.rng is not None:
            chosen = self._rounded(chosen, scored, inputs.valid)
        ranking = jnp.where(chosen, jax.lax.stop_gradient(scored.noisy), -jnp.inf)
        expert = best(ranking, num_experts)
        gate, log_gate = gates(scored, expert, normalize=False)
        wanted = jnp.take_along_axis(chosen, expert, axis=1)
        return TokenChoice(expert, gate, wanted, wanted, log_gate)

    def _rounded(
        self, chosen: Bool[Array, "S E"], scored: Scored, valid: Bool[Array, " S"]
    ) -> Bool[Array, "S E"]:
        """Returns the mask ``(S, E)`` of the tokens that each expert takes."""
        tiles = chosen.sum(0) / self.tile
        rounds = {"nearest": jnp.round, "up": jnp.ceil, "down": jnp.floor}
        number = rounds[self.rounding](tiles) * self.tile
        return (places(chosen, scored.log_scores, valid) < number) & valid[:, None]


def places(
    chosen: Bool[Array, "S E"], log_scores: Float[Array, "S E"], valid: Bool[Array, " S"]
) -> Int[Array, "S E"]:
    """Returns the place ``(S, E)`` of each token in the order in which an expert takes tokens.

    Tokens that chose the expert come first, in the order of their gates divided by the sum over
    their choices; then the others, in the order of their scores; then padding.
    """
    logs = jax.lax.stop_gradient(log_scores)
    among = jnp.where(chosen, logs, -jnp.inf)
    total = jax.nn.logsumexp(jnp.where(valid[:, None], among, 0), axis=1, keepdims=True)
    value = jnp.where(chosen, logs - total, logs)
    rank = jnp.where(valid[:, None], jnp.where(chosen, 0, 1), 2)
    order = jnp.lexsort((-value, rank), axis=0)
    return jnp.argsort(order, axis=0)
