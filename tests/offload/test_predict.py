"""Predictions of the next layer's experts."""

import numpy as np

from moe_jax.offload import NextRouter, NoPrediction

# Token 0 prefers experts 3, 0; token 1 prefers 3, 2.
SCORES = np.array([[0.3, 0.1, 0.0, 0.6], [0.0, 0.1, 0.4, 0.5]])
CHOICES = np.array([[0, 1], [0, 2]])


def test_the_next_router_gives_the_experts_of_most_tokens_first():
    # 3 has two tokens; 2 has one and a sum of 0.4; 0 has one and a sum of 0.3. No token prefers 1.
    assert NextRouter().next(0, CHOICES, SCORES) == [3, 2, 0]


def test_nothing_is_predicted_without_scores():
    assert list(NextRouter().next(5, CHOICES, None)) == []
    assert list(NoPrediction().next(0, CHOICES, SCORES)) == []
