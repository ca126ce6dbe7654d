"""A router: score, select, balance and capacity, composed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import Chance, Ranged
from moe_jax.routing.balance import Balance, Evidence
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.head import Head, Linear
from moe_jax.routing.inputs import Inputs
from moe_jax.routing.plan import Plan
from moe_jax.routing.score import Score
from moe_jax.routing.select import Select

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Router(Ranged):
    """Four parts that vary independently; a published router is one choice of each.

    Attributes:
        score: logits to scores.
        select: scores to wishes.
        balance: the auxiliary losses.
        capacity: the seating.
        head: tokens to logits, with the router's parameters.
        input_jitter: half-width of the multiplicative uniform noise that the layer puts on the
            router's inputs in training (Mesh-TensorFlow's ``switch_jitter``), 0 for none.
        gate_on: whether gates scale what experts put ``out`` or what goes ``in`` (Llama 4).
        precision: ``float32`` on every device, product included (Switch table 2's selective
            precision); that of the layer's ``input`` (its bfloat16 router); or
            ``bfloat16_product``, float32 but for a product of tokens and weights rounded to
            bfloat16, as a TPU computes Mesh-TensorFlow's router.
        mask_padding: False routes padding like any token (fairseq without ``use_moe_pad_mask``).
        input_dropout: dropout of the router's inputs in training (Mesh-TensorFlow's
            ``switch_dropout``), 0 for none.
    """

    score: Score
    select: Select
    balance: tuple[Balance, ...] = ()
    capacity: Capacity = Capacity()
    head: Head = Linear()
    input_jitter: Chance = 0.0
    gate_on: Literal["out", "in"] = "out"
    precision: Literal["float32", "input", "bfloat16_product"] = "float32"
    mask_padding: bool = True
    input_dropout: Chance = 0.0

    def __post_init__(self):
        super().__post_init__()
        for part in self.balance:
            name, select = type(part).__name__, type(self.select).__name__
            if part.needs_token_choice and self.select.experts_choose:
                raise ConfigError(
                    f"{name} needs tokens that choose experts, and with select={select} experts "
                    f"choose and the load is even by construction: remove {name} from balance"
                )
            if part.needs_second_choice and self.select.choices(2) < 2:
                raise ConfigError(
                    f"{name} needs second choices, and select={select} makes none: use Top2 or "
                    f"TopK(2), or remove {name} from balance"
                )
        names = [part.name for part in self.balance]
        if len(set(names)) < len(names):
            raise ConfigError(f"two losses share a name in balance: {', '.join(names)}; name one")
        if self.gate_on == "in" and self.select.experts_choose:
            raise ConfigError(
                "gate_on='in' needs tokens that choose experts: with "
                f"select={type(self.select).__name__} use gate_on='out'"
            )
        if self.capacity.reroute and self.select.experts_choose:
            raise ConfigError("capacity.reroute needs tokens that choose experts: turn it off")

    @property
    def experts_choose(self) -> bool:
        """True if experts rank the tokens of a group, so that a gate depends on later tokens.

        Where tokens choose, later tokens can still take a full expert's slots: first choices before
        second ones, or best scores first.
        """
        return self.select.experts_choose

    @property
    def planes(self) -> int:
        """``P``, logits per token and expert."""
        return max(self.score.planes, self.select.planes())

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factor of each named loss in the objective."""
        return {part.name: part.weight for part in self.balance}

    def check(self, num_experts: int) -> None:
        """Refuses a number of experts that a part cannot work with.

        Raises:
            ConfigError: naming the setting to change.
        """
        for part in (self.score, self.select, self.capacity, *self.balance):
            part.check(num_experts)

    def slots(self, num_tokens: int, num_experts: int, *, train: bool) -> int:
        """Returns the capacity ``C`` of a group of ``num_tokens``."""
        choices = self.select.choices(num_experts)
        fixed = self.select.slots()
        if fixed is not None:
            return fixed
        return self.capacity.slots(num_tokens, num_experts, choices, train=train)

    def experts_per_token(self, num_tokens: int, num_experts: int) -> float:
        """Returns how many experts compute for a token on average, in training, at most."""
        if self.experts_choose:
            return self.slots(num_tokens, num_experts, train=True) * num_experts / num_tokens
        return self.select.choices(num_experts)

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what the router carries between steps; it starts as zeros."""
        shapes = self.select.state_shapes(num_experts)
        for part in self.balance:
            shapes = shapes | part.state_shapes(num_experts)
        return shapes

    def next_state(self, state: dict[str, Array], demand: Array) -> dict[str, Array]:
        """Returns the state after an optimizer step.

        Args:
            state: the state of ``state_shapes``.
            demand: ``(..., E)`` assignments asked for in the whole step.
        """
        state = self.select.next_state(state, demand)
        for part in self.balance:
            state = part.next_state(state, demand)
        return state

    def __call__(
        self,
        logits: Array,
        *,
        capacity: int | None = None,
        valid: Array | None = None,
        token_ids: Array | None = None,
        rng: Array | None = None,
        state: Mapping[str, Array] | None = None,
    ) -> Plan:
        """Routes one group of tokens, or several; what is not given has a default.

        Args:
            logits: ``(S, E)`` for one group, ``(G, S, E)`` for several. A router that reads ``P``
                logits per token and expert also takes ``(S, E, P)`` and ``(G, S, E, P)``; without
                the axis ``P``, the further logits are zeros.
            capacity: ``C``, slots per expert; by default what the router's capacity factor gives,
                for training with ``rng`` and for evaluation without.
            valid: ``(S,)`` or ``(G, S)`` bool, False for padding; all True by default.
            token_ids: ``(S,)`` or ``(G, S)`` int32, for routers that hash them.
            rng: key in training; without it the router is deterministic, as at test time.
            state: what the router carries between steps, or a recorded routing; what is missing is
                zeros, as before the first step.

        Returns:
            The plan; with several groups, each of its arrays has a leading axis ``G``.

        Raises:
            ConfigError: if a part needs what is not given and has no default, by name.

        Examples:
            Two tokens ask for expert 0, which has one slot, and the second one is dropped:

            >>> import jax.numpy as jnp
            >>> from moe_jax import routing
            >>> plan = routing.preset("switch")(jnp.array([[2.0, 0.0], [1.0, 0.0]]), capacity=1)
            >>> plan.counts.demand.tolist(), float(plan.counts.dropped)
            ([2.0, 0.0], 1.0)
        """
        planes = self._with_planes(jnp.asarray(logits))
        tokens, experts = planes.shape[-3:-1]
        if capacity is None:
            capacity = self.slots(tokens, experts, train=rng is not None)
        start = {
            name: jnp.zeros(shape, jnp.float32)
            for name, shape in self.state_shapes(experts).items()
        }
        given = {"capacity": capacity, "rng": rng, "token_ids": token_ids}
        given["state"] = {**start, **(state or {})}
        if planes.ndim == 3:
            return self.plan_group(planes, valid=valid, **given)
        valid = jnp.ones(planes.shape[:2], bool) if valid is None else jnp.asarray(valid)
        return route(self, planes, valid=valid, **given)

    def _with_planes(self, logits: Array) -> Array:
        """Returns ``(S, E, P)`` or ``(G, S, E, P)``, with zeros for planes that are not given."""
        of_one_group = logits.ndim == 3 and self.planes > 1 and logits.shape[-1] == self.planes
        if logits.ndim == 4 or of_one_group:
            return logits
        return jnp.pad(logits[..., None], [(0, 0)] * logits.ndim + [(0, self.planes - 1)])

    def plan_group(
        self,
        logits: Array,
        *,
        capacity: int,
        valid: Array | None = None,
        token_ids: Array | None = None,
        rng: Array | None = None,
        state: Mapping[str, Array] | None = None,
    ) -> Plan:
        """Routes one group; nothing but ``valid`` has a default.

        Args:
            logits: ``(S, E)``, or ``(S, E, P)`` where ``planes`` is more; computed on in float32 at
                least unless ``precision`` is ``input``.
            capacity: ``C``, slots per expert.
            valid: ``(S,)`` bool, False for padding; all True if not given.
            token_ids: ``(S,)`` int32, for routers that hash them.
            rng: key in training; without it the router is deterministic, as at test time.
            state: what the router carries between steps, or a recorded routing.

        Returns:
            The plan.

        Raises:
            ConfigError: if a part needs what is not given, by name.
        """
        if self.precision != "input":
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        tokens, experts = logits.shape[:2]
        self.check(experts)
        planes = logits.reshape(tokens, experts, -1)
        if planes.shape[-1] != self.planes:
            raise ConfigError(
                f"the router reads {self.planes} logits per token and expert and was given "
                f"{planes.shape[-1]}: pass logits (S, E{f', {self.planes}' * (self.planes > 1)})"
            )
        if valid is None or not self.mask_padding:
            valid = jnp.ones(tokens, bool)
        valid = jnp.asarray(valid)
        state = {} if state is None else state
        inputs = Inputs(planes[..., 0], planes, valid, capacity, token_ids, rng, state)
        scored = self.score(inputs)
        selection = self.select(scored, inputs)
        slots, counts = self.capacity.seat(selection, scored.log_scores, inputs)
        losses = {part.name: part(scored, selection, inputs) for part in self.balance}
        evidence = Evidence(inputs.logits, scored, selection) if self.of_sequences else None
        return Plan(slots, losses, jax.lax.stop_gradient(counts), evidence)

    @property
    def of_sequences(self) -> tuple[Balance, ...]:
        """The losses whose span is a sequence, whatever the groups are."""
        return tuple(part for part in self.balance if part.span == "sequence")

    def sequence_losses(
        self, evidence: Evidence, valid: Array, state: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Returns the losses of one sequence, from what the plans say of its tokens.

        Args:
            evidence: of the ``L`` tokens of the sequence.
            valid: ``(L,)`` bool.
            state: what the router carries between steps.
        """
        valid = valid if self.mask_padding else jnp.ones_like(valid)
        inputs = Inputs(evidence.logits, evidence.logits[..., None], valid, 0, state=state)
        scored, choice = evidence.scored, evidence.choice
        return {part.name: part(scored, choice, inputs) for part in self.of_sequences}


def route(
    router: Router,
    logits: Array,
    *,
    capacity: int,
    valid: Array,
    token_ids: Array | None = None,
    rng: Array | None = None,
    state: Mapping[str, Array] | None = None,
    record: Array | None = None,
    spread: Callable[[Callable[..., Plan]], Callable[..., Plan]] | None = None,
) -> Plan:
    """Routes all groups; the plan gains a leading ``G``.

    Args:
        router: the router.
        logits: ``(G, S, E)`` or ``(G, S, E, P)``.
        capacity: ``C``.
        valid: ``(G, S)`` bool.
        token_ids: ``(G, S)`` int32.
        rng: key, split over the groups.
        state: shared by all groups; it is not differentiated.
        record: ``(G, S, K)`` int32 recorded experts, for ``Forced``.
        spread: maps a function of arrays that start with ``G`` to one that runs each device's
            groups on that device, such as ``moe_jax.parallel.over_groups``; ``None`` for one
            device.
    """
    groups = logits.shape[0]
    keys = None if rng is None else jax.random.split(rng, groups)
    # Every array starts with the groups, so that ``spread`` can split it.
    states = {
        name: jnp.broadcast_to(value, (groups, *value.shape))
        for name, value in (state or {}).items()
    }
    if record is not None:
        states["experts"] = record

    def one(logits: Array, valid: Array, token_ids, key, state) -> Plan:
        return router.plan_group(
            logits,
            capacity=capacity,
            valid=valid,
            token_ids=token_ids,
            rng=key,
            state=jax.lax.stop_gradient(state),
        )

    every = jax.vmap(one)
    run = every if spread is None else spread(every)
    return run(logits, valid, token_ids, keys, states)
