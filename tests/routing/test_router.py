"""What routers do beyond the properties that all of them share, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    Balanced,
    Capacity,
    CommunicationBalance,
    DeviceBalance,
    Everyone,
    Hash,
    Importance,
    LearnedNoise,
    Limit,
    Load,
    LoadBalance,
    Router,
    SecondBalance,
    Softmax,
    SoftSlots,
    Top2,
    TopGroups,
    TopK,
    TopTokens,
    ZLoss,
    preset,
    route,
)
from tests.routing.cases import KEY, TIGHT, Case, Group, case
from tests.routing.helpers import E, S, jitted, jitted_groups, normal, seats, weights

Array = np.ndarray
ALL = np.ones(S, bool)


def test_faces_of_a_grouped_plan_are_those_of_its_groups():
    router = preset("switch")
    logits, valid = normal(8, 2, S, E), np.ones((2, S), bool)
    plan = jitted_groups(router, TIGHT)(logits, valid)
    assert plan.dispatch.shape == plan.combine.shape == (2, S, E, TIGHT)
    assert plan.counts.dropped.shape == (2,)
    one = jax.tree.map(lambda leaf: leaf[1], plan)
    np.testing.assert_array_equal(plan.dispatch[1], one.dispatch)
    np.testing.assert_array_equal(plan.combine[1], one.combine)


def halves(every):
    """Runs a function of four groups on two and two, as on two devices."""

    def run(*arrays):
        parts = [every(*jax.tree.map(lambda x, p=p: x[p], arrays)) for p in (slice(2), slice(2, 4))]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    return run


@pytest.mark.parametrize(
    "router", [preset("random"), preset("loss_free", k=2)], ids=["key", "state"]
)
def test_groups_draw_and_route_the_same_wherever_they_are(router: Router):
    # The one draws by a key, the other chooses by a state that all groups share.
    logits, valid = normal(8, 4, S, E), np.ones((4, S), bool)
    state = {name: normal(9, *shape) for name, shape in router.state_shapes(E).items()}
    found, wanted = (
        route(
            router, logits, capacity=TIGHT, valid=valid, rng=KEY, state=state, spread=spread
        ).slots
        for spread in (halves, None)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", ["switch", "gshard", "expert_choice", "deepseek_v3", "vmoe"])
def test_half_precision_logits_are_computed_on_in_float32(name: str):
    one = case(name)
    logits = one.shaped(one.group(9).logits).astype(jnp.bfloat16)
    run, state = jitted(one.router, TIGHT), one.state(one.group(9))
    half, full = (run(x, ALL, None, None, state) for x in (logits, logits.astype(np.float32)))
    assert half.slots.weight.dtype == half.combine.dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in half.losses.values())
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_router_in_the_precision_of_its_input():
    logits = normal(9, S, E).astype(jnp.bfloat16)
    for name in ("switch", "fairseq_top2"):
        choice = {"switch": {"precision": "input"}, "fairseq_top2": {"fp32_gating": False}}[name]
        plan = jitted(preset(name, **choice), TIGHT)(logits, ALL)
        assert plan.slots.weight.dtype == jnp.bfloat16


def test_without_a_mask_every_token_is_valid():
    router, logits = preset("switch"), normal(10, S, E)
    without = jax.jit(functools.partial(router, capacity=TIGHT))(logits)
    masked = jitted(router, TIGHT)(logits, ALL)
    for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_fairseq_routes_padding_unless_told_not_to():
    logits, valid = normal(10, S, E), np.arange(S) < 4
    for masked in (False, True):
        plan = jitted(preset("fairseq_top1", pad_mask=masked), S)(logits, valid)
        assert plan.counts.valid == (4 if masked else 8)
        assert seats(plan)[4:].any() != masked


@pytest.mark.parametrize("name", ["switch", "fairseq_top2", "expert_choice"])
def test_counts_have_no_gradient(name: str):
    def total(logits: jax.Array) -> jax.Array:
        counts = preset(name)(logits, capacity=TIGHT, valid=ALL).counts
        return sum(leaf.sum() for leaf in jax.tree.leaves(counts))

    assert not np.any(jax.jit(jax.grad(total))(normal(14, S, E)))


@pytest.mark.parametrize("name", ["switch", "gshard", "top2_mtf", "olmoe", "vmoe"])
def test_padding_gets_no_gradient_from_masked_losses(name: str):
    # Mesh-TensorFlow's Switch is left out: there padding is in both factors of the loss.
    one, valid = case(name), np.arange(S) < 5

    def total(logits: jax.Array) -> jax.Array:
        losses = one.router(logits, capacity=TIGHT, valid=valid).losses
        return sum(losses.values())

    gradient = jax.jit(jax.grad(total))(normal(15, S, E))
    assert np.any(gradient[:5]) and not np.any(gradient[5:])


@pytest.mark.parametrize("name", ["deepseek_v3", "loss_free"])
def test_no_gradient_reaches_the_balance_bias_though_it_decides(name: str):
    one = case(name)
    group, bias = one.group(16), normal(17, one.experts, scale=0.5)

    def objective(bias: jax.Array) -> jax.Array:
        state = {"bias": bias}
        plan = one.router(one.shaped(group.logits), capacity=S, valid=ALL, state=state)
        return (plan.combine.sum(-1) ** 2).sum() + sum(plan.losses.values())

    assert not np.any(jax.jit(jax.grad(objective))(bias))
    biased = Group(group.logits, group.valid, group.ids, bias)
    assert not np.array_equal(seats(one.plan(group, S)), seats(one.plan(biased, S)))


@pytest.mark.parametrize(
    ("name", "choices", "steps"),
    [
        ("loss_free", {"bias_rate": 0.01}, 200),
        ("loss_free", {"bias_rate": 0.01, "rule": "centred"}, 200),
        ("pi_balancing", {"bias_rate": 0.01, "bias_gain": 0.05}, 200),
        ("quantile_balancing", {}, 12),
    ],
)
def test_the_bias_evens_the_load_out(name: str, choices: dict, steps: int):
    # All tokens prefer expert 0 a little. 200 steps of 0.01 find a bias under which each of four
    # experts has within a token or two of its even share of 16; quantiles find it in few steps.
    router, logits = preset(name, k=1, **choices), normal(18, 64, 4)
    logits[:, 0] += 1
    run, valid = jitted(router, 64), np.ones(64, bool)
    state = {part: jnp.zeros(shape) for part, shape in router.state_shapes(4).items()}
    before = run(logits, valid, None, None, state).counts.demand
    for _ in range(steps):
        counts = run(logits, valid, None, None, state).counts
        state = router.next_state(state, counts.demand, counts.observed)
    after = run(logits, valid, None, None, state).counts.demand
    assert before.max() > 25 and np.abs(after - 16).max() <= 2


def test_what_is_observed_adds_up_over_groups():
    # Three groups, of which one has padding: the sums are those of all their tokens in one group,
    # to the last bit, so that devices and microbatches find the same bias.
    one = Case("", preset("quantile_balancing", k=2))
    groups = [one.group(seed, np.arange(S) < 8 - seed) for seed in range(3)]
    parts = one.plans(groups).counts
    whole = (
        np.concatenate([group.logits for group in groups]),
        np.concatenate([group.valid for group in groups]),
    )
    together = one.router(whole[0][..., 0], valid=whole[1]).counts
    for name, value in together.observed.items():
        np.testing.assert_array_equal(parts.observed[name].sum(0), value)
    assert together.observed["tokens"] == 8 + 7 + 6


def test_groups_draw_independently():
    # Gates near 1/2 each, threshold 1: a second choice is kept once in two.
    router = preset("top2_mtf", second="random", threshold=1.0)
    logits, valid = np.zeros((2, 64, 2), np.float32), np.ones((2, 64), bool)
    kept = seats(jitted_groups(router, 64)(logits, valid, KEY))
    assert not np.array_equal(kept[0], kept[1])


@pytest.mark.parametrize("name", ["base", "sinkhorn", "deepseek_v2"])
def test_training_couples_the_tokens_of_a_group_and_test_time_does_not(name: str):
    # Token 0 keeps its logits, the others change: in training some of them send it elsewhere.
    one = case(name)
    base, others = one.group(30), [one.group(seed) for seed in range(31, 51)]
    logits = [np.concatenate([base.logits[:1], other.logits[1:] * 3]) for other in others]
    for key in (KEY, None):
        first = [weights(one.plan(one.of(x), S, key))[0] for x in logits]
        assert (
            np.ptp(first, axis=0).max() > 0.1 if key is not None else np.ptp(first, 0).max() < 1e-6
        )


def test_base_and_sinkhorn_are_even_in_training():
    # All prefer expert 0. BASE seats two tokens on each expert, Sinkhorn's best guesses nearly so.
    logits = normal(40, S, E) + np.array([3, 0, 0, 0], np.float32)
    for name, most in (("base", 2), ("sinkhorn", 4)):
        run = jitted(preset(name), S)
        assert run(logits, ALL, KEY).counts.demand.max() <= most
        assert run(logits, ALL).counts.demand[0] >= 6


def test_soft_moe_mixes():
    # All weights going into a slot sum to 1 over valid tokens, all coming out to 1 over slots.
    one = case("soft_moe")
    plan = one.plan(one.group(50, np.arange(S) < 6))
    dispatch, combine = np.asarray(plan.dispatch), np.asarray(plan.combine)
    np.testing.assert_allclose(dispatch.sum(0), np.ones((E, TIGHT)), rtol=1e-5)
    np.testing.assert_allclose(combine.sum((1, 2)), np.arange(S) < 6, rtol=1e-5)
    assert (dispatch >= 0).all() and (combine >= 0).all()
    assert not dispatch[6:].any() and not combine[6:].any()
    assert plan.counts.dropped == plan.counts.unrouted == 0
    assert one.router.slots(1000, E, train=True) == TIGHT


def test_state_of_all_parts_is_carried_together():
    router = dataclasses.replace(preset("loss_free"), balance=(LoadBalance(ema=0.5),))
    assert router.state_shapes(2) == {"bias": (2,), "load_ema": (2,)}
    state = router.next_state({"bias": jnp.zeros(2), "load_ema": jnp.zeros(2)}, jnp.array([3, 1.0]))
    np.testing.assert_allclose(state["bias"], [-1e-3, 1e-3])
    np.testing.assert_allclose(state["load_ema"], [0.375, 0.125])
    assert preset("switch").state_shapes(2) == {}


def test_experts_per_token():
    # Expert choice: 2 slots per even share; TopK its k; everyone E.
    assert preset("expert_choice").experts_per_token(64, 8) == 2
    assert preset("mixtral").experts_per_token(64, 8) == 2
    assert preset("jacobs_1991").experts_per_token(64, 8) == 8
    assert preset("soft_moe").experts_per_token(64, 8) == 8 / 64


@pytest.mark.parametrize("name", ["switch", "expert_choice", "vmoe"])
def test_no_more_slots_than_tokens(name: str):
    router = preset(name)
    assert router.slots(64, 4, train=True) <= router.slots(64, 4, train=False) <= 64
    assert router.slots(2, 64, train=True) <= 2


def with_balance(*parts, name: str = "switch") -> Callable[[], object]:
    return lambda: dataclasses.replace(preset(name), balance=parts)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "LoadBalance, experts choose": (
        with_balance(LoadBalance(), name="expert_choice"),
        "LoadBalance needs tokens that choose.*select=TopTokens.*even by construction",
    ),
    "Importance, experts choose": (
        with_balance(Importance(), name="expert_choice_mtf"),
        "Importance needs tokens that choose",
    ),
    "Load, Soft MoE": (with_balance(Load(), name="soft_moe"), "Load needs.*select=SoftSlots"),
    "DeviceBalance, experts choose": (
        with_balance(DeviceBalance(), name="expert_choice"),
        "DeviceBalance needs tokens that choose",
    ),
    "CommunicationBalance, experts choose": (
        with_balance(CommunicationBalance(), name="expert_choice"),
        "CommunicationBalance needs tokens that choose",
    ),
    "SecondBalance, one choice": (
        with_balance(SecondBalance()),
        "SecondBalance needs second choices, but select=TopK.*use Top2",
    ),
    "SecondBalance, BASE": (with_balance(SecondBalance(), name="base"), "select=Balanced"),
    "two losses of one name": (
        with_balance(ZLoss(1e-3), ZLoss(1e-4)),
        "two losses share a name in balance: z, z",
    ),
    "gate on the way in, experts choose": (
        lambda: dataclasses.replace(preset("expert_choice"), gate_on="in"),
        "gate_on='in' needs tokens that choose experts.*TopTokens.*gate_on='out'",
    ),
    "gate on the way in, Soft MoE": (
        lambda: dataclasses.replace(preset("soft_moe"), gate_on="in"),
        "gate_on='in'.*SoftSlots",
    ),
    "reroute, experts choose": (
        lambda: Router(Softmax(), TopTokens(), capacity=Capacity(reroute=True)),
        "capacity.reroute needs tokens that choose experts",
    ),
    "reroute, Soft MoE": (
        lambda: Router(Softmax(), SoftSlots(), capacity=Capacity(reroute=True)),
        "capacity.reroute needs tokens that choose experts",
    ),
    "more choices than experts": (
        lambda: Router(Softmax(), TopK(5)).check(4),
        "k=5 experts per token, but there are 4 experts",
    ),
    "more random choices than experts": (
        lambda: preset("random", k=5).check(4),
        "k=5 experts per token, but there are 4 experts",
    ),
    "Top2 of one": (lambda: Router(Softmax(), Top2()).check(1), "Top2 needs 2 experts"),
    "limit too tight": (
        lambda: Router(Softmax(), TopK(3, limit=Limit(4, 1))).check(8),
        "1 of 4 groups of 8 experts cannot hold 3 per token",
    ),
    "limit that does not divide": (
        lambda: Router(Softmax(), TopK(1, limit=Limit(3, 1))).check(8),
        "groups of 8 experts",
    ),
    "hierarchical groups": (
        lambda: Router(Softmax(), TopGroups(3, 1, 1)).check(8),
        "groups of 8 experts",
    ),
    "loss over devices": (
        lambda: Router(Softmax(), TopK(1), (DeviceBalance(devices=3),)).check(8),
        "DeviceBalance: 8 experts do not divide over devices=3",
    ),
    "slots over devices": (
        lambda: Router(Softmax(), TopK(1), capacity=Capacity(devices=3)).check(8),
        "capacity.devices=3 does not divide 8 experts",
    ),
    "one plane for learned noise": (
        lambda: Router(Softmax(noise=LearnedNoise()), TopK(1)).plan_group(
            np.zeros((2, 4)), capacity=1
        ),
        "reads 2 logits per token and expert, but the input has 1",
    ),
    "two planes for none": (
        lambda: Router(Softmax(), TopK(1)).plan_group(np.zeros((2, 4, 2)), capacity=1),
        "reads 1 logits per token and expert, but the input has 2",
    ),
    "hash without ids": (
        lambda: Router(Softmax(), Hash())(np.zeros((2, 4)), capacity=1),
        "pass token_ids",
    ),
    "bias without state": (
        lambda: preset("loss_free", k=1).plan_group(np.zeros((2, 4)), capacity=1),
        "needs state=.'bias'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nonsense_is_refused_by_name_in_one_line(what: str):
    make, reason = REFUSED[what]
    with pytest.raises(ConfigError, match=reason) as error:
        make()
    assert "\n" not in str(error.value)


def test_unusual_compositions_are_not_nonsense():
    for select in (Balanced(), Everyone(), Top2("none"), TopGroups(2, 1, 1)):
        router = Router(Softmax(), select, (LoadBalance(), ZLoss()), Capacity(1.0, minimum=1))
        plan = router(normal(60, S, E), capacity=TIGHT, rng=KEY)
        assert np.isfinite(weights(plan)).all()


# Defaults of a call


def _same_plan(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_capacity_is_that_of_evaluation_and_with_a_key_that_of_training():
    # 8 tokens and 4 experts: 2 tokens per expert, times 2 in training and 4 in evaluation.
    router = preset("switch", capacity_factor=2.0, eval_capacity_factor=4.0)
    logits = normal(70, S, E)
    assert router(logits).combine.shape == (S, E, 8)
    assert router(logits, rng=KEY).combine.shape == (S, E, 4)


def test_state_and_further_logits_start_as_zeros():
    bias = preset("loss_free", k=1)
    logits, zeros = normal(71, S, E), {"bias": np.zeros(E)}
    _same_plan(bias(logits, capacity=S), bias(logits, capacity=S, state=zeros))
    noisy = Router(Softmax(noise=LearnedNoise()), TopK(1))
    further = np.stack([logits, np.zeros_like(logits)], -1)
    _same_plan(noisy(logits, capacity=2, rng=KEY), noisy(further, capacity=2, rng=KEY))


def test_groups_are_routed_one_by_one():
    router, logits = preset("gshard", second="always"), normal(72, 3, S, E)
    plan = router(logits)
    assert plan.combine.shape[:3] == (3, S, E)
    _same_plan(jax.tree.map(lambda x: x[1], plan), router(logits[1]))
    valid = np.arange(S) < np.array([[0], [3], [S]])
    assert router(logits, valid=valid).counts.valid.tolist() == [0, 3, S]


def test_one_group_may_have_the_axis_of_its_single_logit():
    logits = jnp.array([[2.0, 0.0], [1.0, 3.0]])
    plain, with_axis = (preset("switch")(x) for x in (logits, logits[..., None]))
    np.testing.assert_array_equal(with_axis.combine, plain.combine)
