import math

import numpy as np
import pytest

from moe_jax.analysis.tokens import TokenExpertTable, mutual_information, purity


def _table(tokens, experts, num_experts=2, vocab_size=6):
    table = TokenExpertTable(1, num_experts, vocab_size)
    table.add(0, np.array(tokens), np.eye(num_experts)[experts])
    return table


def test_counts_and_shares():
    (layer,) = _table([3, 3, 3, 5, 5], [0, 0, 1, 1, 1]).top_tokens(4)
    first, second = ([(t.token, t.count, t.share) for t in expert] for expert in layer)
    assert first == [(3, 2, pytest.approx(2 / 3))]
    assert second == [(5, 2, 1.0), (3, 1, pytest.approx(1 / 3))]


def test_lift_is_share_over_the_experts_share():
    (layer,) = _table([3, 3, 3, 5, 5], [0, 0, 1, 1, 1]).top_tokens(4)
    assert layer[0][0].lift == pytest.approx((2 / 3) / (2 / 5))
    assert layer[1][0].lift == pytest.approx(1 / (3 / 5))


def test_rank_by_lift_puts_the_rare_but_faithful_first():
    (layer,) = _table([1, 1, 1, 1, 2], [0, 0, 0, 1, 0]).top_tokens(2, rank="lift")
    assert [t.token for t in layer[0]] == [2, 1]
    (layer,) = _table([1, 1, 1, 1, 2], [0, 0, 0, 1, 0]).top_tokens(2, rank="lift", min_count=2)
    assert [t.token for t in layer[0]] == [1]


def test_ties_go_to_the_smaller_token_and_k_is_a_limit():
    (layer,) = _table([4, 2, 3], [0, 0, 0]).top_tokens(2)
    assert [t.token for t in layer[0]] == [2, 3]
    assert layer[1] == []


def test_batches_and_layers_add_up_apart():
    table = TokenExpertTable(2, 2, 6)
    for _ in range(3):
        table.add(1, np.array([2, 2]), np.array([[1, 0], [1, 1]]))
    empty, full = table.top_tokens(3)
    assert empty == [[], []]
    assert [[(t.token, t.count) for t in expert] for expert in full] == [[(2, 6)], [(2, 3)]]


def test_token_of_no_expert_is_not_counted():
    table = TokenExpertTable(1, 2, 6)
    table.add(0, np.array([1, 2]), np.array([[0.0, 0.3], [0.0, 0.0]]))
    assert [[t.token for t in expert] for expert in table.top_tokens(3)[0]] == [[], [1]]


@pytest.mark.parametrize(
    ("tokens", "experts"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 2))),
        (np.zeros(2, int), np.zeros((3, 2))),
        (np.zeros(2, int), np.zeros((2, 3))),
        (np.array([6]), np.zeros((1, 2))),
        (np.array([-1]), np.zeros((1, 2))),
    ],
)
def test_refuses_what_does_not_fit(tokens, experts):
    with pytest.raises(ValueError, match="token"):
        TokenExpertTable(1, 2, 6).add(0, tokens, experts)


def test_mutual_information_of_perfect_and_no_specialisation():
    assert mutual_information(np.eye(4) * 7) == pytest.approx(math.log(4))
    assert mutual_information(np.ones((4, 3))) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.zeros((4, 3))) == 0


def test_mutual_information_by_hand():
    # Joint 3/8 1/8 1/8 3/8 with even margins.
    expected = 2 * 3 / 8 * math.log(1.5) + 2 * 1 / 8 * math.log(0.5)
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(expected)
    assert mutual_information(np.array([[30, 10], [10, 30]])) == pytest.approx(expected)


def test_purity():
    assert purity(np.eye(4) * 7) == 1
    assert purity(np.array([[3, 1], [2, 4]])) == pytest.approx(0.7)
    assert purity(np.ones((4, 5))) == pytest.approx(1 / 5)
    assert purity(np.zeros((4, 3))) == 0
