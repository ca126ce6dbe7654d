"""Several logits per expert, by hand."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    Bias,
    Capacity,
    FreeExperts,
    Router,
    Softmax,
    TopK,
    TopTokens,
    preset,
)
from tests.routing.helpers import seats, weights

# Logits 0 and 2 belong to expert 0, logits 1 and 3 to expert 1.
ROUTER = Router(
    Softmax(), TopK(2, normalize=False), capacity=Capacity(minimum=1), redirect=(0, 1, 0, 1)
)
SCORES = np.array([[0.5, 0.1, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])


def test_choices_of_one_expert_are_one_choice_with_the_sum_of_their_gates():
    # Token 0 takes the logits 0 and 2 of expert 0, token 1 both experts, token 2 both experts.
    plan = ROUTER(np.log(SCORES), capacity=3)
    np.testing.assert_allclose(weights(plan), [[0.8, 0], [0.4, 0.3], [0.3, 0.4]], rtol=1e-6)
    np.testing.assert_array_equal(plan.slots.expert, [[0, -1], [0, 1], [1, 0]])
    # Expert 0 has three tokens and expert 1 two; the state of the router counts logits.
    np.testing.assert_array_equal(plan.counts.demand, [3, 2])
    np.testing.assert_array_equal(plan.counts.observed["chosen"], [2, 1, 2, 1])
    assert plan.counts.dropped == 0 and plan.counts.unrouted == 0


def test_a_full_expert_drops_all_choices_of_a_token_and_no_second_slot_is_taken():
    # First choices go before second ones: token 0 and token 1 queue for expert 0, token 2 for 1.
    plan = ROUTER(np.log(SCORES), capacity=2)
    np.testing.assert_array_equal(seats(plan), [[1, 0], [1, 1], [0, 1]])
    assert plan.counts.dropped == 1 and plan.counts.unrouted == 0


def test_gates_over_the_slots_are_divided_by_their_sum():
    router = dataclasses.replace(ROUTER, capacity=Capacity(minimum=1, renormalize=True))
    plan = router(np.log(SCORES), capacity=3)
    np.testing.assert_allclose(weights(plan), [[1, 0], [4 / 7, 3 / 7], [3 / 7, 4 / 7]], rtol=1e-6)


def test_padding_chooses_nothing():
    plan = ROUTER(np.log(SCORES), capacity=3, valid=np.array([False, True, True]))
    np.testing.assert_array_equal(plan.counts.observed["chosen"], [1, 1, 1, 1])
    np.testing.assert_allclose(weights(plan)[0], [0, 0])


def test_a_bias_is_balanced_per_logit():
    select = TopK(2, rank=Bias(rate=0.5))
    router = dataclasses.replace(ROUTER, select=select)
    assert router.state_shapes(2)["bias"] == (4,)
    observed = {"chosen": np.array([2.0, 1.0, 2.0, 1.0], np.float32)}
    state = {"bias": np.zeros(4, np.float32)}
    after = router.next_state(state, np.array([3.0, 2.0], np.float32), observed)
    np.testing.assert_array_equal(np.sign(after["bias"]), [-1, 1, -1, 1])


def test_slots_are_shares_of_the_experts():
    # 8 tokens, 2 experts: factor 1 per choice is 8 slots, at most one choice per token and expert.
    router = dataclasses.replace(ROUTER, capacity=Capacity(1.0, 1.0, minimum=1, per_choice=True))
    assert router.slots(8, 2, train=True) == 8 and router.experts_per_token(8, 2) == 2
    one = dataclasses.replace(router, redirect=(0, 0, 0, 0))
    assert one.slots(8, 1, train=True) == 8 and one.experts_per_token(8, 1) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": TopTokens()}, "which this select does not know"),
        ({"free": FreeExperts(zero=1)}, "which this free does not know"),
        ({"capacity": Capacity(reroute=True)}, "which this capacity.reroute does not know"),
        ({"gate_on": "in"}, "which this gate_on does not know"),
    ],
)
def test_parts_that_need_one_logit_per_expert_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ROUTER, **changes)


def test_every_expert_needs_a_logit():
    with pytest.raises(ConfigError, match=r"names the experts \[0, 1\], and there are 3"):
        ROUTER.check(3)
    assert preset("mixtral").scored(8) == 8 and ROUTER.computing(4) == 2
