"""The gradient noise scale: against noise that is known, and against gradients by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.noise import Estimates, estimates, gradient_noise, smoothed, squared_norm
from moe_jax.training.step import Objective
from tests.training.test_step import HEAD_Z, LENGTHS, batch, close, compiled, made, model, recipe


def estimated(gradients, tokens):
    """The estimates from mean gradients ``(M, P)`` of microbatches of so many tokens ``(M,)``."""
    tokens = jnp.asarray(tokens)
    shares = tokens[:, None] / tokens.sum() * jnp.asarray(gradients)
    return gradient_noise(jnp.square(shares).sum(), jnp.square(shares.sum(0)).sum(), tokens)


def test_two_microbatches_by_hand():
    # The gradients 1 and 5 of 3 tokens each: small is (1 + 25) / 2 = 13, whole is 3^2 = 9. So |G|^2
    # is 2 * 9 - 13 = 5, the product of both gradients, and the trace is 6 * (13 - 9) = 24.
    found = estimated([[1.0], [5.0]], [3, 3])
    np.testing.assert_allclose(found.squared_gradient, 5.0, rtol=1e-6)
    np.testing.assert_allclose(found.trace, 24.0, rtol=1e-6)
    assert found.tokens == 6


@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (3, 1, 2), (2, 0, 3)])
def test_the_mean_over_all_outcomes_is_exact_for_any_numbers_of_tokens(tokens):
    # The gradient of a token is 0.5 + e, where e is 1 or -1: |G|^2 is 0.25 and the trace is 1.
    # A microbatch without tokens has the gradient 0.
    ends = np.cumsum(tokens)[:-1]
    outcomes = []
    for signs in itertools.product((-1.0, 1.0), repeat=sum(tokens)):
        parts = np.split(0.5 + np.array(signs), ends)
        gradients = [[part.mean() if part.size else 0.0] for part in parts]
        outcomes.append(estimated(gradients, tokens))
    means = jax.tree.map(lambda *leaves: np.mean(leaves), *outcomes)
    np.testing.assert_allclose(means.squared_gradient, 0.25, rtol=1e-5)
    np.testing.assert_allclose(means.trace, 1.0, rtol=1e-5)


def test_the_noise_scale_of_a_quadratic_loss_is_the_known_one():
    # The loss |w - x|^2 / 2 of a token x with mean 0 and standard deviations (1, 2, 3) has the
    # gradient w - x at w = (1, 1, 1): |G|^2 is 3, the trace 1 + 4 + 9, their ratio 14 / 3.
    tokens, deviations, steps = np.array([8, 8, 4, 12]), np.array([1.0, 2.0, 3.0]), 2000

    def step(key):
        noise = jax.random.normal(key, (tokens.sum(), 3)) * deviations
        ends = np.cumsum(tokens)[:-1]
        return estimated(jnp.stack([p.mean(0) for p in jnp.split(1.0 - noise, ends)]), tokens)

    found = jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(0), steps))
    for values, truth in ((found.squared_gradient, 3.0), (found.trace, 14.0)):
        error = np.std(values) / np.sqrt(steps)
        assert abs(np.mean(values) - truth) < 4 * error and error < 0.05 * truth
    drawn = np.arange(1.0, steps + 1), *map(np.asarray, (found.squared_gradient, found.trace))
    run = Estimates(*drawn, np.full(steps, 32.0))
    low, high = run.interval()
    assert low < 14 / 3 < high and high - low < 1.0
    assert low < run.scale < high
    # A mean of ratios is far away: some estimates of |G|^2 are near 0 or negative.
    assert abs(np.mean(run.trace / run.squared_gradient) - 14 / 3) > high - low


def test_one_microbatch_with_tokens_gives_no_estimate():
    for tokens in ((4, 0), (0, 0)):
        found = estimated([[1.0], [0.0]], tokens)
        assert np.isnan(found.squared_gradient) and np.isnan(found.trace)


@functools.cache
def gradient_of(microbatches, noise, devices=1):
    """A compiled function from a batch to its measurements, and the first state's."""
    mesh = make_mesh(MeshConfig(devices), jax.devices()[:devices])
    graph, state = made(recipe(model(), mesh))
    objective = Objective(microbatches, z_loss=HEAD_Z, noise=noise)
    step = compiled(functools.partial(objective.value_and_gradient, graph))

    def run(given):
        with jax.set_mesh(mesh):
            return jax.device_get(step(state, given))

    return run


def test_a_step_estimates_the_noise_of_the_gradients_of_its_microbatches():
    # Microbatches of 4 rows have 64, 20, 39 and 0 tokens; each alone is a batch whose other rows
    # are padding, so its gradient is the mean over its tokens.
    found = gradient_of(4, True)(batch())
    alone = gradient_of(1, False)
    gradients = []
    for start in range(0, 16, 4):
        lengths = np.where((np.arange(16) >= start) & (np.arange(16) < start + 4), LENGTHS, 0)
        leaves = jax.tree.leaves(alone(batch(lengths)).gradient)
        gradients.append(np.concatenate([np.asarray(leaf).ravel() for leaf in leaves]))
    tokens = LENGTHS.reshape(4, 4).sum(1)
    wanted = estimated(gradients, tokens)
    assert found.noise.tokens == 123
    np.testing.assert_allclose(found.noise.squared_gradient, wanted.squared_gradient, rtol=1e-3)
    np.testing.assert_allclose(found.noise.trace, wanted.trace, rtol=1e-3)
    assert wanted.trace > 0
    assert alone(batch()).noise is None
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(found.gradient)]
    close(np.concatenate(leaves), tokens @ np.array(gradients) / 123, 1e-5)


def test_eight_devices_estimate_what_one_does():
    one, eight = (gradient_of(2, True, devices)(batch()).noise for devices in (1, 8))
    close(eight, one, 2e-4)


def test_the_norm_of_bfloat16_gradients_is_a_float32():
    found = squared_norm({"a": jnp.full((3,), 2.0, jnp.bfloat16), "b": jnp.ones((300,))})
    assert found == 312.0 and found.dtype == jnp.float32


def test_without_microbatches_it_is_one_line():
    training = TrainingConfig(noise_scale=True)
    with pytest.raises(ConfigError, match="set training.microbatches=2 or more, or unset") as error:
        Experiment("x", training=training).check_settings()
    assert "\n" not in str(error.value)


def records(squared, traces):
    pairs = enumerate(zip(squared, traces, strict=True), start=1)
    noise = ((step, {"squared_gradient": g, "trace": t, "tokens": 10.0}) for step, (g, t) in pairs)
    return [{"kind": "train", "step": step, "gradient_noise": one} for step, one in noise]


def test_a_smoothed_scale_is_a_ratio_of_averages():
    # Records of evaluations, of steps without an estimate and of other runs are left out.
    lines = records([1.0, 3.0, None, 5.0, -9.0], [8.0, 8.0, None, 16.0, 4.0])
    lines += [{"kind": "eval", "step": 5, "loss": 1.0}, {"kind": "train", "step": 6}]
    found = estimates(lines)
    assert found.steps.tolist() == [1, 2, 4, 5]
    steps, scales = smoothed(found, 2)
    # (8 + 8) / (1 + 3), (8 + 16) / (3 + 5), and no signal in the last two.
    assert steps.tolist() == [2, 4, 5] and scales.tolist() == [4.0, 3.0, np.inf]
    assert estimates([]).steps.shape == (0,)


def test_a_signal_within_the_noise_has_no_upper_bound():
    rng = np.random.default_rng(0)
    found = estimates(records(rng.normal(size=50), 10 + rng.normal(size=50)))
    low, high = found.interval()
    assert 0 < low < high == np.inf
