import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import routing
from moe_jax.routing import (
    Capacity,
    DeviceBalance,
    GaussianNoise,
    Importance,
    Inputs,
    Load,
    LoadBalance,
    Router,
    Softmax,
    TopK,
    TopTokens,
)
from moe_jax.routing.changeable import changeable

EXPERTS, TOKENS = 4, 24
LOGITS = jnp.array(np.random.default_rng(0).normal(size=(TOKENS, EXPERTS)) * 2, jnp.float32)
VALID = jnp.arange(TOKENS) < 20
KEY = jax.random.key(0)


def planned(router, capacity, **values):
    """The plan of one group in training; the values are traced, as in a step."""

    def plan(values):
        return router.plan_group(LOGITS, capacity=capacity, valid=VALID, rng=KEY, settings=values)

    return jax.jit(plan)({name: jnp.asarray(value) for name, value in values.items()})


def same(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)


def balanced(k, normalize):
    """A router with every loss that reads the number of choices."""
    losses = (
        LoadBalance(choices="mean"),
        LoadBalance(choices="all", padding="counted", name="all"),
        DeviceBalance(devices=2),
        Importance(),
        Load(),
        Load(excluding=False, name="inclusive"),
    )
    score = Softmax(noise=GaussianNoise())
    return Router(score, TopK(k, normalize=normalize), losses, Capacity(dropless="always"))


@pytest.mark.parametrize(("k", "normalize"), [(1, False), (2, True)])
def test_a_router_with_fewer_choices_is_the_router_of_this_top_k(k, normalize):
    masked = planned(balanced(3, normalize), TOKENS, top_k=k)
    own = planned(balanced(k, normalize), TOKENS)
    same(masked.combine, own.combine)
    same(masked.losses, own.losses)
    same(masked.counts, own.counts)


def test_half_the_factor_is_half_the_slots_and_more_slots_drop_less():
    router = Router(Softmax(), TopK(1), (), Capacity(2.0, minimum=1))
    slots = router.slots(TOKENS, EXPERTS, train=True)
    assert slots == 12  # 2 x 24 / 4
    dropped = []
    for factor in (0.5, 1.0, 2.0):
        small = dataclasses.replace(router, capacity=Capacity(factor, minimum=1))
        own = planned(small, small.slots(TOKENS, EXPERTS, train=True))
        masked = planned(router, slots, capacity_factor=factor)
        # The slots beyond the factor of the step are empty, and the first ones are the same.
        same(masked.combine[..., : own.combine.shape[-1]], own.combine)
        assert not masked.combine[..., own.combine.shape[-1] :].any()
        same(masked.counts, own.counts)
        dropped.append(float(masked.counts.dropped))
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > dropped[-1]


@pytest.mark.parametrize("average", [False, True])
def test_experts_that_choose_take_their_best_tokens_of_fewer_slots(average):
    router = Router(Softmax(over="tokens"), TopTokens(average), (), Capacity(2.0, minimum=1))
    masked = planned(router, 12, capacity_factor=1.0)
    same(masked.combine[..., :6], planned(router, 6).combine)
    assert not masked.combine[..., 6:].any()


@given(
    factor=st.integers(1, 400).map(lambda hundredths: hundredths / 100),
    tokens=st.integers(1, 4096),
    experts=st.integers(1, 64),
    choices=st.integers(1, 8),
    rounding=st.sampled_from(["round", "ceil", "floor", "share"]),
    multiple=st.integers(1, 8),
    per_choice=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_slots_of_a_step_are_those_of_its_factor(
    factor, tokens, experts, choices, rounding, multiple, per_choice
):
    rule = Capacity(factor, rounding=rounding, multiple=multiple, per_choice=per_choice)
    slots = rule.slots(tokens, experts, choices, train=True)
    valid, values = np.ones(tokens, bool), {"capacity_factor": np.float32(factor)}
    inputs = Inputs(None, None, valid, tokens, rng=KEY, settings=values)
    found = int(rule.limit(inputs, experts, choices))
    # Python's own product of a decimal factor can be a hair below a whole number.
    share = factor * (choices if per_choice else 1)
    share *= math.ceil(tokens / experts) if rounding == "share" else tokens / experts
    ties = rounding == "round" and abs(share % 1 - 0.5) < 1e-4
    hair = rounding in ("floor", "share") and 0 < math.ceil(share) - share < 1e-2
    assert found == slots or ties or hair


def test_only_training_reads_the_values_of_a_step():
    router = Router(Softmax(), TopK(1), (), Capacity(2.0, minimum=1))
    values = {"capacity_factor": jnp.float32(0.5)}
    plan = router.plan_group(LOGITS, capacity=12, valid=VALID, settings=values)
    same(plan, router.plan_group(LOGITS, capacity=12, valid=VALID))


def test_the_noise_of_a_step_replaces_the_noise_of_the_router():
    quiet, loud = (Router(Softmax(noise=GaussianNoise(std)), TopK(1)) for std in (0.0, 3.0))
    same(planned(quiet, 12, noise=3.0), planned(loud, 12))
    assert not np.allclose(planned(quiet, 12).combine, planned(loud, 12).combine)


def test_each_router_names_what_can_change():
    found = changeable(routing.preset("switch", capacity_factor=1.5))
    weights = {"balance_weight": math.inf, "z_weight": math.inf}
    assert {k: v for k, v in found.items() if k.endswith("weight")}.keys() <= weights.keys()
    assert (found["capacity_factor"], found["top_k"]) == (1.5, 1)
    # Second choices, budgets of devices and a dropless rule have no value of a step.
    assert "top_k" not in changeable(routing.preset("gshard"))
    assert "capacity_factor" not in changeable(routing.preset("soft_moe"))
    assert "input_jitter" not in changeable(routing.preset("hash"))
    assert changeable(routing.preset("vmoe"))["noise"] == math.inf
