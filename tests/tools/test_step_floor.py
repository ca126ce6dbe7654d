"""The floor of a step counts each product of its program with its executions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.loading import experiment_of
from tools.step_floor import STEPS, _multiplying, products, table


def test_products_of_a_compiled_program_and_their_executions():
    def layers(x, weights):
        scores = jnp.einsum("bld,bmd->blm", x, x)
        return scores, jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[0], weights)[0]

    x, weights = jnp.ones((2, 32, 64)), jnp.ones((5, 64, 64))
    found = products(jax.jit(layers).lower(x, weights).compile().as_text())
    # Five rounds of (32, 64) x (64, 64), and one product with a batch axis of 2.
    assert sorted(found.values()) == [1, 5]
    shapes = {}
    for product, times in found.items():
        result = _multiplying(product)()
        shapes[times] = tuple(sorted(result.shape))
        assert np.isfinite(result).all()
    assert shapes == {1: (2, 32, 32), 5: (32, 64)}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_a_model(name):
    config, settings = STEPS[name]
    assert experiment_of(config, dict(settings)).model.moe.num_experts > 0


def test_the_table_says_how_far_a_step_is_from_its_floor():
    figures = {"step_seconds": 0.3, "product_seconds": 0.15, "moved_seconds": 0.05}
    text = table([{"name": "small", **figures, "over_floor": 1.5}])
    assert text.splitlines()[-1] == "| small | 300 | 150 | 50 | 1.50 |"
