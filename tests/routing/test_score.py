"""Scores by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from moe_jax.routing import Sigmoid, Softmax
from tests.routing.helpers import S, drawn_logits, drawn_valid, examples

LOG3 = np.float32(np.log(3))
ALL = np.ones(2, bool)


def test_softmax_over_experts():
    # exp gives 1 and 3 for the first token, 1 and 1 for the second.
    logits = np.array([[0, LOG3], [5, 5]], np.float32)
    np.testing.assert_allclose(Softmax()(logits, ALL), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)


def test_softmax_over_tokens_leaves_padding_out_of_the_sum():
    # The last token is padding: without its logit 9 the first column is 1 and 3 over 4.
    logits = np.array([[0, 2], [LOG3, 2], [9, 9]], np.float32)
    scores = Softmax("tokens")(logits, np.array([True, True, False]))
    np.testing.assert_allclose(scores, [[0.25, 0.5], [0.75, 0.5], [0, 0]], rtol=1e-6)


def test_softmax_over_tokens_of_padding_alone_is_zero():
    scores = Softmax("tokens")(np.full((2, 3), 7, np.float32), np.zeros(2, bool))
    np.testing.assert_array_equal(scores, np.zeros((2, 3)))


def test_sigmoid():
    logits = np.array([[0, LOG3], [-LOG3, 0]], np.float32)
    np.testing.assert_allclose(Sigmoid()(logits, ALL), [[0.5, 0.75], [0.25, 0.5]], rtol=1e-6)


@examples
@given(drawn_logits, drawn_valid)
def test_softmax_sums_to_one_over_its_axis(logits, valid):
    np.testing.assert_allclose(Softmax()(logits, valid).sum(1), np.ones(S), rtol=1e-5)
    total = Softmax("tokens")(logits, valid).sum(0)
    np.testing.assert_allclose(total, np.full(4, valid.any()), rtol=1e-5)
