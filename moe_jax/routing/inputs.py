"""What a router is given for one group of tokens, and what the score makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from moe_jax.errors import ConfigError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One group, as every part of a router sees it.

    Attributes:
        logits: ``(S, E)``, the first plane.
        planes: ``(S, E, P)``: further planes carry learned noise, a primary gate or further slots.
        valid: ``(S,)`` bool, False for padding.
        capacity: ``C``.
        token_ids: ``(S,)`` int32, or ``None``.
        rng: key in training; ``None`` asks for the router as it is at test time.
        state: what the router carries between steps, or a recorded routing, by name.
    """

    logits: Array
    planes: Array
    valid: Array
    capacity: int
    token_ids: Array | None = None
    rng: Array | None = None
    state: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def needs_token_ids(self, who: str) -> Array:
        """Returns the token ids.

        Raises:
            ConfigError: if there are none.
        """
        if self.token_ids is None:
            raise ConfigError(f"{who} routes by token id: pass token_ids (S,) to the router")
        return self.token_ids

    def needs_state(self, name: str, who: str, what: str) -> Array:
        """Returns one entry of the state.

        Raises:
            ConfigError: if it is not there.
        """
        if name not in self.state:
            raise ConfigError(f"{who} needs state={{{name!r}: {what}}}: pass it to the router")
        return self.state[name]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """How much each token and expert want each other.

    A score can be too small for its type; its logarithm never is. Parts that divide scores by
    their sum subtract logarithms instead.

    Attributes:
        scores: ``(S, E)``: gates are read here; made from noisy logits where there is noise.
        clean: ``(S, E)`` scores without noise, for the losses.
        noisy: ``(S, E)`` the logits behind ``scores``: experts are ranked by them within a token.
        noise_std: ``(S, E)`` standard deviation of the noise, or ``None``.
        log_scores: ``(S, E)`` logarithm of ``scores``, finite.
        log_clean: ``(S, E)`` logarithm of ``clean``, finite.
    """

    scores: Array
    clean: Array
    noisy: Array
    noise_std: Array | None
    log_scores: Array
    log_clean: Array
