import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.config.loading import experiment_of
from moe_jax.config.optimizer import SGD, Adafactor, AdamW, Lion, Muon, OptimizerConfig
from moe_jax.config.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    ExponentialRise,
    Linear,
    RSqrt,
    WarmupStableDecay,
)
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import T5Relative
from moe_jax.training.optimizer import learning_rate, make_optimizer, parameter_groups

STEPS = 12  # the schedule's end


# ---------------------------------------------------------------- learning rates


# Peak 2, 4 steps of warm-up: updates 0 1 2 3 have 1/4 1/2 3/4 1 of it under every schedule.
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {4: 2.0, 7: 2.0, 11: 2.0, 50: 2.0}),
        # Update 15 is number 16: sqrt(4 / 16) = 1/2; number 64: sqrt(4 / 64) = 1/4.
        (RSqrt(), {15: 1.0, 63: 0.5}),
        # A quarter of the way, number 6: 0.1 + 0.9 * (1 + cos(45 degrees)) / 2 = 0.868198.
        (Cosine(0.1), {5: 1.736396, 7: 1.1, 11: 0.2, 50: 0.2}),
        (Cosine(0.0), {7: 1.0, 11: 0.0, 50: 0.0}),
        # Two falls, 4 to 8 and 8 to 12: number 6 is half-way, number 8 ends the fall, number 9
        # is a quarter of the way again: 0.2 + 0.8 * (1 + cos(45 degrees)) / 2 = 0.882843.
        (CosineRestarts((8,), 0.2), {5: 1.2, 7: 0.4, 8: 1.765685, 9: 1.2, 11: 0.4, 50: 0.4}),
        (CosineRestarts((), 0.1), {5: 1.736396, 7: 1.1, 11: 0.2, 50: 0.2}),
        # Half-way is number 8, the last number 12.
        (Linear(), {5: 1.5, 7: 1.0, 9: 0.5, 11: 0.0, 50: 0.0}),
        (Linear(0.2), {7: 1.2, 11: 0.4, 50: 0.4}),
        # The last quarter of 12 steps falls: numbers 10, 11, 12 have 2/3, 1/3 and 0 of the peak.
        (WarmupStableDecay(0.25), {8: 2.0, 9: 4 / 3, 10: 2 / 3, 11: 0.0, 50: 0.0}),
        (WarmupStableDecay(0.25, 0.5), {8: 2.0, 11: 1.0}),
    ],
    ids=str,
)
def test_learning_rates(schedule, expected):
    config = OptimizerConfig(schedule=schedule, learning_rate=2.0, warmup_steps=4)
    for step, rate in ({0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0} | expected).items():
        found = learning_rate(config, jnp.int32(step), STEPS)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, rate, rtol=1e-5, atol=1e-6, err_msg=str(step))


@pytest.mark.parametrize(
    "schedule", [Constant(), RSqrt(), Cosine(), Linear(), WarmupStableDecay()], ids=str
)
def test_without_warm_up_the_first_rate_is_near_the_peak(schedule):
    config = OptimizerConfig(schedule=schedule, learning_rate=2.0, warmup_steps=0)
    found = float(learning_rate(config, jnp.int32(0), 1000))
    assert 1.99 < found <= 2.0


def test_an_exponential_rise_multiplies_the_rate_by_the_same_factor_each_step():
    # From 0.02 to 2 in five steps: each step has the fourth root of 100 times the rate before.
    config = OptimizerConfig(schedule=ExponentialRise(0.01), learning_rate=2.0, warmup_steps=0)
    found = [float(learning_rate(config, jnp.int32(step), 5)) for step in range(5)]
    np.testing.assert_allclose(found, [0.02, 0.0632456, 0.2, 0.632456, 2.0], rtol=1e-5)


@pytest.mark.parametrize("restarts", [(8, 8), (9, 8)], ids=str)
def test_restarts_that_do_not_increase_are_refused(restarts):
    with pytest.raises(ConfigError, match="must be steps in increasing order"):
        CosineRestarts(restarts)


@pytest.mark.parametrize("restarts", [(4,), (12,)], ids=str)
def test_a_restart_in_the_warm_up_or_at_the_end_is_refused(restarts):
    with pytest.raises(ConfigError, match="after optimizer.warmup_steps=4 and before training.ste"):
        CosineRestarts(restarts).check(warmup=4, steps=12)
    changes = {"optimizer.schedule.type": "CosineRestarts", "optimizer.warmup_steps": 4}
    changes |= {"optimizer.schedule.restarts": restarts, "training.steps": 12}
    with pytest.raises(ConfigError, match="optimizer.schedule.restarts"):
        experiment_of("quickstart", changes)


def test_t5s_printed_rate_is_the_peak_times_the_root_of_the_warm_up():
    # T5: 1 / sqrt(max(n, 10000)).
    config = OptimizerConfig(schedule=RSqrt(), learning_rate=0.01, warmup_steps=10000)
    np.testing.assert_allclose(
        learning_rate(config, jnp.int32(39999), 10**6), 1 / np.sqrt(40000), rtol=1e-6
    )


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(ConfigError, match="OptimizerConfig.learning_rate=.* must be above 0"):
        OptimizerConfig(learning_rate=rate)


# ---------------------------------------------------------------- updates

AXES = {
    "matrix": ("embed", "mlp"),
    "norm": ("embed",),
    "stacked_norm": ("embed",),  # two scanned layers: two axes, one of them named
    "experts": ("expert", "expert_embed", "expert_mlp"),
    "stacked_router": ("embed", "router"),
}
SHAPES = {
    "matrix": (4, 6),
    "norm": (4,),
    "stacked_norm": (2, 4),
    "experts": (2, 4, 6),
    "stacked_router": (2, 4, 2),
}
DECAYED = {"matrix", "experts", "stacked_router"}


def arrays(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.normal(size=shape).astype("f") for name, shape in SHAPES.items()}


def state(values):
    return nnx.State({name: nnx.Param(jnp.asarray(values[name]), axes=AXES[name]) for name in AXES})


def values(params):
    return {name: np.asarray(params[name].get_value()) for name in AXES}


def train(config, params, gradients):
    """The parameters after each gradient."""
    optimizer = make_optimizer(config, STEPS)
    params = state(params)
    carried = optimizer.init(params)
    step = jax.jit(optimizer.update)
    after = []
    for gradient in gradients:
        updates, carried = step(state(gradient), carried, params)
        params = optax.apply_updates(params, updates)
        after.append(values(params))
    return after


def plain(**changes):
    """A constant rate and no clipping, so that the update rule shows."""
    settings = {"schedule": Constant(), "warmup_steps": 0, "clip_norm": 0.0} | changes
    return OptimizerConfig(**settings)


def test_adamw_is_numpys():
    rule = AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5)
    params, gradients = arrays(0), [arrays(1), arrays(2), arrays(3)]
    config = plain(rule=rule, schedule=Linear(), learning_rate=0.1)
    found = train(config, params, gradients)
    for name in AXES:
        p = params[name].astype(np.float64)
        m = v = np.zeros_like(p)
        for t in (1, 2, 3):
            g = gradients[t - 1][name].astype(np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            decay = 0.5 * p if name in DECAYED else 0.0
            p = p - 0.1 * (1 - t / 12) * (step + decay)
            np.testing.assert_allclose(found[t - 1][name], p, rtol=1e-5, atol=1e-6, err_msg=name)


def test_decay_alone_shrinks_matrices_and_leaves_norms():
    params, zero = arrays(0), arrays(0, scale=0.0)
    (found,) = train(plain(rule=AdamW(weight_decay=0.5), learning_rate=0.1), params, [zero])
    for name in AXES:
        factor = 1 - 0.1 * 0.5 if name in DECAYED else 1.0
        np.testing.assert_allclose(found[name], factor * params[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "rule",
    [
        AdamW(weight_decay=0.5),
        Lion(weight_decay=0.5),
        SGD(weight_decay=0.5),
        Muon(weight_decay=0.5),
    ],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize(
    ("choice", "spared"),
    [
        ({}, set()),
        ({"decay_routers": False}, {"stacked_router"}),
        ({"decay_embeddings": False}, {"table"}),
        ({"decay_routers": False, "decay_embeddings": False}, {"stacked_router", "table"}),
    ],
)
def test_routers_and_embeddings_are_left_out_of_the_decay_by_choice(rule, choice, spared):
    axes = AXES | {"table": ("vocab", "embed"), "head": ("embed", "vocab")}
    axes["bias"] = ("expert", None, "expert_mlp")  # three axes, and a bias all the same
    shapes = SHAPES | {"table": (6, 4), "head": (4, 6), "bias": (2, 1, 6)}
    before = nnx.State(
        {
            name: nnx.Param(
                jnp.ones(shapes[name]),
                axes=axes[name],
                **({"decayed": False} if name == "bias" else {}),
            )
            for name in axes
        }
    )
    optimizer = make_optimizer(plain(rule=rule, learning_rate=0.1, **choice), STEPS)
    zero = jax.tree.map(jnp.zeros_like, before)
    updates, _ = optimizer.update(zero, optimizer.init(before), before)
    moved = {name for name in axes if np.asarray(updates[name].get_value()).any()}
    assert moved == {*DECAYED, "table", "head"} - spared


def check_by_numpy(rule, step):
    """Compares three updates with ``step``, from momentum and gradient to update and momentum."""
    params, gradients = arrays(0), [arrays(1), arrays(2), arrays(3)]
    found = train(plain(rule=rule, learning_rate=0.1), params, gradients)
    for name in AXES:
        p = params[name].astype(np.float64)
        m = np.zeros_like(p)
        for t, gradient in enumerate(gradients):
            update, m = step(m, gradient[name].astype(np.float64))
            p = p - 0.1 * (update + (0.5 * p if name in DECAYED else 0.0))
            np.testing.assert_allclose(found[t][name], p, rtol=1e-5, atol=1e-6, err_msg=name)


def test_lion_is_numpys():
    def step(m, g):
        return np.sign(0.8 * m + 0.2 * g), 0.9 * m + 0.1 * g

    check_by_numpy(Lion(b1=0.8, b2=0.9, weight_decay=0.5), step)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_numpys(nesterov):
    def step(m, g):
        m = 0.8 * m + g
        return (g + 0.8 * m if nesterov else m), m

    check_by_numpy(SGD(momentum=0.8, nesterov=nesterov, weight_decay=0.5), step)


# ---------------------------------------------------------------- Muon

MUON = Muon(weight_decay=0.0)


def muon_change(axes, value, gradient, rule=MUON):
    """The change of one parameter by one step at the rate 1."""
    optimizer = make_optimizer(plain(rule=rule, learning_rate=1.0), STEPS)
    params = nnx.State({"w": nnx.Param(jnp.asarray(value), axes=axes)})
    given = nnx.State({"w": nnx.Param(jnp.asarray(gradient), axes=axes)})
    updates, _ = jax.jit(optimizer.update)(given, optimizer.init(params), params)
    return np.asarray(updates["w"].get_value())


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_an_update_of_muon_is_nearly_orthogonal_and_has_the_rms_of_adamw(shape):
    gradient = drawn(*shape)
    change = muon_change(("embed", "mlp"), drawn(*shape, seed=1), gradient)
    # All singular values are equal up to the tolerance of five iterations, 0.7 to 1.2.
    singular = np.linalg.svd(change, compute_uv=False) / (0.2 * max(shape) ** 0.5)
    assert 0.6 < singular.min() <= singular.max() < 1.3
    # The exact factor of the polar decomposition has the same directions.
    left, _, right = np.linalg.svd(-gradient, full_matrices=False)
    exact = left @ right
    cosine = (change * exact).sum() / np.linalg.norm(change) / np.linalg.norm(exact)
    assert cosine > 0.95
    assert np.sqrt((change**2).mean()) == pytest.approx(0.2, rel=0.25)


def test_stacked_experts_are_orthogonalised_alone():
    # Four experts, one with a gradient a thousand times as large, in two scanned layers.
    gradient = drawn(2, 4, 8, 6) * np.array([1.0, 1e3, 1.0, 0.0], "f")[:, None, None]
    value = drawn(2, 4, 8, 6, seed=1)
    stacked = muon_change(("expert", "expert_embed", "expert_mlp"), value, gradient)
    for layer in range(2):
        for expert in range(4):
            alone = muon_change(("embed", "mlp"), value[layer, expert], gradient[layer, expert])
            np.testing.assert_allclose(stacked[layer, expert], alone, rtol=1e-4, atol=1e-6)
    # An expert without a token has no gradient, and its update is zero and finite.
    assert not stacked[:, 3].any()


def test_heads_are_one_matrix():
    gradient, value = drawn(8, 2, 3), drawn(8, 2, 3, seed=1)
    query = muon_change(("embed", "heads", "head"), value, gradient)
    flat = muon_change(("embed", "mlp"), value.reshape(8, 6), gradient.reshape(8, 6))
    np.testing.assert_allclose(query.reshape(8, 6), flat, rtol=1e-5, atol=1e-7)
    gradient, value = drawn(2, 3, 8), drawn(2, 3, 8, seed=1)
    output = muon_change(("heads", "head", "embed"), value, gradient)
    flat = muon_change(("mlp", "embed"), value.reshape(6, 8), gradient.reshape(6, 8))
    np.testing.assert_allclose(output.reshape(6, 8), flat, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "axes", [("vocab", "embed"), ("embed", "vocab"), ("embed", "router"), ("embed",)], ids=str
)
def test_other_parameters_take_adamw(axes):
    shape = (8, 6)[: len(axes)]
    gradient, value = drawn(*shape), drawn(*shape, seed=1)
    adamw = AdamW(b1=MUON.b1, b2=MUON.b2, eps=MUON.eps, weight_decay=0.0)
    found, expected = (muon_change(axes, value, gradient, rule) for rule in (MUON, adamw))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_muon_decays_matrices():
    value = drawn(8, 6)
    change = muon_change(("embed", "mlp"), value, 0 * value, Muon(weight_decay=0.5))
    np.testing.assert_allclose(change, -0.5 * value, rtol=1e-6)


@pytest.mark.parametrize("by_scale", [True, False])
@pytest.mark.parametrize("factored_from", [4, 128])
def test_adafactor_is_optaxs(factored_from, by_scale):
    rule = Adafactor(0.7, 0.9, by_scale, factored_from)
    params, gradients = arrays(0), [arrays(seed, 10.0**seed) for seed in range(1, 5)]
    found = train(plain(rule=rule, schedule=Linear(), learning_rate=0.1), params, gradients)
    reference = optax.adafactor(
        lambda count: 0.1 * (1 - (count + 1) / 12),
        min_dim_size_to_factor=factored_from,
        decay_rate=0.7,
        clipping_threshold=0.9,
        multiply_by_parameter_scale=by_scale,
        momentum=None,
    )
    wanted = {name: jnp.asarray(x) for name, x in params.items()}
    carried = reference.init(wanted)
    for gradient, after in zip(gradients, found, strict=True):
        updates, carried = reference.update(gradient, carried, wanted)
        wanted = optax.apply_updates(wanted, updates)
        for name in AXES:
            np.testing.assert_allclose(after[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_the_first_adafactor_step_is_numpys():
    params, gradient = arrays(0), arrays(1)
    config = plain(rule=Adafactor(factored_from=4), learning_rate=0.1)
    (found,) = train(config, params, [gradient])
    p, g = params["matrix"].astype(np.float64), gradient["matrix"].astype(np.float64)
    # Step 1 forgets everything before it: the decay is 1 - 1 ** -0.8 = 0.
    rows, columns = (g**2).mean(1, keepdims=True), (g**2).mean(0, keepdims=True)
    update = g / np.sqrt(rows * columns / rows.mean())
    update /= max(1.0, np.sqrt((update**2).mean()))
    expected = p - 0.1 * np.sqrt((p**2).mean()) * update
    np.testing.assert_allclose(found["matrix"], expected, rtol=1e-5, atol=1e-6)


def first_moments(clip_norm, gradient):
    """What AdamW saw of the gradient, by its first moment."""
    rule = AdamW(b1=0.0)
    optimizer = make_optimizer(plain(rule=rule, clip_norm=clip_norm), STEPS)
    params = state(arrays(0))
    _, carried = optimizer.update(state(gradient), optimizer.init(params), params)
    return values(optax.tree_utils.tree_get(carried, "mu"))


@pytest.mark.parametrize(
    ("clip_norm", "factor"),
    # The gradient's norm is 5; 0 is no clipping.
    [(0.0, 1.0), (10.0, 1.0), (5.0, 1.0), (2.5, 0.5), (1.0, 0.2)],
)
def test_the_norm_that_is_clipped_is_that_of_all_parameters_together(clip_norm, factor):
    gradient = arrays(0, scale=0.0)
    gradient["matrix"][1, 2], gradient["experts"][1, 0, 3] = 3.0, -4.0
    found = first_moments(clip_norm, gradient)
    for name in AXES:
        np.testing.assert_allclose(found[name], factor * gradient[name], rtol=1e-6)


@pytest.mark.parametrize(
    "rule", [AdamW(), Adafactor(), Lion(), SGD(), Muon()], ids=lambda rule: type(rule).__name__
)
def test_multipliers_change_their_own_group_alone(rule):
    params, gradient = arrays(0), arrays(1)

    def change(**multipliers):
        (after,) = train(plain(rule=rule, learning_rate=0.1, **multipliers), params, [gradient])
        return {name: after[name] - params[name] for name in AXES}

    base = change()
    factors = {"experts": 0.25, "stacked_router": 4.0}
    found = change(expert_multiplier=0.25, router_multiplier=4.0)
    for name in AXES:
        expected = factors.get(name, 1.0) * base[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    alone = change(expert_multiplier=0.0)
    assert not alone["experts"].any()
    np.testing.assert_array_equal(alone["stacked_router"], base["stacked_router"])


# ---------------------------------------------------------------- groups


def test_groups_of_a_model():
    moe = MoEConfig(every=2, num_experts=8, expert_dim=32, group_size=16)
    config = DecoderConfig(
        num_layers=2,
        width=16,
        num_heads=2,
        head_dim=8,
        gated=True,
        tie_embeddings=False,
        positions=T5Relative(),
        moe=moe,
    )
    shapes = jax.eval_shape(lambda: nnx.state(Decoder(config, 64, jax.random.key(0)), nnx.Param))
    leaves = jax.tree.leaves_with_path(
        parameter_groups(shapes), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    groups = {
        "/".join(str(part).strip("[].'") for part in path): group.get_value()
        for path, group in leaves
    }
    attention = {f"attention/{name}": "dense" for name in ("key", "output", "query", "value")}
    norms = {"attention_norm/scale": "dense", "feed_forward_norm/scale": "dense"}
    dense = {f"feed_forward/{name}": "dense" for name in ("down", "gate", "up")}
    experts = {f"feed_forward/experts/{name}": "expert" for name in ("down", "gate", "up")}
    router = {"feed_forward/router/kernel": "router"}
    first, second = attention | norms | dense, attention | norms | experts | router
    assert groups == {
        "embedding/table": "dense",
        "final_norm/scale": "dense",
        "embedding/head": "dense",
        "relative_bias/table": "dense",
        **{f"layers/parts/0/0/{name}": group for name, group in first.items()},
        **{f"layers/parts/1/0/{name}": group for name, group in second.items()},
    }
