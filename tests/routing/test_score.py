"""Scores by hand."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given

from moe_jax.routing import (
    GaussianNoise,
    LearnedNoise,
    Router,
    Sigmoid,
    Softmax,
    SqrtSoftplus,
    Top2,
    TwoLevelSoftmax,
    Uniform,
)
from tests.routing.helpers import S, drawn_logits, drawn_valid, examples, inputs

LOG3 = np.float32(np.log(3))
KEY = jax.random.key(0)


def test_softmax_over_experts():
    # exp gives 1 and 3 for the first token, 1 and 1 for the second.
    made = Softmax()(inputs([[0, LOG3], [5, 5]]))
    np.testing.assert_allclose(made.scores, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(made.clean, made.scores)
    assert made.noise_std is None


def test_softmax_over_tokens_leaves_padding_out_of_the_sum():
    # The last token is padding: without its logit 9 the first column is 1 and 3 over 4.
    made = Softmax("tokens")(inputs([[0, 2], [LOG3, 2], [9, 9]], [True, True, False]))
    np.testing.assert_allclose(made.scores, [[0.25, 0.5], [0.75, 0.5], [0, 0]], rtol=1e-6)


def test_softmax_over_tokens_of_padding_alone_is_zero():
    made = Softmax("tokens")(inputs(np.full((2, 3), 7), [False, False]))
    np.testing.assert_array_equal(made.scores, np.zeros((2, 3)))
    # The logarithm of a padded token's score is the least number, not the log of an even share.
    np.testing.assert_array_equal(made.log_scores, np.full((2, 3), np.finfo(np.float32).min))


def test_sigmoid():
    made = Sigmoid()(inputs([[0, LOG3], [-LOG3, 0]]))
    np.testing.assert_allclose(made.scores, [[0.5, 0.75], [0.25, 0.5]], rtol=1e-6)


def test_sqrt_softplus():
    # log(1 + exp(x)) is 1 at log(e - 1), and log 4 at log 3.
    made = SqrtSoftplus()(inputs([[np.log(np.e - 1), LOG3]]))
    np.testing.assert_allclose(made.scores, [[1, np.sqrt(np.log(4))]], rtol=1e-6)


def test_sqrt_softplus_of_any_logit_is_finite_with_its_gradient():
    # exp(-1000) is 0 in any type, and exp(1000) infinite: the logarithm is x / 2 far below 0, and
    # half of log x far above. The logarithm grows by half of a logit's growth, or 1 / (2 x).
    logs = SqrtSoftplus()(inputs([[-1000, 1000]])).log_scores
    np.testing.assert_allclose(logs, [[-500, np.log(1000) / 2]], rtol=1e-6)
    slope = jax.grad(lambda x: SqrtSoftplus()(inputs(x)).log_scores.sum())
    np.testing.assert_allclose(slope(np.array([[-1000.0, 1000]])), [[0.5, 5e-4]], rtol=1e-5)


def test_uniform():
    np.testing.assert_array_equal(Uniform()(inputs([[9, 0, 0, 1]])).scores, [[0.25] * 4])


def test_two_level_softmax():
    # Groups (0, 1) and (2, 3). Primary logits are means of the second plane, 0 and log 3: 1/4, 3/4.
    # Within: 1/4 and 3/4, then halves.
    planes = np.stack([[[0, LOG3, 0, 0]], [[-1, 1, LOG3 - 2, LOG3 + 2]]], -1)
    made = TwoLevelSoftmax(2)(inputs(planes))
    np.testing.assert_allclose(made.scores, [[1 / 16, 3 / 16, 3 / 8, 3 / 8]], rtol=1e-6)
    assert TwoLevelSoftmax(2).planes == 2


def test_gaussian_noise_has_deviation_one_over_experts_and_spares_the_clean_scores():
    # 20,000 draws: the sample deviation is normal about the true one with a share of
    # 1 / sqrt(2n) of it; 4.9 of these leave 1 in 10**6 to chance, once: the key is fixed.
    n = 20_000
    part, given = Softmax(noise=GaussianNoise(1.0)), inputs(np.zeros((n // 4, 4)), rng=KEY)
    made = part(given)
    np.testing.assert_array_equal(made.noise_std, np.full((n // 4, 4), 0.25))
    noise = np.asarray(made.noisy)
    assert abs(noise.std() - 0.25) <= 4.9 * 0.25 / np.sqrt(2 * n)
    assert abs(noise.mean()) <= 4.9 * 0.25 / np.sqrt(n)
    np.testing.assert_allclose(made.scores, jax.nn.softmax(made.noisy), rtol=1e-6)
    np.testing.assert_array_equal(made.clean, np.full((n // 4, 4), 0.25))


def test_noise_is_for_training_alone():
    logits = np.array([[1.0, 2.0, 0.5]])
    planes = np.stack([logits, logits], -1)
    quiet = Softmax()(inputs(logits)).scores
    for noise, x in ((GaussianNoise(), logits), (LearnedNoise(), planes)):
        made = Softmax(noise=noise)(inputs(x))
        np.testing.assert_array_equal(made.scores, quiet)
        assert made.noise_std is None


def test_noise_and_policy_draw_by_keys_of_their_own(monkeypatch):
    # By one key, experts that the noise favours would also be those that the policy keeps.
    seen = []
    for name in ("normal", "uniform"):
        draw = getattr(jax.random, name)

        def noted(key, *args, draw=draw):
            seen.append(np.asarray(jax.random.key_data(key)).tolist())
            return draw(key, *args)

        monkeypatch.setattr(jax.random, name, noted)
    router = Router(Softmax(noise=GaussianNoise()), Top2("random"))
    router(np.zeros((2, 4), np.float32), capacity=2, rng=KEY)
    first, second = seen
    assert first != second


def test_learned_noise_scales_with_the_softplus_of_the_second_plane():
    # softplus(0) = log 2 and softplus(log 3) = log 4, which is twice as much.
    part, zeros = Softmax(noise=LearnedNoise()), np.zeros((3, 2))
    low, high = (
        part(inputs(np.stack([zeros, np.full((3, 2), second)], -1), rng=KEY))
        for second in (0, LOG3)
    )
    np.testing.assert_allclose(low.noise_std, np.full((3, 2), np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(high.noisy, 2 * np.asarray(low.noisy), rtol=1e-5)
    assert np.abs(low.noisy).min() > 0
    assert part.planes == 2 and Softmax(noise=GaussianNoise()).planes == 1


@examples
@given(drawn_logits, drawn_valid)
def test_softmax_sums_to_one_over_its_axis(logits, valid):
    given = inputs(logits, valid)
    np.testing.assert_allclose(Softmax()(given).scores.sum(1), np.ones(S), rtol=1e-5)
    total = Softmax("tokens")(given).scores.sum(0)
    np.testing.assert_allclose(total, np.full(4, valid.any()), rtol=1e-5)
