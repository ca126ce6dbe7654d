"""Predictions of the next layer's experts."""

import numpy as np

from moe_jax.offload import NextRouter, NoPrediction, Traces

# Token 0 prefers experts 3, 0; token 1 prefers 3, 2.
SCORES = np.array([[0.3, 0.1, 0.0, 0.6], [0.0, 0.1, 0.4, 0.5]])
CHOICES = np.array([[0, 1], [0, 2]])


def test_the_next_router_gives_the_experts_of_most_tokens_first():
    # 3 has two tokens; 2 has one and a sum of 0.4; 0 has one and a sum of 0.3. No token prefers 1.
    assert NextRouter().next(0, CHOICES, SCORES) == [3, 2, 0]


def test_nothing_is_predicted_without_scores():
    assert list(NextRouter().next(5, CHOICES, None)) == []
    assert list(NoPrediction().next(0, CHOICES, SCORES)) == []


def test_traces_add_the_shares_of_the_chosen_experts():
    traces = Traces([3, 3])
    # Expert 0 was followed twice by 1 and once by 2, and expert 1 once by 0.
    traces.learn([np.array([[0], [0], [0], [1]]), np.array([[1], [1], [2], [0]])])
    # Two tokens chose 0 and one chose 1: expected are 1 of expert 0, 4/3 of 1 and 2/3 of 2. Two
    # experts were chosen, so two are predicted.
    assert traces.next(0, np.array([[0], [0], [1]]), None) == [1, 0]
    assert traces.next(1, np.array([[0], [0], [1]]), None) == []  # no layer follows


def test_traces_learn_from_traffic_of_equal_batches():
    traces = Traces([3, 3])
    traces.next(0, np.array([[2], [0]]), None)
    traces.next(1, np.array([[1], [1]]), None)
    assert traces.next(0, np.array([[2]]), None) == [1]
    # One token came before; two come now, which are not the same tokens.
    traces.next(1, np.array([[0], [0]]), None)
    assert traces.next(0, np.array([[2]]), None) == [1]
