"""A router: score, select, balance and capacity, composed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.routing.balance import Balance, LoadBalance, SecondBalance
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.plan import Plan
from moe_jax.routing.score import Score
from moe_jax.routing.select import Select, TopTokens

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Router:
    """Four parts that vary independently; a published router is one choice of each.

    Attributes:
        score: logits to scores.
        select: scores to wishes.
        balance: the auxiliary losses.
        capacity: the seating.
        input_jitter: half-width of the multiplicative uniform noise that the layer puts on the
            router's inputs in training (Mesh-TensorFlow's ``switch_jitter``), 0 for none.
    """

    score: Score
    select: Select
    balance: tuple[Balance, ...] = ()
    capacity: Capacity = Capacity()
    input_jitter: float = 0.0

    def __post_init__(self):
        if isinstance(self.select, TopTokens):
            for part in self.balance:
                if isinstance(part, LoadBalance):
                    raise ConfigError(
                        "a router with select=TopTokens (expert choice) cannot have LoadBalance: "
                        "its load is even by construction; remove LoadBalance from balance"
                    )
        if any(isinstance(part, SecondBalance) for part in self.balance) and (
            self.select.choices_per_token < 2
        ):
            raise ConfigError(
                f"SecondBalance needs second choices, and select={type(self.select).__name__} "
                "makes none: use Top2 or TopK(2), or remove SecondBalance from balance"
            )

    @property
    def experts_choose(self) -> bool:
        """True if experts rank the tokens of a group, so that a gate depends on later tokens.

        Where tokens choose, later tokens can still take a full expert's slots: first choices before
        second ones, or best scores first.
        """
        return isinstance(self.select, TopTokens)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factor of each named loss in the objective."""
        return {part.name: part.weight for part in self.balance}

    def slots(self, num_tokens: int, num_experts: int, *, train: bool) -> int:
        """Returns the capacity ``C`` of a group of ``num_tokens``."""
        choices = self.select.choices_per_token
        return self.capacity.slots(num_tokens, num_experts, choices, train=train)

    def __call__(
        self,
        logits: Array,
        *,
        capacity: int,
        valid: Array | None = None,
        rng: Array | None = None,
    ) -> Plan:
        """Routes one group.

        Args:
            logits: ``(S, E)``; computed on in float32 at least.
            capacity: ``C``, slots per expert.
            valid: ``(S,)`` bool, False for padding; all True if not given.
            rng: key of the random policies; without it the routing is deterministic.

        Returns:
            The plan.
        """
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        valid = jnp.ones(logits.shape[:1], bool) if valid is None else jnp.asarray(valid)
        scores = self.score(logits, valid)
        selection = self.select(scores, valid, capacity=capacity, rng=rng)
        slots, counts = self.capacity.seat(selection, scores, valid, capacity)
        losses = {part.name: part(logits, scores, selection, valid) for part in self.balance}
        return Plan(slots, losses, jax.lax.stop_gradient(counts))


def route(
    router: Router, logits: Array, *, capacity: int, valid: Array, rng: Array | None = None
) -> Plan:
    """Routes all groups: logits ``(G, S, E)``, valid ``(G, S)``; the plan gains a leading ``G``."""
    keys = None if rng is None else jax.random.split(rng, logits.shape[0])

    def one(logits: Array, valid: Array, key: Array | None) -> Plan:
        return router(logits, capacity=capacity, valid=valid, rng=key)

    return jax.vmap(one)(logits, valid, keys)
