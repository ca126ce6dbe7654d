"""The heads of Gemma 4 and ZAYA1, by hand and against loops over features."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.nn.router import RouterLayer
from moe_jax.routing import NormedLinear, NormedMLP, preset
from tests.routing.helpers import normal
from tests.routing.test_head import arrays


def test_normed_linear():
    # (3, 4) has the mean square 12.5; twice its first feature, over the root of 12.5 and of 2.
    given = arrays(scale=[2, 1], kernel=[[1, 0, 1], [0, 1, 1]])
    x = np.array([[3, 4], [0, 0]], np.float32)
    logits = NormedLinear(1e-20).logits(x, given, 3)
    np.testing.assert_allclose(logits, [[6 / 5, 4 / 5, 2], [0, 0, 0]], rtol=1e-6)
    # Any size of the token gives these logits.
    np.testing.assert_allclose(NormedLinear(1e-20).logits(x * 1e3, given, 3), logits, rtol=1e-6)


def test_the_scale_of_the_experts_is_the_second_plane():
    given = arrays(scale=[1, 1], kernel=[[1, 0], [0, 1]], expert_scale=[2, -1])
    planes = NormedLinear(1e-20).logits(np.array([[3, 4]], np.float32), given, 2)
    np.testing.assert_allclose(planes, [[[3 / 5, 2], [4 / 5, -1]]], rtol=1e-6)
    made = NormedLinear().parameters(5, 3, 2)
    shapes = {name: (one.shape, one.init) for name, one in made.items()}
    expected = {"scale": ((5,), "ones"), "kernel": ((5, 3), "fan_in")}
    assert shapes == expected | {"expert_scale": ((3,), "ones")}
    assert set(NormedLinear().parameters(5, 3, 1)) == {"scale", "kernel"}


def test_scales_start_as_ones_without_weight_decay():
    layer = RouterLayer(preset("gemma4", k=1), 4, 3, jax.random.key(0), 1.0)
    np.testing.assert_array_equal(layer.scale[...], np.ones(4))
    np.testing.assert_array_equal(layer.expert_scale[...], np.ones(3))
    assert layer.logits(jnp.ones((1, 2, 4))).shape == (1, 2, 3, 2)


def test_normed_mlp():
    # ZAYA1 in loops: project, divide by the root mean square, twice a linear map and the GELU x
    # times the normal distribution function of x, then the logits.
    part, width, experts = NormedMLP(dim=3), 4, 2
    shapes = part.parameters(width, experts, 1)
    given = {name: normal(i, *one.shape) for i, (name, one) in enumerate(shapes.items())}
    x = normal(20, 5, width)
    found = part.logits(jnp.asarray(x), {k: jnp.asarray(v) for k, v in given.items()}, experts)
    for token, logits in zip(x.astype(np.float64), found, strict=True):
        h = token @ given["down"] + given["down_bias"]
        h = h / math.sqrt(sum(v * v for v in h) / 3 + 1e-5) * given["scale"]
        for name in ("first", "second"):
            h = h @ given[name] + given[f"{name}_bias"]
            h = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in h])
        np.testing.assert_allclose(logits, h @ given["kernel"], rtol=1e-4, atol=1e-5)
