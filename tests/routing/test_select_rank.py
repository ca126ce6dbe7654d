"""Rankings other than the score and its bias: transport plan, draws and token ids, by hand."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import Bias, ByToken, Limit, LoadBalance, Sampled, Sigmoid, Sinkhorn, TopK
from tests.routing.helpers import inputs, normal, scored, select

KEY = jax.random.key(0)


def test_sinkhorn_plan_of_two_tokens():
    # Scaling rows and columns keeps the odds ratio, here 9; with even margins t**2 / (1-t)**2 = 9
    # gives t = 3/4. Token 1 prefers expert 0, but less than token 0 does.
    logits = np.log([[18.0, 1.0], [2.0, 1.0]])
    rank = Sinkhorn()(scored(jax.nn.softmax(logits)), inputs(logits, rng=KEY))
    np.testing.assert_allclose(np.exp(rank), [[0.75, 0.25], [0.25, 0.75]], rtol=1e-5)


def test_sinkhorn_has_even_margins_without_padding():
    # Eight tokens, two of them padding: each has 1, each of three experts has 2.
    logits, valid = normal(0, 8, 3, scale=2), np.arange(8) < 6
    rank = Sinkhorn(200)(scored(jax.nn.softmax(logits)), inputs(logits, valid, rng=KEY))
    plan = np.exp(rank)[:6]
    np.testing.assert_allclose(plan.sum(1), np.ones(6), rtol=1e-4)
    np.testing.assert_allclose(plan.sum(0), np.full(3, 2), rtol=1e-4)
    assert np.isfinite(rank).all()


def test_sinkhorn_gate_is_the_score_and_test_time_is_greedy():
    part, scores = TopK(1, rank=Sinkhorn()), [[18 / 19, 1 / 19], [2 / 3, 1 / 3]]
    choice = select(part, scores, rng=KEY)
    np.testing.assert_array_equal(choice.expert, [[0], [1]])
    np.testing.assert_allclose(choice.gate, [[18 / 19], [1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(select(part, scores).expert, [[0], [0]])


def test_sinkhorn_of_padding_alone_is_finite():
    made = scored(np.full((2, 3), 1 / 3))
    assert np.isfinite(Sinkhorn()(made, inputs(made.noisy, [False, False], rng=KEY))).all()


# Sampling

PROBABILITIES = [0.6, 0.3, 0.1]


def drawn(part: TopK, n: int):
    return select(part, np.tile(PROBABILITIES, (n, 1)), rng=KEY)


def test_sampling_draws_each_expert_as_often_as_its_probability():
    # 4.9 deviations of a rate over n draws: 1 in 10**6 is left to chance, once: the key is fixed.
    n = 20_000
    expert = np.asarray(drawn(TopK(1, rank=Sampled()), n).expert)[:, 0]
    share = np.bincount(expert, minlength=3) / n
    p = np.array(PROBABILITIES)
    assert (abs(share - p) <= 4.9 * np.sqrt(p * (1 - p) / n)).all()


def test_the_gate_of_a_drawn_expert_is_its_own_probability():
    choice = drawn(TopK(1, rank=Sampled()), 100)
    np.testing.assert_allclose(choice.gate, np.take(PROBABILITIES, choice.expert), rtol=1e-6)
    # All three are drawn: a gate of the best expert would be 0.6 throughout.
    assert set(np.unique(choice.expert)) == {0, 1, 2}


def test_two_draws_are_without_replacement():
    expert = np.asarray(drawn(TopK(2, rank=Sampled()), 200).expert)
    assert (expert[:, 0] != expert[:, 1]).all()


def test_without_a_key_the_best_expert_is_taken():
    choice = select(TopK(1, rank=Sampled()), [PROBABILITIES, [0.2, 0.3, 0.5]])
    np.testing.assert_array_equal(choice.expert, [[0], [2]])
    np.testing.assert_allclose(choice.gate, [[0.6], [0.5]], rtol=1e-6)


def test_the_balance_loss_counts_the_drawn_experts():
    # Mesh-TensorFlow's density is of the drawn experts: 3 * sum_e share_e * p_e.
    made = scored(np.tile(PROBABILITIES, (8, 1)))
    given = inputs(made.noisy, rng=KEY)
    choice = TopK(1, rank=Sampled())(made, given)
    share = np.bincount(np.asarray(choice.expert)[:, 0], minlength=3) / 8
    loss = LoadBalance(1.0)(made, choice, given)
    np.testing.assert_allclose(loss, 3 * (share * PROBABILITIES).sum(), rtol=1e-6)


def test_sampling_sends_the_same_gradient_to_the_chosen_score_alone():
    part, made = TopK(1, rank=Sampled()), scored([PROBABILITIES])
    given = inputs(made.noisy, rng=KEY)

    def gate(scores: jax.Array) -> jax.Array:
        return part(dataclasses.replace(made, scores=scores), given).gate.sum()

    (expert,) = np.asarray(part(made, given).expert)[0]
    np.testing.assert_array_equal(jax.grad(gate)(made.scores), [np.eye(3)[expert]])


# Experts by token id


def test_experts_by_token_id_have_learned_gates(tmp_path):
    # Id 1 has the experts 2 and 0, id 0 the experts 1 and 2, in this order; the scores are gates.
    np.save(tmp_path / "table.npy", [[1, 2], [2, 0]])
    part = TopK(2, rank=ByToken(table=str(tmp_path / "table.npy")))
    choice = select(part, [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], ids=[1, 0])
    np.testing.assert_array_equal(choice.expert, [[2, 0], [1, 2]])
    np.testing.assert_allclose(choice.gate, [[0.1, 0.6], [0.5, 0.3]], rtol=1e-6)


def test_hashed_experts_are_a_fixed_even_function_of_the_id():
    part, n = TopK(2, rank=ByToken()), 4000
    expert = np.asarray(select(part, np.full((n, 8), 1 / 8), ids=np.arange(n)).expert)
    again = select(part, normal(0, 2, 8) ** 2, ids=[17, 17]).expert
    np.testing.assert_array_equal(again, [expert[17]] * 2)
    # Two different experts each; of 8,000 choices every expert has 1/8 within 4.9 deviations.
    assert (expert[:, 0] != expert[:, 1]).all()
    share = np.bincount(expert.reshape(-1), minlength=8) / expert.size
    assert np.abs(share - 1 / 8).max() <= 4.9 * np.sqrt(1 / 8 * 7 / 8 / expert.size)
    other = select(TopK(2, rank=ByToken(seed=1)), np.full((n, 8), 1 / 8), ids=np.arange(n)).expert
    assert (expert != other).any(1).mean() > 0.9


def test_a_table_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "table.npy"
    rank = ByToken(table=str(path))
    with pytest.raises(ConfigError, match=r"cannot read the router's table .*table\.npy: write it"):
        TopK(2, rank=rank).check(4)
    np.save(path, [[1, 2], [2, 4]])
    with pytest.raises(ConfigError, match="one row of experts, from 0 to 3, per token id"):
        TopK(2, rank=rank).check(4)
    TopK(2, rank=rank).check(5)
    with pytest.raises(ConfigError, match="has fewer rows than the tokenizer has ids, 3: write a"):
        TopK(2, rank=rank).check_vocabulary(3)
    TopK(2, rank=rank).check_vocabulary(2)


# Groups of experts


@pytest.mark.parametrize("by", ["max", "top2"])
def test_groups_of_experts_are_ranked_by_their_best_one_or_two(by: str):
    # Three groups of three. Best one: 0.96 in group 1. Best two: 0.95 + 0.2 in group 0 against
    # 0.96 + 0.05 and 0.5 + 0.5, which has the largest product, so logarithms may not be summed.
    # All three: 1.5 in group 2, against 1.2 and 1.06.
    scores = [[0.95, 0.2, 0.05, 0.96, 0.05, 0.05, 0.5, 0.5, 0.5]]
    best = {"max": 1, "top2": 0}[by]
    part = TopK(2, limit=Limit(3, 1, by))
    np.testing.assert_array_equal(select(part, scores).expert // 3, [[best, best]])
    # A bias counts with the scores that are summed: group 2 then has 1.2.
    part = dataclasses.replace(part, rank=Bias())
    choice = select(part, scores, bias=[0, 0, 0, 0, 0, 0, 0.1, 0.1, 0] if by == "top2" else [0] * 9)
    expected = 2 if by == "top2" else 1
    np.testing.assert_array_equal(choice.expert // 3, [[expected, expected]])


def test_groups_of_experts_are_ranked_by_the_sum_of_scores_and_not_of_logits():
    # Sigmoids 0.98 + 0.02 = 1 in the first group and 2 * 0.62 in the second; the exponentials of
    # the logits would sum to 54.6 and 3.3.
    given = inputs([[4, -4, 0.5, 0.5]])
    choice = TopK(2, limit=Limit(2, 1, "top2"))(Sigmoid()(given), given)
    np.testing.assert_array_equal(choice.expert, [[2, 3]])
