"""Tokens are assigned: by a balanced assignment, by their id, by chance, or from a record."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.ranges import Factor, Iterations, Positive, PositiveShare, Seed, Vocabulary
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import (
    Select,
    TokenChoice,
    at,
    best,
    every_choice,
    gate_in_words,
    normalized,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Balanced(Select):
    """One expert per token, all experts with as many: the assignment of largest total logit.

    BASE layers (Lewis et al. 2021, 2103.16716): in training a linear assignment, here by auction;
    at test time the best expert.

    Attributes:
        tolerance: bids rise by this share of the range of the logits, so the total is within
            ``S`` times as much of the best one.
        rounds: of bidding at most.
    """

    tolerance: PositiveShare = 1e-3
    rounds: Iterations = 2000

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return 1

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        if inputs.rng is None:
            expert = best(scored.scores, 1)
        else:
            logits = jax.lax.stop_gradient(inputs.logits)
            expert = auction(logits, inputs.valid, self.tolerance, self.rounds)[:, None]
        return every_choice(expert, at(scored.scores, expert), inputs.valid)


def auction(values: Array, valid: Array, tolerance: float, rounds: int) -> Array:
    """Returns ``(S,)`` int32 experts for tokens that pay most in total ``values (S, E)``.

    Bertsekas' auction for the transportation problem: tokens without a seat bid what makes their
    best expert as good as their second best, and an expert keeps its highest bids.
    """
    tokens, experts = values.shape
    seats = -(-tokens // experts)
    span = jnp.maximum(jnp.max(values) - jnp.min(values), 1e-6)
    least = tolerance * span

    def unseated(held: Array) -> Array:
        return valid & ~jnp.isfinite(held).any(1)

    def bid(carried: tuple[Array, Array]) -> tuple[Array, Array]:
        held, count = carried
        full = jax.lax.top_k(held.T, seats)[0][:, -1]
        price = jnp.where(jnp.isfinite(full), full, 0.0)
        gain = values - price
        two, expert = jax.lax.top_k(gain, min(2, experts))
        offer = price[expert[:, 0]] + two[:, 0] - two[:, -1] + least
        asks = unseated(held)[:, None] & (expert[:, :1] == jnp.arange(experts))
        held = jnp.where(asks, offer[:, None], held)
        kept = jax.lax.top_k(held.T, seats)[1]
        mask = jnp.zeros((experts, tokens), bool)
        mask = mask.at[jnp.arange(experts)[:, None], kept].set(True).T
        return jnp.where(mask, held, -jnp.inf), count + 1

    def bidding(carried: tuple[Array, Array]) -> Array:
        held, count = carried
        return unseated(held).any() & (count < rounds)

    start = jnp.full_like(values, -jnp.inf)
    held, _ = jax.lax.while_loop(bidding, bid, (start, jnp.int32(0)))
    seat = jnp.argmax(jnp.isfinite(held), axis=1)
    return jnp.where(unseated(held), jnp.argmax(values, axis=1), seat).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Hash(Select):
    """A fixed expert per token id, with gate 1 (Roller et al. 2021, 2106.04426).

    Attributes:
        kind: ``random`` hash of the id; ``modulo`` ``E`` (Expert Choice, section 4.6);
            ``balanced``: frequent ids first, each to the expert with least so far, where the id
            is taken for the rank and frequencies for Zipf's, as SentencePiece orders them.
        vocab_size: number of ids, for ``balanced``.
        seed: of ``random``.
    """

    kind: Literal["random", "modulo", "balanced"] = "random"
    vocab_size: Vocabulary = 32000
    seed: Seed = 0

    needs_token_ids = True

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ConfigError`` if there are ids without a row in the table of ``balanced``."""
        if self.kind == "balanced" and self.vocab_size < vocab_size:
            raise ConfigError(
                f"vocab_size={self.vocab_size} of the hash router is less than the {vocab_size} "
                f"ids of the tokenizer: all later ids would share one expert; set it to "
                f"{vocab_size} or more"
            )

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return 1

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return "1"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Looks one group up."""
        ids = inputs.needs_token_ids("Hash")
        experts = scored.scores.shape[1]
        match self.kind:
            case "modulo":
                expert = ids % experts
            case "random":
                expert = _mixed(ids, self.seed) % experts
            case "balanced":
                expert = jnp.asarray(balanced_table(self.vocab_size, experts))[ids]
        expert = expert.astype(jnp.int32)[:, None]
        return every_choice(expert, jnp.ones_like(scored.scores[:, :1]), inputs.valid)


def _mixed(ids: Array, seed: int) -> Array:
    """The 32-bit finaliser of MurmurHash3."""
    h = ids.astype(jnp.uint32) ^ jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


@functools.cache
def balanced_table(vocab_size: int, num_experts: int) -> np.ndarray:
    """Returns ``(V,)`` int32 experts: ids, taken as ranks of Zipf's law, assigned greedily."""
    heap = [(0.0, expert) for expert in range(num_experts)]
    table = np.zeros(vocab_size, np.int32)
    for rank in range(vocab_size):
        load, expert = heapq.heappop(heap)
        table[rank] = expert
        heapq.heappush(heap, (load + 1 / (rank + 1), expert))
    return table


@dataclasses.dataclass(frozen=True)
class Random(Select):
    """``k`` experts by chance, with gate ``1 / k``; without a key, in turn. For benchmarks."""

    k: Positive = 1

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return f"1 / {self.k}"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Draws for one group."""
        tokens, experts = scored.scores.shape
        if inputs.rng is None:
            turn = jnp.arange(tokens * self.k, dtype=jnp.int32) % experts
            expert = turn.reshape(tokens, self.k)
        else:
            expert = best(jax.random.uniform(inputs.rng, (tokens, experts)), self.k)
        gate = jnp.full(expert.shape, 1 / self.k, scored.scores.dtype)
        return every_choice(expert, gate, inputs.valid)


@dataclasses.dataclass(frozen=True)
class Forced(Select):
    """The experts of a recorded routing, with gates of this router's own scores.

    The record is ``state["experts"]``, ``(S, K)`` int32: an expert, or ``-1 - expert`` for a choice
    that got no slot. The task's gradient flows through the gates as in the recorded run. At test
    time there is none, and the ``k`` best experts serve.

    Attributes:
        k: recorded choices per token.
        normalize: divide the k gates by their sum, lost choices included.
        scale: factor on every gate.
    """

    k: Positive = 1
    normalize: bool = False
    scale: Factor = 1.0

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return gate_in_words(self.normalize, self.scale)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Repeats one group."""
        if "experts" not in inputs.state and inputs.rng is None:
            record = best(scored.scores, self.k)
        else:
            record = inputs.needs_state("experts", "Forced", f"(S, {self.k}) recorded experts")
        if record.shape[-1] != self.k:
            raise ConfigError(
                f"the record has {record.shape[-1]} choices per token, and Forced k={self.k}: "
                f"set the router's k to {record.shape[-1]}"
            )
        expert = jnp.where(record < 0, -1 - record, record).astype(jnp.int32)
        gate = at(scored.scores, expert)
        gate = (normalized(gate) if self.normalize else gate) * self.scale
        wanted = inputs.valid[:, None] & (record >= 0)
        return TokenChoice(expert, gate, wanted, wanted)
