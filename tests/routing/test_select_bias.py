"""Biases that even out the load: what they rank, and how each step moves them, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import Bias, PIBias, QuantileBias, TopK
from tests.routing.helpers import inputs, normal, scored, select


def test_bias_changes_who_is_chosen_and_not_the_gate():
    # 0.6, 0.3 + 0.35 and 0.1 + 0.45: expert 1 is best, with its own score as gate.
    part = TopK(1, rank=Bias())
    choice = select(part, [[0.6, 0.3, 0.1]], bias=[0, 0.35, 0.45])
    np.testing.assert_array_equal(choice.expert, [[1]])
    np.testing.assert_allclose(choice.gate, [[0.3]])
    # The sum of two gates is of scores alone.
    choice = select(TopK(2, normalize=True, rank=Bias()), [[0.6, 0.3, 0.1]], bias=[0, 0.35, 0.45])
    np.testing.assert_array_equal(choice.expert, [[1, 0]])
    np.testing.assert_allclose(choice.gate, [[1 / 3, 2 / 3]], rtol=1e-6)


def test_the_bias_moves_by_a_thousandth_where_nothing_else_is_set():
    # Wang et al.'s rate. Expert 0 has too many tokens and expert 1 too few.
    after = Bias().next_state({"bias": jnp.zeros(2)}, jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(after["bias"], [-1e-3, 1e-3])


def test_no_gradient_reaches_the_bias():
    part, made = TopK(1, rank=Bias()), scored([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])

    def total(bias: jax.Array) -> jax.Array:
        return (part(made, inputs(made.noisy, bias=bias)).gate ** 2).sum()

    assert not np.any(jax.grad(total)(jnp.array([0, 0.35, 0.45])))


@pytest.mark.parametrize(
    ("rule", "bias"),
    [
        # Mean 2, errors -3, 1 and 2.
        ("sign", [0.4, 0.1, 0.2]),
        # The signs -1, 1 and 1 have the mean 1/3.
        ("centred", [0.5 - 0.4 / 3, 0.2 / 3, 0.1 + 0.2 / 3]),
        ("proportional", [0.35, 0.05, 0.2]),
    ],
)
def test_bias_rises_for_experts_with_too_few_tokens(rule: str, bias: list[float]):
    part = TopK(1, rank=Bias(0.1, rule))
    assert part.state_shapes(3) == {"bias": (3,)}
    state = {"bias": jnp.array([0.5, 0.0, 0.1]), "other": jnp.ones(1)}
    after = part.next_state(state, jnp.array([5.0, 1.0, 0.0]))
    np.testing.assert_allclose(after["bias"], bias, rtol=1e-6)
    assert after["other"] is state["other"]


@pytest.mark.parametrize("rule", ["sign", "proportional", "centred"])
@pytest.mark.parametrize("load", [0.0, 2.0])
def test_bias_rests_at_even_load(rule: str, load: float):
    after = Bias(0.1, rule).next_state({"bias": jnp.array([0.5, 0.2])}, jnp.full(2, load))
    np.testing.assert_allclose(after["bias"], [0.5, 0.2])


def test_a_proportional_step_is_relative_to_the_mean_load_and_to_one_at_least():
    rank = Bias(0.1, "proportional")
    start = {"bias": jnp.zeros(2)}
    # Mean 1.5, errors 0.5 and -0.5: a third of the rate. Mean 0.5, with the same errors: a half.
    after = rank.next_state(start, jnp.array([1.0, 2.0]))["bias"]
    np.testing.assert_allclose(after, [0.1 / 3, -0.1 / 3], rtol=1e-6)
    after = rank.next_state(start, jnp.array([0.0, 1.0]))["bias"]
    np.testing.assert_allclose(after, [0.05, -0.05], rtol=1e-6)


def test_bias_asks_for_its_state_by_name():
    with pytest.raises(ConfigError, match="Bias rank needs state=.'bias'"):
        select(TopK(1, rank=Bias()), [[0.6, 0.4]])


def test_a_centred_bias_keeps_its_mean():
    # Signs alone move the mean: of four experts one is too busy. The centred steps do not.
    state, load = {"bias": jnp.zeros(4)}, jnp.array([9.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(Bias(0.1).next_state(state, load)["bias"].mean(), 0.05, rtol=1e-6)
    after = Bias(0.1, "centred").next_state(state, load)["bias"]
    np.testing.assert_allclose(after, [-0.15, 0.05, 0.05, 0.05], rtol=1e-6)


def test_a_proportional_integral_bias():
    # Mean 2, relative errors -1.5, 0.5 and 1. The integral has a tenth of them, the bias a half
    # more; once the load is even, the bias is the integral alone.
    rank = PIBias(0.1, 0.5)
    state = {name: jnp.zeros(shape) for name, shape in rank.state_shapes(3).items()}
    after = rank.next_state(state, jnp.array([5.0, 1.0, 0.0]))
    np.testing.assert_allclose(after["integral"], [-0.15, 0.05, 0.1], rtol=1e-6)
    np.testing.assert_allclose(after["bias"], [-0.9, 0.3, 0.6], rtol=1e-6)
    rested = rank.next_state(after, jnp.full(3, 2.0))
    np.testing.assert_allclose(rested["bias"], [-0.15, 0.05, 0.1], rtol=1e-6)


def after_quantile(rank: QuantileBias, scores, bias, valid=None):
    """The bias after a step of one expert per token."""
    made = scored(scores)
    given = inputs(made.noisy, valid, bias=bias)
    selection = TopK(1, rank=rank)(made, given)
    load = jnp.stack([(selection.expert == e)[given.valid].sum() for e in range(len(bias))])
    return rank.next_state(
        {"bias": jnp.asarray(bias)}, load.astype(jnp.float32), rank.observe(made, 1, given)
    )["bias"]


def test_a_quantile_bias_by_hand():
    # Four tokens, two experts. The second best score is that of expert 1: its margins are 0, and
    # those of expert 0 are 0.7, 0.5, 0.3 and 0.1. Two tokens are an even share, which exceeds 0.3
    # to 0.5; the histogram finds a value between.
    scores = [[0.8, 0.1], [0.7, 0.2], [0.6, 0.3], [0.5, 0.4]]
    after = after_quantile(QuantileBias(), scores, [0.0, 0.0])
    assert 0.3 <= -after[0] <= 0.5
    np.testing.assert_allclose(after[1], 0, atol=1e-5)
    # Half of the old bias and half of the new.
    half = after_quantile(QuantileBias(decay=0.5), scores, [0.0, 0.0])
    np.testing.assert_allclose(half, after / 2, rtol=1e-6)
    # A bias that splits the tokens two and two: each expert's quantile is between the margins of
    # its own tokens and those of the others, which leaves every token where it is.
    settled = after_quantile(QuantileBias(), scores, [-0.4, 0.0])
    np.testing.assert_allclose(settled, [-0.4, 0.0], atol=0.1)
    np.testing.assert_array_equal(
        select(TopK(1, rank=QuantileBias()), scores, bias=settled).expert, [[0], [0], [1], [1]]
    )


def test_a_quantile_bias_is_near_the_exact_quantile_and_reads_no_padding():
    # The (T K / E + 1)-th largest of s - alpha per expert, by sorting; bins are a sixth of the
    # distance wide, so the step is that of sorting up to a sixth and the gap between two tokens.
    scores = jax.nn.sigmoid(jnp.asarray(normal(0, 400, 4)) + jnp.array([1.0, 0, 0, -1]))
    valid = np.arange(400) % 5 > 0
    bias = np.array([-0.1, 0.05, 0.0, 0.1], np.float32)
    after = after_quantile(QuantileBias(), scores, bias, valid)
    real = np.asarray(scores)[valid].astype(np.float64)
    alpha = np.sort(real + bias, axis=1)[:, -2:-1]
    exact = -np.sort(real - alpha, axis=0)[::-1][len(real) // 4]
    np.testing.assert_allclose(after - bias, exact - bias, rtol=0.2, atol=0.01)
    other = np.where(valid[:, None], scores, 0.99)
    np.testing.assert_array_equal(after_quantile(QuantileBias(), other, bias, valid), after)
    # Padding alone moves nothing.
    none = after_quantile(QuantileBias(), scores, bias, np.zeros(400, bool))
    np.testing.assert_array_equal(none, bias)
