"""Selections by hand, and the random policy by its keep rate."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_jax.routing import Top2, TopK, TopTokens
from moe_jax.routing.select import TokenChoice

ALL = np.ones(3, bool)
SCORES = np.array([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.2, 0.1, 0.7]], np.float32)
# The second gates over g1 + g2: 0.3 / 0.9, 0.4 / 0.9, 0.2 / 0.9.
SECOND = np.array([3, 4, 2], np.float32) / 9


def select(part: TopK | Top2, valid: np.ndarray = ALL, key=None) -> TokenChoice:
    return part(SCORES, valid, capacity=2, rng=key)


def test_top1_takes_the_best_expert_with_its_raw_score():
    choice = select(TopK(1))
    np.testing.assert_array_equal(choice.expert, [[0], [1], [2]])
    np.testing.assert_allclose(choice.gate, [[0.6], [0.5], [0.7]])
    assert choice.wanted.all() and choice.queued.all()


def test_top2_without_normalisation_keeps_the_scores():
    choice = select(TopK(2))
    np.testing.assert_array_equal(choice.expert, [[0, 1], [1, 2], [2, 0]])
    np.testing.assert_allclose(choice.gate, [[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]])


def test_normalisation_divides_by_the_chosen_scores():
    choice = select(TopK(2, normalize=True))
    np.testing.assert_allclose(choice.gate, np.stack([1 - SECOND, SECOND], 1), rtol=1e-6)


def test_equal_scores_go_to_the_first_expert():
    choice = TopK(2)(np.full((1, 3), 1 / 3, np.float32), ALL[:1], capacity=1, rng=None)
    np.testing.assert_array_equal(choice.expert, [[0, 1]])


def test_padding_wants_nothing_and_queues_nowhere():
    valid = np.array([True, False, True])
    for part in (TopK(1), TopK(2), Top2("all"), Top2("all", lost_choices_queue=True)):
        choice = select(part, valid)
        np.testing.assert_array_equal(choice.wanted.all(-1), valid)
        np.testing.assert_array_equal(choice.queued.all(-1), valid)
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
    ],
)
def test_second_choice_policies(second: str, threshold: float, kept: list[bool]):
    choice = select(Top2(second, threshold))
    np.testing.assert_array_equal(choice.wanted, np.stack([[True] * 3, kept], 1))
    np.testing.assert_array_equal(choice.queued, choice.wanted)
    # The gates are divided by g1 + g2 whether or not the second is kept.
    np.testing.assert_allclose(choice.gate, np.stack([1 - SECOND, SECOND], 1), rtol=1e-6)


def test_a_choice_given_up_queues_only_as_in_gshard():
    choice = select(Top2("none", lost_choices_queue=True))
    np.testing.assert_array_equal(choice.wanted, [[True, False]] * 3)
    np.testing.assert_array_equal(choice.queued, [[True, True]] * 3)


@pytest.mark.parametrize(
    ("second_gate", "threshold", "rate"),
    [
        (0.3, 0.5, 0.6),  # GShard: 2 * g2
        (0.05, 0.5, 0.1),
        (0.05, 0.2, 0.25),  # Mesh-TensorFlow: g2 / 0.2
        (0.3, 0.2, 1.0),  # more than the threshold: always
    ],
)
def test_random_second_choice_is_kept_at_the_published_rate(
    second_gate: float, threshold: float, rate: float
):
    # 20,000 independent draws; 4.9 standard deviations leave 1 in 10**6 to chance, once: the key
    # is fixed.
    n = 20_000
    scores = np.tile(np.array([second_gate, 1 - second_gate, 0], np.float32), (n, 1))
    key = jax.random.key(0)
    choice = Top2("random", threshold)(scores, np.ones(n, bool), capacity=1, rng=key)
    kept = np.asarray(choice.wanted)
    assert kept[:, 0].all()
    assert abs(kept[:, 1].mean() - rate) <= 4.9 * np.sqrt(rate * (1 - rate) / n)


def test_experts_take_their_best_tokens():
    choice = TopTokens()(SCORES, ALL, capacity=2, rng=None)
    # Expert 0 ranks tokens 0, 2, 1 (0.6, 0.2, 0.1); expert 1: 1, 0, 2; expert 2: 2, 1, 0.
    np.testing.assert_array_equal(choice.token, [[0, 2], [1, 0], [2, 1]])
    np.testing.assert_allclose(choice.gate, [[0.6, 0.2], [0.5, 0.3], [0.7, 0.4]])
    assert choice.filled.all()


def test_experts_never_take_padding():
    choice = TopTokens()(SCORES, np.array([True, False, True]), capacity=3, rng=None)
    np.testing.assert_array_equal(choice.filled, [[True, True, False]] * 3)
    np.testing.assert_array_equal(choice.token[:, :2], [[0, 2], [0, 2], [2, 0]])


def test_average_divides_by_the_number_of_takers():
    # As above each token is taken by two experts: every gate is halved.
    choice = TopTokens(average=True)(SCORES, ALL, capacity=2, rng=None)
    np.testing.assert_allclose(choice.gate, [[0.3, 0.1], [0.25, 0.15], [0.35, 0.2]])


def test_choices_per_token():
    parts = (TopK(1), TopK(3), Top2(), TopTokens())
    assert [part.choices_per_token for part in parts] == [1, 3, 2, 1]
