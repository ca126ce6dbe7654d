"""What every router does, new ones included. Each check takes a case and knows no preset's name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.routing import (
    Capacity,
    CommunicationBalance,
    DeviceBalance,
    GaussianNoise,
    Importance,
    LearnedNoise,
    Load,
    LoadBalance,
    Mixture,
    Random,
    Router,
    SecondBalance,
    SparseMixer,
    TokenBalance,
    Top2,
)
from tests.routing.cases import KEY, TIGHT, Case, Group, Property, registered
from tests.routing.helpers import S, compiled, few_examples, normal, seats, weights

Array = np.ndarray
ROUTING: dict[str, Property] = {}
routing_property = registered(ROUTING)
st_order = st.permutations(range(S)).map(np.array)


def draws(router: Router) -> bool:
    """True if a key decides something, and not only that this is training."""
    return (
        isinstance(router.select, Random | SparseMixer)
        or (isinstance(router.select, Top2) and router.select.second in ("random", "sampling"))
        or isinstance(getattr(router.score, "noise", None), GaussianNoise | LearnedNoise)
    )


def order_matters(router: Router) -> bool:
    return not router.experts_choose and router.capacity.priority != "score"


@routing_property
def well_formed(case: Case) -> None:
    @few_examples
    @given(case.drawn)
    def check(group: Group):
        for key in (None, KEY):
            plan, valid = case.plan(group, key=key), group.valid
            dispatch, combine, counts = (
                np.asarray(plan.dispatch),
                np.asarray(plan.combine),
                plan.counts,
            )
            # A slot holds one token at most, no expert is above capacity, no token twice in one.
            assert set(np.unique(dispatch)) <= {0, 1}
            assert dispatch.sum(0).max() <= 1
            assert seats(plan).sum(0).max() <= TIGHT and seats(plan).max() <= 1
            if not case.router.experts_choose:
                assert seats(plan).sum(1).max() <= case.router.select.choices(case.experts)
            # A learned scale of a gate can have any sign.
            assert (combine >= 0).all() or getattr(case.router.select, "expert_scale", False)
            assert not combine[dispatch == 0].any()
            assert not dispatch[~valid].any()
            # Counts say what the dispatch tensor says.
            np.testing.assert_array_equal(counts.load, seats(plan).sum(0))
            routed = seats(plan).any(1)
            if plan.free is not None:
                routed |= np.asarray(plan.free).any(1)
            assert counts.unrouted == (valid & ~routed).sum()
            assert counts.valid == valid.sum()
            assert (np.asarray(counts.overflow) >= 0).all()
            assert counts.dropped == np.sum(counts.demand) - np.sum(counts.load)
            assert all(np.isfinite(value) for value in plan.losses.values())
            if not case.router.experts_choose:
                _check_index_maps(plan, case.experts)

    check()


def _check_index_maps(plan, experts: int) -> None:
    """``place`` and ``gate`` by token say what ``token`` and ``weight`` say by slot."""
    slots, none = plan.slots, experts * TIGHT
    token, weight = np.full(none, S), np.zeros(none, np.float32)
    places, gates, chosen = (np.asarray(x) for x in (slots.place, slots.gate, slots.expert))
    for (s, k), place in np.ndenumerate(places):
        if place < none:
            token[place], weight[place] = s, gates[s, k]
            assert chosen[s, k] == place // TIGHT
        else:
            assert gates[s, k] == 0 and chosen[s, k] < 0
    np.testing.assert_array_equal(slots.token, token.reshape(experts, TIGHT))
    np.testing.assert_array_equal(slots.weight, weight.reshape(experts, TIGHT))


@routing_property
def permuting_experts_permutes_the_plan(case: Case) -> None:
    # Groups of experts stay together. At test time: an auction's total is the best one only within
    # its tolerance, and draws differ from expert to expert.
    @few_examples
    @given(case.drawn, case.drawn_experts)
    def check(group: Group, order: Array):
        plan, other = case.plan(group), case.plan(group.of_experts(order))
        np.testing.assert_allclose(plan.dispatch[:, order], other.dispatch, rtol=1e-5)
        np.testing.assert_allclose(plan.combine[:, order], other.combine, rtol=1e-5)
        np.testing.assert_array_equal(plan.counts.demand[order], other.counts.demand)
        for name, value in plan.losses.items():
            np.testing.assert_allclose(value, other.losses[name], rtol=1e-4, atol=1e-6)

    check()


@routing_property
def full_capacity_is_dropless(case: Case) -> None:
    # Everything asked for is granted, with the weights of a router that cannot drop.
    router, capacity = case.router, case.router.capacity
    rule = Capacity(dropless="always", renormalize=capacity.renormalize, reroute=capacity.reroute)
    # Without losses and head, which do not matter here, presets share what is compiled.
    plain = Router(router.score, router.select, capacity=rule, free=router.free)
    dropless = Case(case.name, plain, case.experts)
    assert dropless.router.slots(S, case.experts, train=True) == S

    @few_examples
    @given(case.drawn)
    def check(group: Group):
        plan, expected = case.plan(group, S), dropless.plan(group, S)
        assert plan.counts.dropped == 0 and plan.counts.unrouted == 0
        np.testing.assert_array_equal(plan.counts.load, plan.counts.demand)
        np.testing.assert_allclose(weights(plan), weights(expected), rtol=1e-6)

    check()


@routing_property
def order_of_tokens_matters_only_without_priority(case: Case) -> None:
    if order_matters(case.router):
        # All want expert 0 first: the first two tokens are served, whoever they are. The logits are
        # positive, so that a router with a threshold serves them, too.
        logits = np.tile(8 - np.arange(case.scored, dtype=np.float32), (S, 1))
        logits[:, 0] += np.arange(S) * 0.1
        ids = np.zeros(S, int)
        forward = case.plan(case.of(logits, ids=ids))
        backward = case.plan(case.of(logits[::-1], ids=ids))
        assert seats(forward)[:TIGHT].any(1).all() and seats(backward)[:TIGHT].any(1).all()
        assert not np.array_equal(seats(forward)[::-1], seats(backward))
        return

    @few_examples
    @given(case.drawn, st_order)
    def check(group: Group, order: Array):
        plan, other = case.plan(group), case.plan(group.of_tokens(order))
        np.testing.assert_allclose(seats(plan)[order], seats(other), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights(plan)[order], weights(other), rtol=1e-5, atol=1e-6)

    check()


def uniform_logits(case: Case) -> Array:
    """Returns ``(S, E)`` under which all experts, and all groups of them, are equally wanted.

    The rows are one row shifted in every way that keeps groups together, so that each expert is
    the first choice of as many tokens, the second of as many, and so on.
    """
    among, within = np.array([1, 0, 0.5, 0.2]), np.array([3.0, 0])[: case.inside]
    row = (among[:, None] + within) if case.inside > 1 else np.array([3.0, 1, 2, 0])[:, None]
    shifts = [(g, w) for w in range(case.inside) for g in range(4)] * (S // 4 // case.inside)
    rows = [np.roll(row, shift, (0, 1)).reshape(-1) for shift in shifts]
    return np.stack(rows).astype(np.float32)


@routing_property
def balance_is_even_at_uniform_routing(case: Case) -> None:
    # 1 in Switch's normalisation; a coefficient of variation is 0.
    plan = case.plan(case.of(uniform_logits(case)), S)
    losses = plan.losses
    expected = {}
    for part in case.router.balance:
        match part:
            case LoadBalance(choices="all"):
                expected[part.name] = plan.counts.demand.sum() / S  # choices of a token
            case (
                LoadBalance()
                | SecondBalance()
                | TokenBalance()
                | DeviceBalance()
                | CommunicationBalance()
            ):
                expected[part.name] = 1
            case Importance() | Load():
                expected[part.name] = 0
    assert expected
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@routing_property
def a_group_is_routed_alone_as_among_others(case: Case) -> None:
    draw = np.random.default_rng(7)
    groups = [case.group(seed, draw.random(S) < 0.8) for seed in range(3)]
    groups[2] = case.group(2, np.zeros(S, bool))
    together, keys = case.plans(groups, key=KEY), jax.random.split(KEY, 3)
    for g, group in enumerate(groups):
        alone = case.plan(group, key=keys[g])
        one = jax.tree.map(lambda leaf, g=g: leaf[g], together)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@routing_property
def a_sequence_is_routed_alone_as_in_a_batch(case: Case) -> None:
    # At test time with room for all. Four tokens are one sequence, the others another.
    first = np.arange(S) < 4
    for seed in range(5):
        group = case.group(seed)
        alone = case.plan(Group(group.logits, first, group.ids, group.bias), S)
        together = case.plan(group, S)
        np.testing.assert_allclose(weights(alone)[:4], weights(together)[:4], rtol=1e-6)


@routing_property
def a_key_matters_only_to_routers_that_draw(case: Case) -> None:
    # Scores differ so much that some second choices are given up, and noise still matters: within
    # a token by 2, so that its second gate is 0.12.
    logits = np.stack([np.roll(2.0 * np.arange(case.scored), s) for s in range(S)])
    group = case.of(logits + normal(3, S, case.scored, scale=0.1))
    keys = [jax.random.key(seed) for seed in (0, 0, 1, 2, 3, 4)]
    plans = [case.plan(group, S, key) for key in keys]
    for a, b in zip(*(jax.tree.leaves(plan) for plan in plans[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    differ = any(not np.array_equal(weights(plans[0]), weights(plan)) for plan in plans[1:])
    assert differ == draws(case.router)


def objectives(case: Case, group: Group, key: Array, logits: jax.Array):
    """Returns ``(2,)``, a fixed random weighting of ``combine`` and the sum of losses; the seats.

    The other objective of mixtures is of what goes in.
    """
    state = case.state(Group(np.asarray(group.logits), group.valid, group.ids, group.bias))
    plan = case.router(
        case.shaped(logits),
        capacity=TIGHT,
        valid=group.valid,
        token_ids=group.ids,
        rng=key,
        state=state,
    )
    combined = (plan.combine.sum(-1) * normal(11, S, case.experts)).sum()
    if isinstance(plan.slots, Mixture):
        combined += (plan.dispatch.sum(-1) * normal(13, S, case.experts)).sum()
    if plan.free is not None:
        combined += (plan.free * normal(19, *plan.free.shape)).sum()
    losses = sum(plan.losses.values(), jnp.zeros((), logits.dtype))
    return jnp.stack([combined, losses]), plan.dispatch.sum(-1)


@functools.cache
def training_gradient(case: Case) -> tuple[Array, Array, Array]:
    """Returns the analytic and the numeric Jacobian ``(2, S, E, P)`` in float64, and the seats.

    In training, draws fixed by the key. The logits are generic, so no step of 1e-5 changes a
    choice; the error of central differences is about step**2. Token 3 is padding.
    """
    group, step = case.group(12, np.arange(S) != 3), 1e-5
    with jax.enable_x64(True):
        logits = group.logits.astype(np.float64)
        f = functools.partial(objectives, case, group, KEY)
        steps = np.eye(logits.size).reshape(-1, *logits.shape) * step
        moved = np.concatenate([logits + steps, logits - steps])

        @compiled
        def both(logits: jax.Array, moved: jax.Array):
            return jax.jacrev(f, has_aux=True)(logits), jax.lax.map(lambda x: f(x)[0], moved)

        (analytic, seated), values = both(logits, moved)
        up, down = np.split(np.asarray(values), 2)
        numeric = ((up - down) / (2 * step)).T.reshape(2, *logits.shape)
        assert analytic.dtype == np.float64
    return np.asarray(analytic), numeric, np.asarray(seated)


@routing_property
def gradients_equal_finite_differences(case: Case) -> None:
    analytic, numeric, _ = training_gradient(case)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-7)


@routing_property
def task_teaches_the_router(case: Case) -> None:
    # Padding takes no part in the output; everybody who is routed teaches the router, but for the
    # only choice left of a token, whose weight is 1 whatever its logit if gates are renormalised.
    analytic, _, seated = training_gradient(case)
    task = np.abs(analytic[0]).max((1, 2))
    assert task[3] == 0
    learns = seated.sum(-1) > (1 if case.router.capacity.renormalize else 0)
    assert learns.any() and (task[learns] > 1e-5).all()
    # Every plane of the logits learns.
    assert (np.abs(analytic[0]).max((0, 1)) > 1e-5).all()


@routing_property
def a_gate_has_gradient_from_its_own_token_alone(case: Case) -> None:
    # So that a causal model is causal by gradient, whoever takes whose slot.
    group, token = case.group(31), 4

    @compiled
    def gradient(logits: jax.Array) -> jax.Array:
        def gates(logits: jax.Array) -> jax.Array:
            plan = case.router(
                case.shaped(logits),
                capacity=S,
                token_ids=group.ids,
                rng=KEY,
                state=case.state(group),
            )
            mixed = (plan.combine + plan.dispatch).sum(-1)
            if plan.free is not None:
                mixed = mixed + plan.free.sum(-1, keepdims=True)
            return (mixed[token] * normal(17, case.experts)).sum()

        return jax.grad(gates)(logits)

    reached = np.abs(gradient(group.logits)).max((1, 2)) > 0
    np.testing.assert_array_equal(reached, np.arange(S) == token)


@routing_property
def padding_gets_no_seat_and_changes_nothing(case: Case) -> None:
    # What padding holds reaches no weight, in training as at test time.
    valid = np.arange(S) < 6
    one, other = case.group(21, valid), case.group(22, valid)
    mixed = np.where(valid[:, None, None], one.logits, other.logits * 3)
    mixed = Group(mixed, valid, np.where(valid, one.ids, other.ids), one.bias)
    for key in (None, KEY):
        a, b = case.plan(one, key=key), case.plan(mixed, key=key)
        assert not seats(a)[~valid].any()
        assert not weights(a)[~valid].any()
        np.testing.assert_allclose(weights(a), weights(b), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(a.counts.load, b.counts.load)
