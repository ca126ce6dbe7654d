"""Properties that every router has, new presets included."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from moe_jax.routing import PRESETS, Plan, Router, TopTokens, preset
from tests.routing.helpers import (
    ROUTERS,
    E,
    S,
    drawn_experts,
    drawn_logits,
    drawn_order,
    drawn_valid,
    examples,
    jitted,
    jitted_groups,
    normal,
    seats,
    weights,
)

Array = np.ndarray
TIGHT = 2
ALL = np.ones(S, bool)
KEY = jax.random.key(1)
# Each expert is the first choice of 2 of the 8 tokens, the second of 2, and so on: all means equal.
UNIFORM = np.stack([np.roll([3.0, 2, 1, 0], shift) for shift in range(4)] * 2).astype(np.float32)


def over(names: Iterable[str]) -> pytest.MarkDecorator:
    names = list(names)
    return pytest.mark.parametrize("router", [ROUTERS[name] for name in names], ids=names)


every_router = over(ROUTERS)
PRESET_NAMES = [function.__name__ for function in PRESETS]
every_preset = over(PRESET_NAMES)
RANDOM = [name for name, part in ROUTERS.items() if getattr(part.select, "second", "") == "random"]
with_and_without_key = pytest.mark.parametrize(
    ("router", "key"),
    [(router, None) for router in ROUTERS.values()] + [(ROUTERS[name], KEY) for name in RANDOM],
    ids=[*ROUTERS, *(f"{name}-key" for name in RANDOM)],
)


def experts_per_token(router: Router) -> int:
    return E if router.experts_choose else router.select.choices_per_token


@with_and_without_key
def test_plan_is_well_formed(router: Router, key):
    @examples
    @given(drawn_logits, drawn_valid)
    def check(logits, valid):
        plan = jitted(router, TIGHT)(logits, valid, key)
        dispatch, combine, counts = np.asarray(plan.dispatch), np.asarray(plan.combine), plan.counts
        # Every slot holds one token at most, no expert is above capacity, no token twice in one.
        assert set(np.unique(dispatch)) <= {0, 1}
        assert dispatch.sum(0).max() <= 1
        assert seats(plan).sum(0).max() <= TIGHT and seats(plan).max() <= 1
        assert seats(plan).sum(1).max() <= experts_per_token(router)
        # Padding sits nowhere.
        assert not dispatch[~valid].any()
        np.testing.assert_array_equal(combine != 0, dispatch != 0)
        # Counts say what the dispatch tensor says.
        np.testing.assert_array_equal(counts.load, seats(plan).sum(0))
        assert counts.unrouted == (valid & (seats(plan).sum(1) == 0)).sum()
        assert counts.valid == valid.sum()
        assert (np.asarray(counts.overflow) >= 0).all()
        assert counts.dropped == np.sum(counts.demand) - np.sum(counts.load)
        np.testing.assert_array_equal(plan.slots.filled, dispatch.any(0))
        if router.experts_choose:
            assert plan.slots.place is None and plan.slots.gate is None
        else:
            check_index_maps(plan)

    check()


def check_index_maps(plan: Plan) -> None:
    """``place`` and ``gate`` by token say what ``token`` and ``weight`` say by slot."""
    slots = plan.slots
    token, weight = np.full(E * TIGHT, S), np.zeros(E * TIGHT, np.float32)
    for (s, k), place in np.ndenumerate(np.asarray(slots.place)):
        if place < E * TIGHT:
            token[place], weight[place] = s, np.asarray(slots.gate)[s, k]
        else:
            assert np.asarray(slots.gate)[s, k] == 0
    np.testing.assert_array_equal(slots.token, token.reshape(E, TIGHT))
    np.testing.assert_array_equal(slots.weight, weight.reshape(E, TIGHT))


@with_and_without_key
def test_full_capacity_drops_nothing(router: Router, key):
    @examples
    @given(drawn_logits, drawn_valid)
    def check(logits, valid):
        counts = jitted(router, S)(logits, valid, key).counts
        assert counts.dropped == 0 and counts.unrouted == 0

    check()


@with_and_without_key
def test_permuting_the_experts_permutes_the_plan(router: Router, key):
    @examples
    @given(drawn_logits, drawn_valid, drawn_experts)
    def check(logits, valid, order):
        logits = logits + normal(5, S, E, scale=1e-2)  # no ties, which go to the first expert
        plan = jitted(router, TIGHT)(logits, valid, key)
        other = jitted(router, TIGHT)(logits[:, order], valid, key)
        np.testing.assert_array_equal(plan.dispatch[:, order], other.dispatch)
        np.testing.assert_allclose(plan.combine[:, order], other.combine, rtol=1e-5)
        np.testing.assert_array_equal(plan.counts.demand[order], other.counts.demand)
        for name, value in plan.losses.items():
            np.testing.assert_allclose(value, other.losses[name], rtol=1e-5)

    check()


def order_matters(router: Router) -> bool:
    return not router.experts_choose and router.capacity.priority != "score"


@over(name for name, router in ROUTERS.items() if not order_matters(router))
def test_order_of_tokens_does_not_matter_to_prioritised_routing(router: Router):
    @examples
    @given(drawn_logits, drawn_valid, drawn_order)
    def check(logits, valid, order):
        plan = jitted(router, TIGHT)(logits, valid)
        other = jitted(router, TIGHT)(logits[order], valid[order])
        np.testing.assert_array_equal(seats(plan)[order], seats(other))
        np.testing.assert_allclose(weights(plan)[order], weights(other), rtol=1e-5)

    check()


@over(name for name, router in ROUTERS.items() if order_matters(router))
def test_order_of_tokens_matters_to_plain_routing(router: Router):
    # All want expert 0 and then expert 1: the first two tokens are served, whoever they are.
    logits = np.tile(np.array([3, 2, 1, 0], np.float32), (S, 1))
    logits += np.arange(S, dtype=np.float32)[:, None] * [0.1, 0, 0, 0]
    forward = jitted(router, TIGHT)(logits, ALL)
    backward = jitted(router, TIGHT)(logits[::-1], ALL)
    assert seats(forward)[:2, 0].all() and seats(backward)[:2, 0].all()
    assert not np.array_equal(seats(forward)[::-1], seats(backward))


@every_router
def test_balance_is_one_at_uniform_routing(router: Router):
    losses = jitted(router, S)(UNIFORM, ALL).losses
    for name in ("balance", "second_balance"):
        if name in losses:
            all_choices = any(getattr(part, "choices", "") == "all" for part in router.balance)
            expected = experts_per_token(router) if all_choices else 1
            np.testing.assert_allclose(losses[name], expected, rtol=1e-5)
    if "token_balance" in losses:
        equal = np.zeros((S, E), np.float32)
        np.testing.assert_allclose(jitted(router, S)(equal, ALL).losses["token_balance"], 1)


@every_preset
def test_a_group_is_routed_alone_as_among_others(router: Router):
    logits, valid = normal(7, 3, S, E), np.random.default_rng(7).random((3, S)) < 0.8
    valid[2] = False
    together = jitted_groups(router, TIGHT)(logits, valid, KEY)
    keys = jax.random.split(KEY, 3)
    for g in range(3):
        alone = jitted(router, TIGHT)(logits[g], valid[g], keys[g])
        one = jax.tree.map(lambda leaf, g=g: leaf[g], together)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_faces_of_a_grouped_plan_are_those_of_its_groups():
    router = preset("switch")
    logits, valid = normal(8, 2, S, E), np.ones((2, S), bool)
    plan = jitted_groups(router, TIGHT)(logits, valid)
    assert plan.dispatch.shape == plan.combine.shape == (2, S, E, TIGHT)
    assert plan.counts.dropped.shape == (2,)
    one = jax.tree.map(lambda leaf: leaf[1], plan)
    np.testing.assert_array_equal(plan.dispatch[1], one.dispatch)
    np.testing.assert_array_equal(plan.combine[1], one.combine)


@every_preset
def test_half_precision_logits_are_computed_on_in_float32(router: Router):
    logits = normal(9, S, E).astype(jnp.bfloat16)
    half = jitted(router, TIGHT)(logits, ALL)
    full = jitted(router, TIGHT)(logits.astype(np.float32), ALL)
    assert half.slots.weight.dtype == half.combine.dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in half.losses.values())
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_mask_every_token_is_valid():
    router, logits = preset("switch"), normal(10, S, E)
    without = jax.jit(functools.partial(router, capacity=TIGHT))(logits)
    for a, b in zip(
        jax.tree.leaves(without),
        jax.tree.leaves(jitted(router, TIGHT)(logits, ALL)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def objectives(router: Router, logits: jax.Array, valid: Array) -> jax.Array:
    """Returns ``(2,)``: a fixed random weighting of ``combine``, and the sum of the losses."""
    plan = router(logits, capacity=TIGHT, valid=valid)
    combined = (plan.combine.sum(-1) * normal(11, S, E)).sum()
    return jnp.stack([combined, sum(plan.losses.values(), jnp.zeros((), logits.dtype))])


@over([*PRESET_NAMES, "top2_mtf+threshold+second", "top2+renormalize"])
def test_gradients_equal_finite_differences(router: Router):
    # Central differences in float64: error about step**2. The draws are generic, so no step of 1e-5
    # changes a choice. Token 3 is padding.
    valid = np.arange(S) != 3
    with jax.enable_x64(True):
        logits, step = normal(12, S, E).astype(np.float64), 1e-5
        f = functools.partial(objectives, router, valid=valid)
        gradient = np.asarray(jax.jit(jax.jacrev(f))(logits))
        steps = np.concatenate([np.eye(S * E), -np.eye(S * E)]).reshape(-1, S, E) * step
        up, down = np.split(np.asarray(jax.jit(jax.vmap(f))(logits + steps)), 2)
    seated = seats(jitted(router, TIGHT)(logits, valid)).sum(-1)
    assert gradient.dtype == np.float64
    numeric = ((up - down) / (2 * step)).T.reshape(2, S, E)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
    # Padding takes no part in the output; everybody who is routed teaches the router, but for the
    # only choice left of a token, whose weight is 1 whatever its logit if gates are renormalised.
    assert not gradient[0, 3].any()
    learns = seated > (1 if router.capacity.renormalize else 0)
    assert learns.any() and (np.abs(gradient[0]).max(-1) > 1e-4)[learns].all()


@over(["switch", "top2+renormalize", "expert_choice"])
def test_counts_have_no_gradient(router: Router):
    def total(logits: jax.Array) -> jax.Array:
        counts = router(logits, capacity=TIGHT, valid=ALL).counts
        return sum(leaf.sum() for leaf in jax.tree.leaves(counts))

    assert not np.any(jax.jit(jax.grad(total))(normal(14, S, E)))


@pytest.mark.parametrize("name", ["switch", "gshard", "top2_mtf"])
def test_padding_gets_no_gradient_from_masked_losses(name: str):
    # Mesh-TensorFlow's Switch is left out: there padding is in both factors of the loss.
    valid = np.arange(S) < 5
    f = jax.jit(jax.grad(lambda x: objectives(preset(name), x, valid)[1]))
    gradient = f(normal(15, S, E))
    assert np.any(gradient[:5]) and not np.any(gradient[5:])


def test_same_key_same_plan_and_another_key_another_plan():
    # Gates near 1/2 each, threshold 4: a second choice is kept once in eight.
    router = preset("top2_mtf", second="random", threshold=4.0)
    logits, valid = np.zeros((1, 64, 2), np.float32), np.ones((1, 64), bool)
    plans = [
        seats(jitted_groups(router, 64)(logits, valid, jax.random.key(seed))) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])


def test_groups_draw_independently():
    router = preset("top2_mtf", second="random", threshold=4.0)
    logits, valid = np.zeros((2, 64, 2), np.float32), np.ones((2, 64), bool)
    kept = seats(jitted_groups(router, 64)(logits, valid, KEY))
    assert not np.array_equal(kept[0], kept[1])


@every_router
def test_experts_choose_and_slots(router: Router):
    assert router.experts_choose == isinstance(router.select, TopTokens)
    assert router.slots(64, 4, train=True) <= router.slots(64, 4, train=False) <= 64
    assert router.slots(2, 64, train=True) <= 2
