"""The layer by itself, as code of others uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn import moe
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.layer import MoE
from moe_jax.nn.mode import EVAL
from moe_jax.nn.moe_config import LayerOverride, MoEConfig

WIDTH = 4
X = jax.random.normal(jax.random.key(1), (2, 8, WIDTH))


def make(**settings):
    sizes = {"width": WIDTH, "hidden": 6, "num_experts": 4}
    return MoE(**{**sizes, "rngs": nnx.Rngs(0), **settings})


@functools.cache
def usual():
    return make(router=routing.preset("switch", capacity_factor=1.0, eval_capacity_factor=8.0))


def leaves(layer):
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.state(layer).flat_state()}


def test_padding_training_and_randomness_have_defaults():
    y, report = usual()(X)
    assert y.shape == X.shape and report.loss.shape == ()
    # All 16 tokens are real, and eight times their even share has room for all.
    assert report.counts.valid == 16
    assert report.dropped_fraction == 0


def test_it_is_the_layer_of_the_models():
    layer = usual()
    valid = jnp.ones(X.shape[:2], bool).at[0, 5:].set(False)
    y, report = layer(X, valid)
    expected, other = layer.mixture(X, valid, mode=EVAL)
    np.testing.assert_array_equal(y, expected)
    assert report.counts.valid == other.counts.valid == 13


def test_training_is_asked_for_in_a_call_or_of_the_model():
    layer = make(router=routing.preset("switch", capacity_factor=0.25, eval_capacity_factor=8.0))
    # 16 tokens, 4 experts: 16 / 4 * 0.25 = 1 slot, raised to Switch's least of 4.
    assert layer(X, train=True)[1].dropped_fraction > 0
    model = nnx.Dict(layer=layer)
    model.layer.train()
    assert layer(X)[1].dropped_fraction > 0
    assert layer(X, train=False)[1].dropped_fraction == 0
    model.layer.eval()
    assert layer(X)[1].dropped_fraction == 0


def test_noise_needs_a_key_and_training():
    layer = make(router=routing.preset("switch", input_jitter=0.5))
    plain = layer(X, train=True)[0]
    np.testing.assert_array_equal(plain, layer(X, train=True)[0])
    drawn = layer(X, train=True, rngs=nnx.Rngs(1))[0]
    assert not np.array_equal(plain, drawn)
    np.testing.assert_array_equal(drawn, layer(X, train=True, rngs=nnx.Rngs(1).dropout())[0])
    np.testing.assert_array_equal(layer(X)[0], layer(X, rngs=nnx.Rngs(1))[0])


def test_what_is_passed_is_what_is_built():
    layer = make(hidden=10, gated=True, bias=True, shared=12, activation="silu", num_experts=2)
    shapes = {name: leaf.shape for name, leaf in leaves(layer).items()}
    assert shapes["mixture/experts/gate"] == shapes["mixture/experts/up"] == (2, WIDTH, 10)
    assert shapes["mixture/experts/down_bias"] == (2, 1, WIDTH)
    assert shapes["mixture/shared/network/up"] == (WIDTH, 12)
    assert layer.mixture.experts.config.activation == "silu"
    several = leaves(make(hidden=[2, 8]))
    assert several["mixture/experts/groups/0/up"].shape == (2, WIDTH, 2)
    assert several["mixture/experts/groups/1/up"].shape == (2, WIDTH, 8)
    scaled = make(init_scale=0.01).mixture
    assert np.std(scaled.experts.up[...]) < np.std(usual().mixture.experts.up[...]) / 5


@pytest.mark.parametrize("router", ["soft_moe", "expert_choice", "hash", "loss_free"])
def test_routers_of_every_kind_run(router):
    choices = {"k": 2} if router == "loss_free" else {}
    layer = make(router=routing.preset(router, **choices))
    y, _ = layer(X, token_ids=jnp.arange(16).reshape(2, 8))
    assert np.isfinite(y).all() and np.abs(y).max() > 0


@nnx.jit
def step(layer, optimizer, x):
    def loss(layer):
        y, report = layer(x, train=True)
        return (y**2).mean() + report.loss, report

    (value, report), grads = nnx.value_and_grad(loss, has_aux=True)(layer)
    optimizer.update(layer, grads)
    layer.update_router(report)
    return value, report


def test_it_trains_with_the_tools_of_nnx():
    layer = make(router=routing.preset("loss_free", k=1, bias_rate=0.5))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    before = {name: np.asarray(leaf[...]) for name, leaf in leaves(layer).items()}
    value, report = step(layer, optimizer, X)
    after = {name: np.asarray(leaf[...]) for name, leaf in leaves(layer).items()}
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == before.keys() and np.isfinite(value)
    # The bias goes down by the rate where an expert was asked for more than the mean of 4.
    moved = np.sign(4 - np.asarray(report.counts.demand)) * 0.5
    np.testing.assert_allclose(after["mixture/router/state/bias"], moved)


def test_it_splits_and_merges():
    layer = usual()
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    assert not jax.tree.leaves(rest)  # Switch carries nothing between steps
    np.testing.assert_array_equal(nnx.merge(graph, params, rest)(X)[0], layer(X)[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"router": "swich"}, "unknown router 'swich'; did you mean 'switch'"),
        ({"router": "soft_moe", "transport": "gather"}, "transport='gather'"),
        ({"hidden": (2, 4, 6)}, "expert_dims has 3 widths"),
        ({"expert_dropout": 1.5}, "expert_dropout=1.5"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as refusal:
        make(**settings)
    assert "\n" not in str(refusal.value)


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="every"):
        make(every=2)


def test_tokens_of_another_shape_are_refused():
    for x in (X[0], X[..., :2]):
        with pytest.raises(ConfigError, match=r"the layer reads \(B, L, 4\)"):
            usual()(x)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MoEConfig(expert_dim=256), r"expert_dim=256\) and FeedForwardConfig\(hidden=32"),
        (MoEConfig(expert_dim=32, gated=True), r"gated=True\) and FeedForwardConfig\(gated=False"),
        (MoEConfig(expert_dim=32, layers=(1,)), r"use config.at\(layer\)"),
        (MoEConfig(expert_dim=32, overrides=(LayerOverride((1,)),)), r"use config.at\(layer\)"),
    ],
)
def test_a_layer_of_the_models_refuses_two_descriptions_that_differ(config, said):
    with pytest.raises(ConfigError, match=said):
        moe.ConfiguredMoE(config, FeedForwardConfig(64, 32), jax.random.key(0))


def test_the_report_passes_the_logits_to_the_next_layer():
    # MoE++: the second router adds a map of the first one's logits to its own.
    first, second = (
        MoE(width=4, hidden=6, num_experts=3, router="moe_plus_plus", rngs=nnx.Rngs(seed))
        for seed in (0, 1)
    )
    x = jax.random.normal(jax.random.key(2), (1, 5, 4))
    report = jax.jit(lambda layer: layer(x)[1])(first)
    np.testing.assert_allclose(report.carried, x @ first.mixture.router.kernel[...], rtol=1e-5)
    after = jax.jit(lambda layer: layer(x, carried=report.carried)[1])(second)
    router = second.mixture.router
    logits = x @ router.kernel[...] + report.carried @ router.residual[...]
    np.testing.assert_allclose(after.carried, logits, rtol=1e-5, atol=1e-6)
