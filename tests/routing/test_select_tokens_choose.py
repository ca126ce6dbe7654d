"""Selections in which tokens choose experts, by hand, and random policies by their keep rate."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import Everyone, Limit, Top2, TopGroups, TopK, TopP
from tests.routing.helpers import select

SCORES = np.array([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.2, 0.1, 0.7]], np.float32)
# The second gates over g1 + g2: 0.3 / 0.9, 0.4 / 0.9, 0.2 / 0.9.
SECOND = np.array([3, 4, 2], np.float32) / 9
KEY = jax.random.key(0)


def test_top1_takes_the_best_expert_with_its_raw_score():
    choice = select(TopK(1), SCORES)
    np.testing.assert_array_equal(choice.expert, [[0], [1], [2]])
    np.testing.assert_allclose(choice.gate, [[0.6], [0.5], [0.7]])
    assert choice.wanted.all() and choice.queued.all()


def test_top2_without_normalisation_keeps_the_scores():
    choice = select(TopK(2), SCORES)
    np.testing.assert_array_equal(choice.expert, [[0, 1], [1, 2], [2, 0]])
    np.testing.assert_allclose(choice.gate, [[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]])


def test_normalisation_divides_by_the_chosen_scores_and_then_scales():
    choice = select(TopK(2, normalize=True), SCORES)
    np.testing.assert_allclose(choice.gate, np.stack([1 - SECOND, SECOND], 1), rtol=1e-6)
    choice = select(TopK(2, normalize=True, scale=2.5), SCORES)
    np.testing.assert_allclose(choice.gate.sum(1), [2.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(select(TopK(1, scale=16), SCORES).gate, [[9.6], [8], [11.2]])


def test_a_token_that_may_not_choose_its_best_experts_takes_the_next():
    choice = select(TopK(1, skip=1), SCORES)
    np.testing.assert_array_equal(choice.expert, [[1], [2], [0]])
    np.testing.assert_allclose(choice.gate, [[0.3], [0.4], [0.2]])
    # Normalised gates are those of the experts that are left: 0.3 / (0.3 + 0.1) for token 0.
    choice = select(TopK(2, normalize=True, skip=1), SCORES)
    np.testing.assert_allclose(choice.gate[0], [0.75, 0.25], rtol=1e-6)
    with pytest.raises(ConfigError, match="skip=2 leaves fewer than k=2 of 3 experts: .* is 1"):
        TopK(2, skip=2).check(3)


def test_equal_scores_go_to_the_first_expert():
    np.testing.assert_array_equal(select(TopK(2), np.full((1, 3), 1 / 3)).expert, [[0, 1]])


def test_padding_wants_nothing_and_queues_nowhere():
    valid = np.array([True, False, True])
    parts = (
        TopK(1),
        TopK(2),
        Top2("all"),
        Top2("all", lost_choices_queue=True),
        Top2("sampling"),
        TopP(1.0),
        TopGroups(3, 1, 1),
        Everyone(),
    )
    for part in parts:
        choice = select(part, SCORES, valid, rng=KEY)
        assert choice.wanted[:, 0].tolist() == choice.queued[:, 0].tolist() == valid.tolist()
        assert not choice.wanted[1].any() and not choice.queued[1].any()


@pytest.mark.parametrize(
    ("second", "threshold", "kept"),
    [
        ("all", 0.5, [True, True, True]),
        ("none", 0.5, [False, False, False]),
        # 3/9 and 4/9 exceed 0.3, 2/9 does not.
        ("threshold", 0.3, [True, True, False]),
        # No random key, as in evaluation.
        ("random", 0.5, [True, True, True]),
        ("sampling", 0.5, [True, True, True]),
    ],
)
def test_second_choice_policies(second: str, threshold: float, kept: list[bool]):
    choice = select(Top2(second, threshold), SCORES)
    np.testing.assert_array_equal(choice.expert, [[0, 1], [1, 2], [2, 0]])
    np.testing.assert_array_equal(choice.wanted, np.stack([[True] * 3, kept], 1))
    np.testing.assert_array_equal(choice.queued, choice.wanted)
    # The gates are divided by g1 + g2 whether or not the second is kept.
    np.testing.assert_allclose(choice.gate, np.stack([1 - SECOND, SECOND], 1), rtol=1e-6)


def test_without_normalisation_the_threshold_and_the_gates_are_raw():
    # fairseq's default: the raw 0.3 does not exceed 0.32, although 3/9 would.
    choice = select(Top2("threshold", 0.32, normalize=False), SCORES)
    np.testing.assert_array_equal(choice.wanted[:, 1], [False, True, False])
    np.testing.assert_allclose(choice.gate, [[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]])


def test_a_choice_given_up_queues_only_as_in_gshard():
    choice = select(Top2("none", lost_choices_queue=True), SCORES)
    np.testing.assert_array_equal(choice.wanted, [[True, False]] * 3)
    np.testing.assert_array_equal(choice.queued, [[True, True]] * 3)


def binomial(rate: float, n: int) -> float:
    """Returns how far a rate over n draws strays: 4.9 deviations, 1 in 10**6, once per key."""
    return 4.9 * np.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize(
    ("second_gate", "threshold", "normalize", "rate"),
    [
        (0.3, 0.5, True, 0.6),  # GShard: 2 * g2
        (0.05, 0.5, True, 0.1),
        (0.05, 0.2, True, 0.25),  # Mesh-TensorFlow: g2 / 0.2
        (0.3, 0.2, True, 1.0),  # more than the threshold: always
        (0.3, 0.5, False, 0.6),  # fairseq: the raw gate, where 0.1 went to a third expert
    ],
)
def test_random_second_choice_is_kept_at_the_published_rate(
    second_gate: float, threshold: float, normalize: bool, rate: float
):
    n, third = 20_000, 0 if normalize else 0.1
    scores = np.tile([second_gate, 1 - second_gate - third, third], (n, 1))
    choice = select(Top2("random", threshold, normalize=normalize), scores, rng=KEY)
    kept = np.asarray(choice.wanted)
    assert kept[:, 0].all()
    assert abs(kept[:, 1].mean() - rate) <= binomial(rate, n)


def test_sampling_draws_the_second_expert_among_the_others_by_their_scores():
    # Expert 0 is first; of the other two with 0.3 and 0.2, expert 1 comes with 0.3 / 0.5.
    n = 20_000
    choice = select(Top2("sampling"), np.tile([0.5, 0.3, 0.2], (n, 1)), rng=KEY)
    first, second = np.asarray(choice.expert).T
    assert (first == 0).all() and set(second) == {1, 2}
    assert abs((second == 1).mean() - 0.6) <= binomial(0.6, n)
    np.testing.assert_allclose(choice.gate[:, 1], np.where(second == 1, 3 / 8, 2 / 7), rtol=1e-5)


@pytest.mark.parametrize(
    ("by", "keep", "kept"),
    [
        # Groups (5, 0), (4, 4) and (4.5, 2): best experts 5, 4, 4.5; sums 5, 8 and 6.5.
        ("max", 1, [True, True, False, False, False, False]),
        ("max", 2, [True, True, False, False, True, True]),
        ("top2", 1, [False, False, True, True, False, False]),
        ("top2", 2, [False, False, True, True, True, True]),
    ],
)
def test_limit_keeps_the_best_groups(by: str, keep: int, kept: list[bool]):
    ranking = np.array([[5, 0, 4, 4, 4.5, 2]], np.float32)
    limited = Limit(3, keep, by)(ranking)
    np.testing.assert_array_equal(limited, np.where(kept, ranking, -np.inf))


def test_limited_tokens_choose_inside_the_kept_groups():
    # Expert 0 is best of all, but its group is left out; gates are scores all the same.
    scores = [[0.5, 0.02, 0.3, 0.18], [0.1, 0.2, 0.3, 0.4]]
    choice = select(TopK(2, limit=Limit(2, 1, "top2")), scores)
    np.testing.assert_array_equal(choice.expert, [[0, 1], [3, 2]])
    choice = select(TopK(2, limit=Limit(2, 1)), [[0.3, 0.1, 0.25, 0.35], [0.4, 0, 0.35, 0.25]])
    np.testing.assert_array_equal(choice.expert, [[3, 2], [0, 1]])
    np.testing.assert_allclose(choice.gate, [[0.35, 0.25], [0.4, 0]], atol=1e-7)


def test_groups_of_one_expert_count_that_expert():
    ranking = np.array([[1.0, 3.0, 2.0]], np.float32)
    np.testing.assert_array_equal(Limit(3, 1, "top2")(ranking), [[-np.inf, 3, -np.inf]])


@pytest.mark.parametrize(
    ("p", "k_max", "wanted"),
    [
        # Before the second choice there is 0.8, 0.5 or 0.4; before the third 0.9, 0.8 or 0.75.
        (0.3, 3, [[1, 0, 0], [1, 0, 0], [1, 0, 0]]),
        (0.7, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 0]]),
        (0.78, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (0.78, 2, [[1, 0], [1, 1], [1, 1]]),
    ],
)
def test_top_p_takes_experts_until_their_scores_reach_p(p: float, k_max: int, wanted: list):
    choice = select(TopP(p, k_max), [[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.25, 0.35, 0.4]])
    np.testing.assert_array_equal(choice.wanted, np.array(wanted, bool))
    np.testing.assert_array_equal(choice.expert[2, :2], [2, 1])
    np.testing.assert_allclose(choice.gate[2, :2], [0.4, 0.35])
    np.testing.assert_array_equal(choice.queued, choice.wanted)


@pytest.mark.parametrize(
    ("k_groups", "k", "expert", "gate"),
    [
        # Groups (1, 3) / 16 and (2, 4) / 6 have 1/4 and 3/4.
        (1, 1, [3], [1]),
        (1, 2, [3, 2], [5 / 9, 4 / 9]),
        (2, 1, [3, 1], [3 / 4, 1 / 4]),
        (2, 2, [3, 2, 1, 0], [5 / 12, 4 / 12, 3 / 16, 1 / 16]),
    ],
)
def test_top_groups(k_groups: int, k: int, expert: list, gate: list):
    scores = [[1 / 16, 3 / 16, 4 / 12, 5 / 12]]
    choice = select(TopGroups(2, k_groups, k), scores)
    np.testing.assert_array_equal(choice.expert, [expert])
    np.testing.assert_allclose(choice.gate, [gate], rtol=1e-5)


def test_everyone_goes_everywhere_with_the_score_as_gate():
    choice = select(Everyone(), SCORES)
    np.testing.assert_array_equal(choice.expert, [[0, 1, 2]] * 3)
    np.testing.assert_allclose(choice.gate, SCORES)
    assert choice.wanted.all()


def test_choices_per_token():
    parts = (TopK(1), TopK(3), Top2(), TopP(k_max=3), TopGroups(2, 2, 2), Everyone())
    assert [part.choices(8) for part in parts] == [1, 3, 2, 3, 4, 8]
    assert TopP(k_max=9).choices(4) == 4
