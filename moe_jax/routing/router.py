"""A router: score, select, balance and capacity, composed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.ranges import Chance, ExpertIndex, Ranged
from moe_jax.routing.balance import Balance, Evidence
from moe_jax.routing.balance.base import token_choice
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.free import FreeExperts
from moe_jax.routing.head import Head, Linear
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import NOTHING
from moe_jax.routing.plan import Plan
from moe_jax.routing.redirect import check_redirect
from moe_jax.routing.score import Score
from moe_jax.routing.seated import CHOSEN, FREE, seated
from moe_jax.routing.select import Select, Selection
from moe_jax.routing.together import RouterParts, check_parts

AnyArray = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Router(Ranged):
    """The four parts of a router: score, select, balance and capacity, which vary independently.

    Attributes:
        score: Map from logits to scores.
        select: Choice of experts, or of tokens, by score.
        balance: Auxiliary losses.
        capacity: Assignment of choices to slots.
        head: Map from tokens to logits, with the router's parameters.
        input_jitter: Half-width of the multiplicative uniform noise that the layer applies to the
            router's inputs in training (Mesh-TensorFlow's ``switch_jitter``); 0 disables it.
        gate_on: Whether gates multiply the outputs (``out``) or the inputs of the experts
            (``in``, Llama 4).
        precision: Precision of the router. ``float32`` applies to logits and softmax on every
            device (Switch table 2, selective precision); ``input`` is the precision of the tokens
            (Switch's bfloat16 router); ``bfloat16_product`` is float32 with factors of the product
            rounded to bfloat16, as a TPU computes Mesh-TensorFlow's router.
        mask_padding: False routes padding like any token (fairseq without ``use_moe_pad_mask``).
        input_dropout: Dropout rate of the router's inputs in training (Mesh-TensorFlow's
            ``switch_dropout``); 0 disables it.
        free: Experts without computation, besides the ``E`` experts of the layer.
        redirect: Expert of each of ``V`` logits, for merged experts that keep the logits of all
            their members (M-SMoE, 2310.01334); empty for one logit per expert. Scores, selection
            and losses are those of ``V`` experts, and slots those of ``E``.
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
    free: FreeExperts = FreeExperts()
    redirect: tuple[ExpertIndex, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_parts(
            RouterParts(
                self.select, self.balance, self.capacity, self.free, self.redirect, self.gate_on
            )
        )

    @property
    def experts_choose(self) -> bool:
        """True if experts choose among the tokens of a group, so that gates depend on later tokens.

        If tokens choose, only the slots depend on later tokens: a later token can precede an
        earlier one in a queue, by its first choice or by its score.
        """
        return self.select.experts_choose

    @property
    def planes(self) -> int:
        """``P``, the number of logits per token and expert."""
        return max(self.score.planes, self.select.planes())

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factor of each loss in the objective, by name."""
        return {part.name: part.weight for part in self.balance}

    @property
    def balance_weights(self) -> dict[str, float]:
        """The factor of each loss that balances the load, by name."""
        return {part.name: part.weight for part in self.balance if part.balances}

    def scored(self, num_experts: int) -> int:
        """Returns the number of logits per token of a layer with ``num_experts`` experts."""
        return len(self.redirect) or num_experts + self.free.count

    def computing(self, scored: int) -> int:
        """Returns ``E``, the number of experts with slots, for a number of logits per token."""
        return max(self.redirect) + 1 if self.redirect else scored - self.free.count

    def sharing(self, num_experts: int) -> int:
        """Returns the number of experts that share the tokens, free ones included."""
        return num_experts + self.free.count

    def expected_choices(self, num_experts: int) -> float:
        """Returns the largest mean number of experts that a token chooses."""
        choices = self.select.expected_choices(self.scored(num_experts))
        return min(choices, num_experts) if self.redirect else choices

    def check(self, num_experts: int) -> None:
        """Rejects a number of experts that a part cannot work with.

        Raises:
            ConfigError: If a part rejects the number; the message names the setting to change.
        """
        if self.redirect:
            check_redirect(self.redirect, num_experts)
        scored = self.scored(num_experts)
        self.score.check(scored)
        self.select.check(scored)
        self.capacity.check(num_experts)
        for part in self.balance:
            part.check(scored)

    def carried_width(self, num_experts: int) -> int:
        """Returns ``D``, the values per token that the router of the next MoE layer reads."""
        return self.head.carried_width(self.scored(num_experts))

    def slots(self, num_tokens: int, num_experts: int, *, train: bool) -> int:
        """Returns the capacity ``C`` of a group of ``num_tokens`` tokens."""
        fixed = self.select.slots()
        if fixed is not None:
            return fixed
        # An even share of the tokens is the share of one expert among all, free ones included.
        choices = self.expected_choices(num_experts)
        return self.capacity.slots(num_tokens, self.sharing(num_experts), choices, train=train)

    def experts_per_token(self, num_tokens: int, num_experts: int) -> float:
        """Returns the largest mean number of experts that compute for a token in training.

        A token chooses free experts as often as others; they compute nothing.
        """
        if self.experts_choose:
            return self.slots(num_tokens, num_experts, train=True) * num_experts / num_tokens
        return self.expected_choices(num_experts) * num_experts / self.sharing(num_experts)

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the router's state, which is zero before the first step."""
        scored = self.scored(num_experts)
        shapes = self.select.state_shapes(scored)
        for part in self.balance:
            shapes = shapes | part.state_shapes(scored)
        return shapes

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state after an optimizer step.

        Args:
            state: Arrays by name, each ``(..., *shape)`` with the shapes of ``state_shapes``.
            demand: Number ``(..., E)`` of tokens that chose each expert in the whole step.
            observed: Further sums over the whole step, ``Counts.observed``.
        """
        if self.free.count:
            demand = jnp.concatenate([demand, observed[FREE]], axis=-1)
        if self.redirect:
            demand = observed[CHOSEN]
        state = self.select.next_state(state, demand, observed)
        for part in self.balance:
            state = part.next_state(state, demand, observed)
        return state

    def __call__(
        self,
        logits: Float[AnyArray, "*shape"],
        *,
        capacity: int | None = None,
        valid: Bool[AnyArray, "*G S"] | None = None,
        token_ids: Int[AnyArray, "*G S"] | None = None,
        rng: PRNGKeyArray | None = None,
        state: Mapping[str, Array] | None = None,
    ) -> Plan:
        """Routes one group of tokens, or several groups; all arguments but logits have defaults.

        Args:
            logits: Logits ``(S, E)`` of one group or ``(G, S, E)`` of several. With the ``P``
                logits that the router reads per token and expert, 1 for most, also ``(S, E, P)``
                and ``(G, S, E, P)``; without the axis ``P``, the further logits are zeros. With
                ``Z`` free experts, ``E + Z`` replaces ``E``.
            capacity: ``C``, slots per expert. ``None`` computes it from the router's capacity
                factor, for training if there is a key and for evaluation otherwise.
            valid: Mask ``(S,)`` or ``(G, S)``, False for padding; ``None`` means that no token is
                padding.
            token_ids: Ids ``(S,)`` or ``(G, S)`` of the tokens, for routers that hash them.
            rng: Random key in training; ``None`` selects the deterministic router of evaluation.
            state: Arrays that the router carries between steps, or a recorded routing. Missing
                arrays are zeros, as before the first step.

        Returns:
            The plan; with several groups, each of its arrays has a leading axis ``G``.

        Raises:
            ConfigError: If a part needs an argument that is missing; the message names it.

        Examples:
            Two tokens choose expert 0, which has one slot, and the second choice is dropped:

            >>> import jax.numpy as jnp
            >>> from moe_jax import routing
            >>> plan = routing.preset("switch")(jnp.array([[2.0, 0.0], [1.0, 0.0]]), capacity=1)
            >>> plan.counts.demand.tolist(), float(plan.counts.dropped)
            ([2.0, 0.0], 1.0)
        """
        planes = self._with_planes(jnp.asarray(logits))
        tokens, experts = planes.shape[-3], self.computing(planes.shape[-2])
        if capacity is None:
            capacity = self.slots(tokens, experts, train=rng is not None)
        start = {
            name: jnp.zeros(shape, jnp.float32)
            for name, shape in self.state_shapes(experts).items()
        }
        valid = jnp.ones(planes.shape[:-2], bool) if valid is None else jnp.asarray(valid)
        token_ids = None if token_ids is None else jnp.asarray(token_ids)
        run = self.plan_group if planes.ndim == 3 else functools.partial(route, self)
        return run(
            planes,
            capacity=capacity,
            valid=valid,
            token_ids=token_ids,
            rng=rng,
            state={**start, **(state or {})},
        )

    def _with_planes(
        self, logits: Float[Array, "*shape"]
    ) -> Float[Array, "S E P"] | Float[Array, "G S E P"]:
        """Returns ``(S, E, P)`` or ``(G, S, E, P)``, with zeros for missing planes."""
        of_one_group = logits.ndim == 3 and logits.shape[-1] == self.planes
        if logits.ndim == 4 or of_one_group:
            return logits
        return jnp.pad(logits[..., None], [(0, 0)] * logits.ndim + [(0, self.planes - 1)])

    def plan_group(
        self,
        logits: Float[Array, "S E *P"],
        *,
        capacity: int,
        valid: Bool[Array, " S"] | None = None,
        token_ids: Int[Array, " S"] | None = None,
        rng: PRNGKeyArray | None = None,
        state: Mapping[str, Array] | None = None,
        settings: Mapping[str, Array] | None = None,
        limit: Int[Array, ""] | None = None,
    ) -> Plan:
        """Routes one group with an explicit capacity and state.

        Args:
            logits: Logits ``(S, E)``, or ``(S, E, P)`` if the router has several planes. The router
                computes in float32 or wider unless ``precision`` is ``input``.
            capacity: ``C``, slots per expert.
            valid: Mask ``(S,)``, False for padding; ``None`` means that no token is padding.
            token_ids: Ids ``(S,)`` of the tokens, for routers that hash them.
            rng: Random key in training; ``None`` selects the deterministic router of evaluation.
            state: Arrays that the router carries between steps, or a recorded routing.
            settings: Values of settings at this step, by name; see ``Inputs``.
            limit: Slots per expert that tokens can fill; ``None`` for those of the step.

        Returns:
            The plan.

        Raises:
            ConfigError: If a part needs an argument that is missing; the message names it.
        """
        planes = self._planes_of(logits)
        if valid is None or not self.mask_padding:
            valid = jnp.ones(planes.shape[0], bool)
        group = planes[..., 0], planes, jnp.asarray(valid), capacity, token_ids
        inputs = Inputs(*group, rng, {} if state is None else state, settings or {})
        limit = self._limit(inputs) if limit is None else limit
        return self._planned(dataclasses.replace(inputs, limit=limit))

    def _planes_of(self, logits: Float[Array, "S E *P"]) -> Float[Array, "S E P"]:
        """Returns the logits with their planes, in float32 or wider unless they stay as given.

        Raises:
            ConfigError: If the router reads another number of planes, or no such number of experts.
        """
        if self.precision != "input":
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        tokens, scored_experts = logits.shape[:2]
        self.check(self.computing(scored_experts))
        planes = logits.reshape(tokens, scored_experts, -1)
        if planes.shape[-1] != self.planes:
            raise ConfigError(
                f"the router reads {self.planes} logits per token and expert, but the input has "
                f"{planes.shape[-1]}: pass logits (S, E{f', {self.planes}' * (self.planes > 1)})"
            )
        return planes

    def _planned(self, inputs: Inputs) -> Plan:
        """Returns the plan of one group: scores, choices, slots, losses and sums."""
        scored = self.score(inputs)
        selection = self.selected(scored, inputs)
        slots, counts, free = seated(
            selection,
            scored,
            inputs,
            capacity=self.capacity,
            free=self.free.count,
            redirect=self.redirect,
        )
        observed = self.observe(scored, selection, inputs)
        counts = dataclasses.replace(counts, observed=counts.observed | observed)
        losses = {part.name: part(scored, selection, inputs) for part in self.balance}
        evidence = None
        if self.of_sequences:
            evidence = Evidence(inputs.logits, scored, token_choice(selection))
        return Plan(slots, losses, jax.lax.stop_gradient(counts), evidence, free)

    def selected(self, scored: Scored, inputs: Inputs) -> Selection:
        """Returns the choices of one group."""
        return self.select(scored, inputs)

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns sums ``(*shape)`` over the tokens of a group by name, of all parts."""
        observed = self.select.observe(scored, selection, inputs)
        for part in self.balance:
            observed = observed | part.observe(scored, selection, inputs)
        return observed

    def _limit(self, inputs: Inputs) -> Int[Array, ""] | None:
        """Returns the slots per expert of this step, or ``None`` for all slots."""
        if self.select.slots() is not None:
            return None
        experts = self.computing(inputs.logits.shape[1])
        return self.capacity.limit(inputs, self.sharing(experts), self.expected_choices(experts))

    @property
    def of_sequences(self) -> tuple[Balance, ...]:
        """The losses that are computed per sequence, whatever the groups of the layer are.

        A loss that reads the choices of the whole batch is among them, since these are known only
        when all groups are routed.
        """
        return tuple(
            part for part in self.balance if part.span == "sequence" or part.over == "batch"
        )

    def sequence_losses(
        self,
        evidence: Evidence,
        valid: Bool[Array, " L"],
        state: Mapping[str, Array],
        settings: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Float[Array, ""]]:
        """Returns the losses of one sequence by name.

        Args:
            evidence: Arrays that the losses read, of the ``L`` tokens of the sequence.
            valid: Mask ``(L,)``, False for padding.
            state: Arrays that the router carries between steps.
            settings: Values of settings at this step, by name; see ``Inputs``.
        """
        valid = valid if self.mask_padding else jnp.ones_like(valid)
        planes = evidence.logits[..., None]
        inputs = Inputs(evidence.logits, planes, valid, 0, state=state, settings=settings)
        scored, choice = evidence.scored, evidence.choice
        return {part.name: part(scored, choice, inputs) for part in self.of_sequences}


def route(
    router: Router,
    logits: Float[Array, "G S E *P"],
    *,
    capacity: int,
    valid: Bool[Array, "G S"],
    token_ids: Int[Array, "G S"] | None = None,
    rng: PRNGKeyArray | None = None,
    state: Mapping[str, Array] | None = None,
    record: Int[Array, "G S K"] | None = None,
    settings: Mapping[str, Array] | None = None,
    limit: Int[Array, " G"] | None = None,
    spread: Callable[[Callable[..., Plan]], Callable[..., Plan]] | None = None,
) -> Plan:
    """Routes all groups; the arrays of the plan have a leading ``G``.

    Args:
        router: The router.
        logits: Logits ``(G, S, E)`` or ``(G, S, E, P)``.
        capacity: ``C``, slots per expert and group.
        valid: Mask ``(G, S)``, False for padding.
        token_ids: Ids ``(G, S)`` of the tokens.
        rng: Random key, split over the groups.
        state: Arrays that the router carries between steps, shared by all groups; they have no
            gradient.
        record: Recorded experts ``(G, S, K)``, for ``Forced``.
        settings: Values of settings at this step, by name, shared by all groups; see ``Inputs``.
        limit: Slots ``(G,)`` per expert that tokens can fill; ``None`` for those of the step.
        spread: Function that maps a function of arrays ``(G, ...)`` to one that runs the groups of
            each device on that device, such as ``moe_jax.parallel.over_groups``; ``None`` for one
            device.
    """
    groups = logits.shape[0]
    keys = None if rng is None else jax.random.split(rng, groups)

    def of_groups(values: Mapping[str, Array] | None) -> dict[str, Array]:
        # Every array has a leading group axis, so that ``spread`` can split it.
        return {
            name: jnp.broadcast_to(value, (groups, *value.shape))
            for name, value in (values or {}).items()
        }

    states = of_groups(state)
    if record is not None:
        states["experts"] = record

    def one(logits: Array, valid: Array, token_ids, key, state, settings, limit) -> Plan:
        return router.plan_group(
            logits,
            capacity=capacity,
            valid=valid,
            token_ids=token_ids,
            rng=key,
            state=jax.lax.stop_gradient(state),
            settings=settings,
            limit=limit,
        )

    every = jax.vmap(one)
    run = every if spread is None else spread(every)
    return run(logits, valid, token_ids, keys, states, of_groups(settings), limit)
