"""The inputs of a router for one group of tokens, and the scores computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One group of tokens, as every part of a router reads it.

    Attributes:
        logits: Logits ``(S, E)``, the first plane of ``planes``.
        planes: Logits ``(S, E, P)``; further planes hold learned noise, a primary gate or further
            slots.
        valid: Mask ``(S,)``, False for padding.
        capacity: ``C``, slots per expert.
        token_ids: Ids ``(S,)`` of the tokens, or ``None``.
        rng: Random key in training; ``None`` selects the deterministic router of evaluation.
        state: Arrays that the router carries between steps, or a recorded routing, by name.
        settings: Values of settings at this step, by name, each a scalar. They replace the settings
            of the router; see ``moe_jax.routing.changeable``.
        limit: Slots per expert that tokens can fill, at most ``capacity``; ``None`` for all slots.
    """

    logits: Float[Array, "S E"]
    planes: Float[Array, "S E P"]
    valid: Bool[Array, " S"]
    capacity: int
    token_ids: Int[Array, " S"] | None = None
    rng: PRNGKeyArray | None = None
    state: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    limit: Int[Array, ""] | None = None

    @property
    def tokens(self) -> Float[Array, ""]:
        """Number of valid tokens, a float32 as every observed sum."""
        return self.valid.sum().astype(jnp.float32)

    def kept(self, choices: int) -> Bool[Array, " K"] | None:
        """Returns the mask ``(K,)`` of the choices within the top-k of this step, or ``None``."""
        top_k = self.settings.get("top_k")
        return None if top_k is None else jnp.arange(choices) < top_k

    def needs_token_ids(self, who: str) -> Int[Array, " S"]:
        """Returns the token ids.

        Args:
            who: Name of the part that reads them, for the message.

        Raises:
            ConfigError: If the group has no token ids.
        """
        if self.token_ids is None:
            raise ConfigError(f"{who} routes by token id: pass token_ids (S,) to the router")
        return self.token_ids

    def needs_state(self, name: str, who: str, what: str) -> Array:
        """Returns one array of the state.

        Args:
            name: Name of the array.
            who: Name of the part that reads it, for the message.
            what: Shape and content of the array, for the message.

        Raises:
            ConfigError: If the state has no such array.
        """
        if name not in self.state:
            raise ConfigError(f"{who} needs state={{{name!r}: {what}}}: pass it to the router")
        return self.state[name]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of tokens and experts; a leading ``...`` stands for the group axis.

    A score can be too small for its type, but its logarithm cannot. Parts that divide scores by
    their sum subtract logarithms instead.

    Attributes:
        scores: Scores ``(..., S, E)``, with noise if the score adds any; gates are read from them.
        clean: Scores ``(..., S, E)`` without noise, for the losses.
        noisy: Logits ``(..., S, E)`` behind ``scores``, which rank the experts of a token.
        noise_std: Standard deviation ``(..., S, E)`` of the noise, or ``None``.
        log_scores: Finite logarithm ``(..., S, E)`` of ``scores``.
        log_clean: Finite logarithm ``(..., S, E)`` of ``clean``.
    """

    scores: Float[Array, "*G S E"]
    clean: Float[Array, "*G S E"]
    noisy: Float[Array, "*G S E"]
    noise_std: Float[Array, "*G S E"] | None
    log_scores: Float[Array, "*G S E"]
    log_clean: Float[Array, "*G S E"]
