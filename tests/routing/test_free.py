"""Experts without computation, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    Capacity,
    ComputeBias,
    FreeBalance,
    FreeExperts,
    LoadBalance,
    Router,
    Softmax,
    TopK,
    TopTokens,
    preset,
)
from tests.routing.helpers import inputs, scored, seats, weights

# Two experts, then a copy and a zero expert.
ROUTER = Router(Softmax(), TopK(2), capacity=Capacity(), free=FreeExperts(copy=1, zero=1))
SCORES = np.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.4, 0.3], [0.4, 0.1, 0.2, 0.3]])


def test_free_experts_take_no_slot():
    # Token 0 takes the experts 0 and 1, token 1 the copy and the zero, token 2 expert 0 and zero.
    plan = ROUTER(np.log(SCORES), capacity=3)
    np.testing.assert_allclose(weights(plan), [[0.5, 0.3], [0, 0], [0.4, 0]], rtol=1e-6)
    np.testing.assert_allclose(plan.free, [[0, 0], [0.4, 0.3], [0, 0.3]], rtol=1e-6)
    np.testing.assert_array_equal(plan.slots.expert, [[0, 1], [-3, -4], [0, -4]])
    # Nothing is dropped, and the token with free experts alone is not unrouted.
    np.testing.assert_array_equal(plan.counts.demand, [2, 1])
    np.testing.assert_array_equal(plan.counts.observed["free"], [1, 2])
    assert plan.counts.dropped == 0 and plan.counts.unrouted == 0


def test_a_dropped_token_with_a_free_expert_is_not_unrouted():
    # One slot: token 2 loses expert 0, and keeps the zero expert; a further token loses both.
    scores = np.concatenate([SCORES, [[0.5, 0.3, 0.1, 0.1]]])
    plan = ROUTER(np.log(scores), capacity=1)
    np.testing.assert_array_equal(seats(plan), [[1, 1], [0, 0], [0, 0], [0, 0]])
    assert plan.counts.dropped == 3 and plan.counts.unrouted == 1


def test_padding_has_no_free_expert():
    plan = ROUTER(np.log(SCORES), capacity=3, valid=np.array([True, False, True]))
    np.testing.assert_allclose(plan.free, [[0, 0], [0, 0], [0, 0.3]], rtol=1e-6)
    np.testing.assert_array_equal(plan.counts.observed["free"], [0, 1])
    assert plan.counts.unrouted == 0


def test_an_even_share_counts_free_experts():
    # 16 choices of 8 tokens over four experts: four slots at factor 1, and one computation each.
    rule = Capacity(1.0, 1.0, minimum=1, per_choice=True)
    router = dataclasses.replace(ROUTER, capacity=rule)
    assert router.slots(8, 2, train=True) == 4
    assert router.experts_per_token(8, 2) == 1
    assert preset("longcat_flash").experts_per_token(8, 512) == 8


def test_outputs_of_free_experts():
    # A constant expert with the halves x / 2 + v / 2, a copy and a zero.
    part, x = FreeExperts(constant=1, copy=1, zero=1), jnp.array([[2.0, 4.0]])
    given = {"mix": jnp.zeros((2, 1, 2)), "vector": jnp.array([[10.0, 0.0]])}
    shapes = {name: parameter.shape for name, parameter in part.parameters(2).items()}
    assert shapes == {"mix": (2, 1, 2), "vector": (1, 2)}

    def out(*gate: float):
        return part.output(x, jnp.array([gate]), given)

    np.testing.assert_allclose(out(1, 0, 0), [[6, 2]], rtol=1e-6)
    np.testing.assert_allclose(out(0, 0.5, 0), [[1, 2]], rtol=1e-6)
    np.testing.assert_array_equal(out(0, 0, 1), [[0, 0]])
    np.testing.assert_allclose(out(0.5, 1, 1), [[5, 5]], rtol=1e-6)
    # A map with the logits (x0, 0): the share of x is the sigmoid of 2.
    given["mix"] = jnp.array([[[1.0, 0.0]], [[0.0, 0.0]]])
    share = 1 / (1 + np.exp(-2))
    expected = [[share * 2 + (1 - share) * 10, share * 4]]
    np.testing.assert_allclose(out(1, 0, 0), expected, rtol=1e-6)
    assert FreeExperts(copy=2).parameters(8) == {}


def test_the_gate_of_a_copy_teaches_the_router():
    # The copy's gate is the third score; its own gradient 0.4 * (1 - 0.4) at the third logit.
    def gate(logits: jax.Array) -> jax.Array:
        return ROUTER(logits, capacity=3).free[1, 0]

    gradient = jax.grad(gate)(jnp.log(SCORES))
    np.testing.assert_allclose(gradient[1, 2], 0.24, rtol=1e-5)
    assert not gradient[0].any() and not gradient[2].any()


def test_the_balance_loss_with_a_smaller_weight_of_free_experts():
    # Fractions 2/3, 1/3, 1/3 and 2/3; mean scores 1/3, 0.2, 0.7/3 and 0.7/3; free ones count 3/4.
    made = scored(SCORES)
    given = inputs(made.noisy)
    loss = FreeBalance(free=2)(made, TopK(2)(made, given), given)
    expected = 2 / 9 + 0.2 / 3 + 0.75 * (0.7 / 9 + 1.4 / 9)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_bias_for_the_share_of_computation():
    # Twelve choices, of which half should compute: a quarter for each of two experts. They have
    # 6/12 and 1/12: errors -1/4 and 1/6. Free experts have no bias.
    rank = ComputeBias(0.1, free=2, compute=0.5)
    after = rank.next_state({"bias": jnp.zeros(4)}, jnp.array([6.0, 1.0, 3.0, 2.0]))["bias"]
    np.testing.assert_allclose(after, [-0.025, 0.1 / 6, 0, 0], rtol=1e-5)
    rest = rank.next_state({"bias": after}, jnp.zeros(4))["bias"]
    np.testing.assert_array_equal(rest, after)


def test_the_router_hands_its_bias_the_tokens_of_free_experts():
    router = preset("longcat_flash", k=2, copy=2, compute=0.5, bias_rate=0.1)
    assert router.state_shapes(2) == {"bias": (4,)}
    observed = {"free": jnp.array([3.0, 2.0])}
    after = router.next_state({"bias": jnp.zeros(4)}, jnp.array([6.0, 1.0]), observed)["bias"]
    np.testing.assert_allclose(after, [-0.025, 0.1 / 6, 0, 0], rtol=1e-5)


def test_parts_that_need_a_slot_for_every_choice_are_refused():
    free = FreeExperts(copy=1)
    with pytest.raises(ConfigError, match="free experts take no slot, which this select does not"):
        Router(Softmax(), TopTokens(), free=free)
    batch = (LoadBalance(choices="mean", over="batch"),)
    with pytest.raises(ConfigError, match="which this balance over='batch' does not know"):
        Router(Softmax(), TopK(2), batch, free=free)
    with pytest.raises(ConfigError, match=r"this capacity\.renormalize does not know: remove free"):
        Router(Softmax(), TopK(2), capacity=Capacity(renormalize=True), free=free)
