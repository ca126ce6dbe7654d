"""Selections without a ranking: balanced assignment, hash of the id, chance, recorded routing."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.errors import ConfigError
from moe_jax.ranges import Factor, Iterations, Positive, PositiveShare, Seed, Vocabulary
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import (
    Select,
    TokenChoice,
    best,
    every_choice,
    gate_in_words,
    gates,
)
from moe_jax.routing.select.by_token import hashed


@dataclasses.dataclass(frozen=True)
class Balanced(Select):
    """The balanced assignment with the largest sum of logits, one expert per token (BASE).

    BASE layers (Lewis et al. 2021, 2103.16716) solve a linear assignment in training, here by an
    auction, and take the best expert in evaluation.

    Attributes:
        tolerance: Smallest bid increment of the auction, as a share of the range of the logits.
            The total differs from the optimum by at most ``S`` times the increment.
        rounds: Largest number of rounds of the auction.
    """

    tolerance: PositiveShare = 1e-3
    rounds: Iterations = 2000

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return 1

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        if inputs.rng is None:
            expert = best(scored.noisy, 1)
        else:
            logits = jax.lax.stop_gradient(inputs.logits)
            expert = auction(logits, inputs.valid, self.tolerance, self.rounds)[:, None]
        gate, log_gate = gates(scored, expert, normalize=False)
        return every_choice(expert, gate, inputs.valid, log_gate)


def auction(
    values: Float[Array, "S E"], valid: Bool[Array, " S"], tolerance: float, rounds: int
) -> Int32[Array, " S"]:
    """Returns the balanced assignment ``(S,)`` of tokens to experts of largest total value.

    The algorithm is Bertsekas' auction for the transportation problem. In each round every token
    without an expert raises the price of its best expert until its second best is as good, and
    every expert keeps its ``ceil(S / E)`` highest bids.

    Args:
        values: Value ``(S, E)`` of each expert for each token.
        valid: Mask ``(S,)``, False for padding, which does not bid.
        tolerance: Least rise of a bid, as a share of the range of the values.
        rounds: Largest number of rounds. A token without an expert then takes its best one.
    """
    tokens, experts = values.shape
    seats = -(-tokens // experts)
    # A constant per token does not change the assignment, so the values are taken relative to the
    # best one. They are then small near the best, and rounding does not swallow small bids.
    values = values - values.max(1, keepdims=True)
    values = jnp.where(valid[:, None], values, 0.0)
    span = jnp.maximum(-values.min(), 1e-6)
    least = tolerance * span

    # ``held (S, E)``: the bid of each token that an expert holds, else -inf.
    def unassigned(held: Float[Array, "S E"]) -> Bool[Array, " S"]:
        return valid & ~jnp.isfinite(held).any(1)

    def bid(carried: tuple[Array, Array]) -> tuple[Array, Array]:
        held, count = carried
        full = jax.lax.top_k(held.T, seats)[0][:, -1]
        price = jnp.where(jnp.isfinite(full), full, 0.0)
        gain = values - price
        two, expert = jax.lax.top_k(gain, min(2, experts))
        offer = price[expert[:, 0]] + two[:, 0] - two[:, -1] + least
        bids = unassigned(held)[:, None] & (expert[:, :1] == jnp.arange(experts))
        held = jnp.where(bids, offer[:, None], held)
        highest = jax.lax.top_k(held.T, seats)[1]
        mask = jnp.zeros((experts, tokens), bool)
        mask = mask.at[jnp.arange(experts)[:, None], highest].set(True).T
        return jnp.where(mask, held, -jnp.inf), count + 1

    def bidding(carried: tuple[Array, Array]) -> Array:
        held, count = carried
        return unassigned(held).any() & (count < rounds)

    start = jnp.full_like(values, -jnp.inf)
    held, _ = jax.lax.while_loop(bidding, bid, (start, jnp.int32(0)))
    assigned = jnp.argmax(jnp.isfinite(held), axis=1)
    return jnp.where(unassigned(held), jnp.argmax(values, axis=1), assigned).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Hash(Select):
    """A fixed expert per token id, with gate 1 (Roller et al. 2021, 2106.04426).

    Attributes:
        kind: Hash function. ``random`` hashes the id; ``modulo`` takes the id modulo ``E`` (Expert
            Choice, section 4.6); ``balanced`` assigns ids, the most frequent first, to the expert
            of least load. It assumes that ids are sorted by frequency, as in SentencePiece, and
            that frequencies follow Zipf's law.
        vocab_size: Number of ids, for ``balanced``.
        seed: Seed of ``random``.
    """

    kind: Literal["random", "modulo", "balanced"] = "random"
    vocab_size: Vocabulary = 32000
    seed: Seed = 0

    needs_token_ids = True

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ConfigError`` if the table of ``balanced`` lacks ids below ``vocab_size``."""
        if self.kind == "balanced" and self.vocab_size < vocab_size:
            raise ConfigError(
                f"vocab_size={self.vocab_size} of the hash router is less than the {vocab_size} "
                f"ids of the tokenizer, and all later ids would share one expert: set it to "
                f"{vocab_size} or more"
            )

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return 1

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return "1"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        ids = inputs.needs_token_ids("Hash")
        experts = scored.scores.shape[1]
        match self.kind:
            case "modulo":
                expert = ids % experts
            case "random":
                expert = hashed(ids, self.seed) % experts
            case "balanced":
                expert = jnp.asarray(balanced_table(self.vocab_size, experts))[ids]
        expert = expert.astype(jnp.int32)[:, None]
        return every_choice(expert, jnp.ones_like(scored.scores[:, :1]), inputs.valid)


@functools.cache
def balanced_table(vocab_size: int, num_experts: int) -> Int32[np.ndarray, " V"]:
    """Returns the expert ``(V,)`` of each id, by greedy assignment of Zipf's frequencies."""
    heap = [(0.0, expert) for expert in range(num_experts)]
    table = np.zeros(vocab_size, np.int32)
    for rank in range(vocab_size):
        load, expert = heapq.heappop(heap)
        table[rank] = expert
        heapq.heappush(heap, (load + 1 / (rank + 1), expert))
    return table


@dataclasses.dataclass(frozen=True)
class Random(Select):
    """Random experts with gate ``1 / k``, for benchmarks; in evaluation, experts take turns.

    Attributes:
        k: Experts per token.
    """

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
        """Returns a description of the combine weight, for the table of routers."""
        return f"1 / {self.k}"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
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
    """The experts of a recorded run; the scores of this router give the gates.

    The recorded experts are ``state["experts"] (S, K)``: an expert, or ``-1 - expert`` for a
    dropped choice. The gradient of the task flows through the gates as in the recorded run. In
    evaluation the state has no recorded experts, and each token takes its ``k`` best experts.

    Attributes:
        k: Recorded choices per token.
        normalize: True divides the ``k`` gates by their sum, dropped choices included.
        scale: Factor on every gate.
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
        """Returns a description of the combine weight, for the table of routers."""
        return gate_in_words(self.normalize, self.scale)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the recorded choices of one group."""
        if "experts" not in inputs.state and inputs.rng is None:
            record = best(scored.noisy, self.k)
        else:
            record = inputs.needs_state("experts", "Forced", f"(S, {self.k}) recorded experts")
        if record.shape[-1] != self.k:
            raise ConfigError(
                f"the record has {record.shape[-1]} choices per token, but Forced has k={self.k}: "
                f"set the router's k to {record.shape[-1]}"
            )
        expert = jnp.where(record < 0, -1 - record, record).astype(jnp.int32)
        gate, log_gate = gates(scored, expert, normalize=self.normalize)
        wanted = inputs.valid[:, None] & (record >= 0)
        return TokenChoice(expert, gate * self.scale, wanted, wanted, log_gate)
