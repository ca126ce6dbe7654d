"""The wishes of a group, and the interface of what makes them."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import Part

Array = jax.Array
TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Tokens chose experts; the capacity rule still has to seat them.

    Attributes:
        expert: ``(S, K)`` int32, best first.
        gate: ``(S, K)`` combine weight if the choice gets a slot.
        wanted: ``(S, K)`` bool, False for padding and for choices a random policy gave up.
        queued: ``(S, K)`` bool, choices that advance their expert's queue, seated or not.
    """

    expert: Array
    gate: Array
    wanted: Array
    queued: Array


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Experts chose tokens; every pick is a slot.

    Attributes:
        token: ``(E, C)`` int32.
        gate: ``(E, C)`` combine weight.
        filled: ``(E, C)`` bool, False where fewer tokens than slots were there.
    """

    token: Array
    gate: Array
    filled: Array


@dataclasses.dataclass(frozen=True)
class SoftChoice:
    """Every slot is a weighted mean of all tokens.

    Attributes:
        dispatch: ``(S, E, C)`` weights of the tokens in a slot.
        combine: ``(S, E, C)`` weights of the slots in a token.
    """

    dispatch: Array
    combine: Array


Selection = TokenChoice | ExpertChoice | SoftChoice


class Select(Part, abc.ABC):
    """Scores to wishes. A subclass is a frozen dataclass.

    Its class attributes say what the other parts and the layer must know about it.

    Attributes:
        experts_choose: experts rank the tokens of a group, so a gate depends on later tokens.
        slot_table: a slot holds one token or none; else only the ``einsum`` transport can serve.
        needs_token_ids: routes by token id.
    """

    experts_choose = False
    slot_table = True
    needs_token_ids = False

    @abc.abstractmethod
    def choices(self, num_experts: int) -> int:
        """Returns ``K``, the most experts a token asks for."""

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ConfigError`` if it cannot route the ids below ``vocab_size``."""
        del vocab_size

    def planes(self) -> int:
        """Returns how many logits per token and expert it reads."""
        return 1

    def slots(self) -> int | None:
        """Returns the number of slots per expert where the selection fixes it."""
        return None

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return "score"

    @abc.abstractmethod
    def __call__(self, scored: Scored, inputs: Inputs) -> Selection:
        """Selects on one group."""


def gate_in_words(normalize: bool, scale: float = 1.0) -> str:
    """Returns the combine weight of the routers that choose by score."""
    gate = "score / sum over the chosen" if normalize else "score"
    return gate if scale == 1 else f"{scale:g} * {gate}"


def best(ranking: Array, k: int) -> Array:
    """Returns ``(S, K)`` int32, the ``k`` best experts of every token, best first."""
    return jax.lax.top_k(jax.lax.stop_gradient(ranking), k)[1].astype(jnp.int32)


def at(scores: Array, expert: Array) -> Array:
    """Returns ``(S, K)`` the scores of the chosen experts."""
    return jnp.take_along_axis(scores, expert, axis=1)


def normalized(gate: Array) -> Array:
    """Returns gates divided by their sum over ``K``."""
    return gate / (gate.sum(-1, keepdims=True) + TINY)


def every_choice(expert: Array, gate: Array, valid: Array) -> TokenChoice:
    """Returns the wishes where no token but padding gives one up."""
    wanted = jnp.broadcast_to(valid[:, None], expert.shape)
    return TokenChoice(expert, gate, wanted, wanted)
