import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.nn import moe as moe_layer
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.mode import DECODE, EVAL, TRAIN, Mode
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.router import RouterLayer
from moe_jax.nn.shared import Shared, SharedConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing import Capacity, LoadBalance, Router, Sigmoid, Softmax, Top2, TopK

WIDTH, HIDDEN = 4, 6
EXPERT = FeedForwardConfig(WIDTH, HIDDEN, activation="relu")
TIGHT = Capacity(factor=0.5, eval_factor=0.5, minimum=1)
TRANSPORTS = ("einsum", "gather")
ROUTERS = {
    "switch": routing.presets.switch(),
    "gshard": routing.presets.gshard(),
    "expert_choice": routing.presets.expert_choice(),
}


def make(config: MoEConfig, expert: FeedForwardConfig = EXPERT, seed: int = 0) -> ConfiguredMoE:
    config = dataclasses.replace(config, expert_dim=expert.hidden)
    return ConfiguredMoE(config, expert, jax.random.key(seed))


def normal(shape: tuple[int, ...], seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnames="mode")
def apply(moe: ConfiguredMoE, x, valid, rng=None, *, mode=EVAL):
    return moe(x, valid, mode=mode, rng=rng)


def all_valid(x: jax.Array) -> jax.Array:
    return jnp.ones(x.shape[:2], bool)


def loop(moe: ConfiguredMoE, x: jax.Array, experts_per_token: int) -> np.ndarray:
    """Every token on its own: softmax, its best experts, their gated sum. Nothing is dropped."""
    kernel, up, down = (
        np.asarray(p[...], np.float64)
        for p in (moe.router.kernel, moe.experts.up, moe.experts.down)
    )
    tokens = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    out = np.zeros_like(tokens)
    for s, token in enumerate(tokens):
        scores = np.exp(token @ kernel)
        scores /= scores.sum()
        best = np.argsort(-scores)[:experts_per_token]
        # Switch keeps the raw gate, GShard divides the two gates by their sum.
        divisor = 1.0 if experts_per_token == 1 else scores[best].sum()
        for e in best:
            out[s] += scores[e] / divisor * (np.maximum(token @ up[e], 0) @ down[e])
    return out.reshape(x.shape)


def close(actual, expected, rtol=2e-5):
    """Equal to ``rtol`` of the largest entry: what float32 sums in another order differ by."""
    expected = np.asarray(expected)
    bound = rtol * max(np.abs(expected).max(initial=0.0), 1e-6)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=bound)


def leaves_close(actual, expected, rtol=2e-5):
    jax.tree.map(lambda a, b: close(a, b, rtol), actual, expected)


# Values


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("name", "k"), [("switch", 1), ("gshard", 2)])
def test_at_full_capacity_the_layer_is_a_loop_over_tokens(name, k, transport):
    config = MoEConfig(num_experts=3, group_size=4, router=ROUTERS[name], transport=transport)
    moe, x = make(config), normal((2, 6, WIDTH))
    y, aux = apply(moe, x, all_valid(x), mode=DECODE)
    close(y, loop(moe, x, k))
    assert float(aux.counts.unrouted) == 0.0
    assert float(aux.counts.load.sum()) == 12 * k


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_is_the_dense_layer_in_values_and_gradients(gated, transport):
    # The gate is a softmax over one expert, the constant 1: it leaves the router no gradient.
    expert = dataclasses.replace(EXPERT, activation="gelu", gated=gated)
    router = routing.presets.switch(balance_weight=0.0)
    moe = make(MoEConfig(num_experts=1, group_size=4, router=router, transport=transport), expert)
    dense = FeedForward(expert, jax.random.key(5))
    names = ("up", "down", "gate") if gated else ("up", "down")
    for name in names:
        getattr(dense, name)[...] = getattr(moe.experts, name)[0]
    x = normal((2, 4, WIDTH))

    def of_moe(moe, x):
        y, aux = moe(x, all_valid(x), mode=DECODE)
        return jnp.sin(y).sum() + aux.loss, y

    def of_dense(dense, x):
        y = dense(x)
        return jnp.sin(y).sum(), y

    (moe_grad, moe_dx), y = jax.jit(jax.grad(of_moe, (0, 1), has_aux=True))(moe, x)
    (dense_grad, dense_dx), expected = jax.jit(jax.grad(of_dense, (0, 1), has_aux=True))(dense, x)
    close(y, expected)
    close(moe_dx, dense_dx)
    for name in names:
        close(getattr(moe_grad.experts, name)[0], getattr(dense_grad, name)[...])
    np.testing.assert_array_equal(moe_grad.router.kernel[...], 0.0)


@pytest.mark.parametrize("name", ROUTERS)
def test_einsum_and_gather_agree_in_value_and_all_gradients(name):
    # Half the slots an even load needs, so that some tokens are dropped.
    router = dataclasses.replace(ROUTERS[name], capacity=TIGHT)
    x, valid = normal((2, 16, WIDTH)), jnp.arange(32).reshape(2, 16) % 5 > 0
    results = []
    for transport in TRANSPORTS:
        moe = make(MoEConfig(num_experts=4, group_size=16, router=router, transport=transport))

        def objective(moe, x):
            y, aux = moe(x, valid, mode=TRAIN, rng=jax.random.key(3))
            return jnp.sin(y).sum() + aux.loss, (y, aux)

        gradient, out = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(moe, x)
        results.append(jax.tree.leaves((gradient, out)))
    for einsum, gather in zip(*results, strict=True):
        close(gather, einsum)
    assert float(out[1].counts.unrouted) > 0


# Drops and padding


def one_way(capacity: Capacity, transport: str = "einsum", group_size: int = 4) -> ConfiguredMoE:
    """Two experts; every token whose first feature is positive wants expert 0."""
    router = Router(Softmax(), TopK(1), (LoadBalance(),), capacity)
    moe = make(MoEConfig(num_experts=2, group_size=group_size, router=router, transport=transport))
    moe.router.kernel[...] = jnp.zeros((WIDTH, 2)).at[0, 0].set(1.0)
    return moe


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_dropped_tokens_get_zero(transport):
    # 4 tokens, 2 experts, factor 0.5: one slot each. All want expert 0, so the first is served.
    moe = one_way(TIGHT, transport)
    x = jnp.abs(normal((1, 4, WIDTH)))
    y, aux = apply(moe, x, all_valid(x))
    close(y[0, 0], loop(moe, x, 1)[0, 0])
    np.testing.assert_array_equal(y[0, 1:], 0.0)
    np.testing.assert_array_equal(aux.counts.demand, [4, 0])
    np.testing.assert_array_equal(aux.counts.load, [1, 0])
    np.testing.assert_array_equal(aux.counts.overflow, [3, 0])
    assert (float(aux.counts.unrouted), float(aux.counts.valid)) == (3.0, 4.0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_padding_takes_no_slot(transport):
    # As above, but the first token is padding: the slot is the second token's.
    moe = one_way(TIGHT, transport)
    x = jnp.abs(normal((1, 4, WIDTH)))
    y, aux = apply(moe, x, jnp.array([[False, True, True, True]]), mode=Mode("eval", record=True))
    np.testing.assert_array_equal(y[0, jnp.array([0, 2, 3])], 0.0)
    close(y[0, 1], loop(moe, x, 1)[0, 1])
    np.testing.assert_array_equal(
        aux.experts, [[[False, False], [True, False], [False, False], [False, False]]]
    )
    np.testing.assert_array_equal(aux.counts.demand, [3, 0])
    assert (float(aux.counts.unrouted), float(aux.counts.valid)) == (2.0, 3.0)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_has_no_output_no_gradient_and_no_influence(name):
    config = MoEConfig(num_experts=3, group_size=8, router=ROUTERS[name])
    moe, x = make(config), normal((2, 8, WIDTH))
    valid = jnp.arange(16).reshape(2, 8) % 3 > 0

    @jax.jit
    def run(moe, x):
        def objective(moe, x):
            y, aux = moe(x, valid, mode=Mode("train", record=True))
            return jnp.sin(y).sum() + aux.loss, (y, aux)

        return jax.grad(objective, (0, 1), has_aux=True)(moe, x)

    (_, dx), (y, aux) = result = run(moe, x)
    np.testing.assert_array_equal(y[~valid], 0.0)
    np.testing.assert_array_equal(dx[~valid], 0.0)
    assert not aux.experts[~valid].any()
    assert float(jnp.abs(y[valid]).sum()) > 0 and float(jnp.abs(dx[valid]).sum()) > 0
    other = run(moe, jnp.where(valid[..., None], x, 100 * x + 1))
    jax.tree.map(np.testing.assert_array_equal, other, result)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_batch_of_padding_alone_is_zero_and_finite(name):
    moe, x = make(MoEConfig(num_experts=3, group_size=4, router=ROUTERS[name])), normal((1, 4, 4))

    def objective(x):
        y, aux = moe(x, jnp.zeros((1, 4), bool), mode=TRAIN)
        return y.sum() + aux.loss, (y, aux)

    gradient, (y, aux) = jax.jit(jax.grad(objective, has_aux=True))(x)
    np.testing.assert_array_equal(y, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)
    assert float(aux.loss) == 0.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5)])
@pytest.mark.parametrize("mesh", [None, MeshConfig(4, 2)], ids=["one device", "4 x 2"])
def test_any_batch_size_works(shape, mesh):
    # Groups of 4: 1, 7 and 15 tokens, on one device and on eight.
    moe = make(MoEConfig(num_experts=4, group_size=4, router=ROUTERS["gshard"]))
    x = normal((*shape, WIDTH))
    run = jax.jit(lambda moe, x: moe(x, all_valid(x), mode=DECODE))
    if mesh is None:
        y, aux = run(moe, x)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            y, aux = run(moe, x)
    close(y, loop(moe, x, 2))
    assert float(aux.counts.valid) == shape[0] * shape[1]
    assert float(aux.counts.load.sum()) == 2 * shape[0] * shape[1]


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_to_a_full_group_changes_nothing(name):
    # 6 tokens in groups of 4: the layer adds two, as the caller does here.
    router = dataclasses.replace(ROUTERS[name], capacity=TIGHT)
    moe = make(MoEConfig(num_experts=2, group_size=4, router=router))
    x, key = normal((1, 8, WIDTH)), jax.random.key(2)
    y, aux = apply(moe, x[:, :6], jnp.ones((1, 6), bool), key, mode=TRAIN)
    padded, padded_aux = apply(moe, x, jnp.arange(8)[None] < 6, key, mode=TRAIN)
    np.testing.assert_array_equal(y, padded[:, :6])
    jax.tree.map(np.testing.assert_array_equal, aux, padded_aux)


@pytest.mark.parametrize(
    ("mode", "slots"), [(TRAIN, 2), (EVAL, 4), (DECODE, 8)], ids=["train", "eval", "full"]
)
def test_the_mode_chooses_the_capacity(mode, slots):
    # 8 tokens for one of 2 experts: 8 / 2 * 0.5 slots in training, 8 / 2 * 1 in evaluation, or 8.
    moe = one_way(Capacity(factor=0.5, eval_factor=1.0, minimum=1), group_size=8)
    x = jnp.abs(normal((1, 8, WIDTH)))
    _, aux = apply(moe, x, all_valid(x), mode=mode)
    np.testing.assert_array_equal(aux.counts.load, [slots, 0])


@pytest.mark.parametrize("name", ["expert_choice", "expert_choice_capped"])
def test_experts_that_choose_in_full_mode_choose_among_each_row(name):
    # A row alone, in a group of its own, is what evaluation computes; 2 experts of factor 1 take
    # 4 of the 8 tokens of the long row each, and 2 of the 4 tokens of the short one.
    router = routing.preset(name, eval_capacity_factor=1.0)
    config = MoEConfig(num_experts=2, group_size=64, router=router, allow_future_leak=True)
    moe, x = make(config), normal((2, 8, WIDTH))
    valid = jnp.arange(8) < jnp.array([[8], [4]])
    y, aux = apply(moe, x, valid, mode=Mode("full", record=True))
    np.testing.assert_array_equal(aux.counts.load, [6, 6])
    np.testing.assert_array_equal(aux.experts.sum((1, 2)), [8, 4])
    np.testing.assert_array_equal(aux.gates > 0, aux.experts)
    for row, length in enumerate((8, 4)):
        alone = x[row : row + 1, :length]
        expected, _ = apply(moe, alone, all_valid(alone), mode=EVAL)
        np.testing.assert_allclose(y[row : row + 1, :length], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[1, 4:], 0)


def test_soft_slots_in_full_mode_mix_the_tokens_of_one_row():
    moe = make(
        MoEConfig(num_experts=2, group_size=64, router=routing.preset("soft_moe"), expert_dim=8)
    )
    x = normal((2, 8, WIDTH))
    valid = jnp.arange(8) < jnp.array([[8], [4]])
    y, _ = apply(moe, x, valid, mode=DECODE)
    alone, _ = apply(moe, x[1:, :4], jnp.ones((1, 4), bool), mode=DECODE)
    np.testing.assert_allclose(y[1:, :4], alone, rtol=1e-5, atol=1e-6)


# Order


def preferences(priority: str) -> ConfiguredMoE:
    """Two experts with one slot each and top-2 routing; the sign of feature 0 is the first wish."""
    capacity = dataclasses.replace(TIGHT, factor=1.0, eval_factor=1.0, priority=priority)
    router = Router(Softmax(), Top2("all"), (), capacity)
    moe = make(MoEConfig(num_experts=2, group_size=2, router=router))
    moe.router.kernel[...] = jnp.zeros((WIDTH, 2)).at[0].set(jnp.array([1.0, -1.0]))
    return moe


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        # All first choices are seated before any second one: token 1's first choice of expert 1
        # takes the slot that token 0 has as its second choice otherwise. A later token changes
        # what an earlier one gets; this is GShard's algorithm, and a leak in a causal model.
        ("choice", ([[True, True], [False, False]], [[True, False], [False, True]])),
        # Token by token, token 0 has both slots whatever comes after it.
        ("token", ([[True, True], [False, False]], [[True, True], [False, False]])),
    ],
)
def test_the_first_choice_of_a_later_token_may_take_the_slot_of_a_second_choice(priority, expected):
    moe = preferences(priority)
    record = Mode("eval", record=True)
    same = jnp.array([[[1.0, 0, 0, 0], [1.0, 0, 0, 0]]])  # both want expert 0 first
    differ = jnp.array([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]])  # token 1 wants expert 1 first
    outputs = []
    for x, taken in zip((same, differ), expected, strict=True):
        y, aux = apply(moe, x, all_valid(x), mode=record)
        np.testing.assert_array_equal(aux.experts, [taken])
        outputs.append(np.asarray(y[0, 0]))
    assert np.array_equal(*outputs) == (priority == "token")


# Randomness


def test_the_router_may_read_the_tokens_before_the_norm():
    config = MoEConfig(num_experts=3, group_size=8, router=routing.preset("switch"))
    config = dataclasses.replace(config, router_input="residual")
    moe, mode = make(config), Mode("full", record=True)
    x, residual, valid = normal((1, 8, WIDTH)), normal((1, 8, WIDTH), 2), jnp.ones((1, 8), bool)
    y, report = moe(x, valid, mode=mode, residual=residual)
    scores = jax.nn.softmax(residual @ moe.router.kernel[...])
    np.testing.assert_array_equal(report.experts.argmax(-1), scores.argmax(-1))
    # The experts read the normalised tokens: outputs of all experts (E, T, M), and the chosen one.
    outputs = moe.experts(jnp.broadcast_to(x[0], (3, 8, WIDTH)))
    expected = outputs[scores[0].argmax(-1), jnp.arange(8)] * scores[0].max(-1)[:, None]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    alone, _ = moe(x, valid, mode=mode)  # a layer without a norm: both are the same tokens
    np.testing.assert_array_equal(alone, moe(x, valid, mode=mode, residual=x)[0])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_shared_network_may_have_norms_of_its_own(kind):
    norms = NormConfig(kind=kind, bias=kind == "layer")
    shared = Shared(SharedConfig(HIDDEN, norms=True), EXPERT, jax.random.key(0), norms)
    for i, each in enumerate((shared.norm, shared.output_norm, shared.routed_norm)):
        each.scale[...] = jnp.arange(1.0, 5.0) + i
        if kind == "layer":
            each.bias[...] = jnp.ones(4)
    x, residual, routed = (normal((2, 3, WIDTH), seed) for seed in range(3))
    valid = jnp.array([[1, 1, 1], [1, 0, 0]]) > 0
    y, losses = shared(x, jnp.where(valid[..., None], routed, 0), valid, None, residual)
    expected = shared.output_norm(shared.network(shared.norm(residual)))
    expected += shared.routed_norm(routed)
    np.testing.assert_allclose(y[valid], expected[valid], atol=1e-6)
    assert not y[~valid].any() and losses == {}


def test_jitter_needs_a_key_stays_in_its_bounds_and_spares_the_experts():
    # One feature, x = 2, kernel (1, 0), so the logits are (2 u, 0) with u the jitter factor. Expert
    # 0 halves positive numbers, so its token leaves as the gate sigmoid(2 u).
    router = routing.presets.switch(input_jitter=0.25)
    expert = FeedForwardConfig(1, 1, activation="relu")
    moe = make(MoEConfig(num_experts=2, group_size=64, router=router), expert)
    moe.router.kernel[...] = jnp.array([[1.0, 0.0]])
    moe.experts.up[...] = jnp.ones((2, 1, 1))
    moe.experts.down[...] = 0.5 * jnp.ones((2, 1, 1))
    x = 2 * jnp.ones((4, 64, 1))

    def factor(mode, rng):
        y, _ = apply(moe, x, all_valid(x), rng, mode=mode)
        gate = np.asarray(y, np.float64)
        return np.log(gate / (1 - gate)) / 2

    full = Mode("full")
    np.testing.assert_allclose(factor(full, None), 1.0, atol=1e-5)
    jittered = factor(full, jax.random.key(0))
    assert 0.75 - 1e-5 <= jittered.min() < 0.8 and 1.2 < jittered.max() <= 1.25 + 1e-5
    assert abs(jittered.mean() - 1) < 0.05
    assert not np.array_equal(jittered, factor(full, jax.random.key(1)))
    np.testing.assert_array_equal(jittered, factor(full, jax.random.key(0)))


def test_input_dropout_needs_a_key_and_spares_the_experts():
    # As above, x = 1 and logits (d, 0): d is 0 with probability 1/4, else 4/3.
    router = routing.presets.switch(input_jitter=0.0, input_dropout=0.25)
    expert = FeedForwardConfig(1, 1, activation="relu")
    moe = make(MoEConfig(num_experts=2, group_size=64, router=router), expert)
    moe.router.kernel[...] = jnp.array([[1.0, 0.0]])
    moe.experts.up[...] = moe.experts.down[...] = jnp.ones((2, 1, 1))
    x = jnp.ones((4, 64, 1))
    dropped, _ = apply(moe, x, all_valid(x), jax.random.key(0), mode=Mode("full"))
    gates = 1 / (1 + np.exp([-0.0, -4 / 3]))
    np.testing.assert_allclose(np.unique(np.round(dropped, 5)), np.round(gates, 5), atol=2e-5)
    share = np.mean(np.asarray(dropped) < 0.6)
    assert abs(share - 0.25) <= 4.9 * np.sqrt(0.25 * 0.75 / 256)
    quiet, _ = apply(moe, x, all_valid(x), None, mode=Mode("full"))
    np.testing.assert_allclose(quiet, 1 / (1 + np.exp(-1)), rtol=1e-5)


def test_groups_draw_each_from_a_key_of_its_own():
    # Four groups of the same tokens: with one key for all they would give up the same choices.
    router = routing.presets.gshard(second="random")
    moe = make(MoEConfig(num_experts=4, group_size=16, router=router))
    x = jnp.tile(normal((1, 16, WIDTH)), (4, 1, 1))
    _, aux = apply(moe, x, all_valid(x), jax.random.key(0), mode=Mode("full", record=True))
    taken = np.asarray(aux.experts)
    assert all(not np.array_equal(taken[0], other) for other in taken[1:])


def test_the_draws_of_a_layer_have_keys_of_their_own(monkeypatch):
    # Router, experts' dropout and mask, shared network, final mask: five keys, none of them twice.
    moe = make(
        MoEConfig(
            num_experts=2,
            group_size=8,
            router=routing.presets.gshard(),
            shared=SharedConfig(hidden=4),
            expert_dropout=0.5,
            expert_mask=0.5,
            final_mask=0.5,
        )
    )
    seen = []

    def spy(owner, name, place):
        function = getattr(owner, name)

        def noted(*args, **kwargs):
            seen.append(kwargs["rng"] if place is None else args[place])
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    spy(RouterLayer, "__call__", None)
    spy(Shared, "__call__", 4)
    spy(moe_layer, "dropout", 2)
    spy(moe_layer, "masked", 2)
    x = normal((1, 8, WIDTH))
    moe(x, all_valid(x), mode=TRAIN, rng=jax.random.key(0))
    keys = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in seen]
    assert len(keys) == len(set(keys)) == 5


@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_without_a_key_the_layer_is_deterministic(name):
    moe = make(MoEConfig(num_experts=3, router=ROUTERS[name], expert_dropout=0.5))
    x = normal((2, 6, WIDTH))
    first, second = (apply(moe, x, all_valid(x), mode=TRAIN) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    random, _ = apply(moe, x, all_valid(x), jax.random.key(0), mode=TRAIN)
    assert not np.array_equal(random, first[0])


def test_expert_dropout_zeroes_and_rescales_the_experts_outputs():
    # With one expert the gate is 1, so every entry is 0 or 1 / (1 - 0.25) of what it is without.
    config = MoEConfig(num_experts=1, group_size=16, expert_dropout=0.25)
    moe, x = make(config), normal((8, 16, WIDTH))
    plain, _ = apply(moe, x, all_valid(x), mode=DECODE)
    dropped, _ = apply(moe, x, all_valid(x), jax.random.key(0), mode=DECODE)
    zero = np.asarray(dropped == 0)
    close(np.where(zero, 0, dropped), np.where(zero, 0, np.asarray(plain) / 0.75))
    assert 0.15 < zero.mean() < 0.35


# The router's precision


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_the_router_computes_in_float32_under_bfloat16():
    # relu experts have no exponential, so every exp in the program is the router's softmax.
    moe = make(MoEConfig(num_experts=3, group_size=8))
    x = normal((1, 8, WIDTH)).astype(jnp.bfloat16)
    traced = jax.make_jaxpr(lambda m, x: m(x, all_valid(x), mode=EVAL))(moe, x)
    found = list(equations(traced.jaxpr))
    kernel = (WIDTH, 3)
    routers = [
        e
        for e in found
        if e.primitive.name == "dot_general" and kernel in [v.aval.shape for v in e.invars]
    ]
    softmaxes = [e for e in found if e.primitive.name == "exp"]
    assert len(routers) == 1 and softmaxes
    for equation in routers + softmaxes:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype("float32")}
    hidden = [e for e in found if any(v.aval.shape == (3, WIDTH, HIDDEN) for v in e.invars)]
    matmuls = [e for e in hidden if e.primitive.name == "dot_general"]
    assert [v.aval.dtype for v in matmuls[0].invars] == [jnp.dtype("bfloat16")] * 2


def test_bfloat16_changes_no_routing_decision():
    expert = FeedForwardConfig(16, 8, activation="relu")
    moe = make(MoEConfig(num_experts=8, group_size=512, router=ROUTERS["gshard"]), expert)
    rounded = normal((2, 512, 16)).astype(jnp.bfloat16)
    record = Mode("full", record=True)
    y, aux = apply(moe, rounded, all_valid(rounded), mode=record)
    _, wide = apply(moe, rounded.astype(jnp.float32), all_valid(rounded), mode=record)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(aux.experts, wide.experts)
    assert float(aux.loss) == float(wide.loss)
    kernel = np.asarray(moe.router.kernel[...], np.float64)
    logits = np.asarray(rounded, np.float64) @ kernel
    best = np.argsort(-logits, axis=-1)[..., :2]
    expected = (best[..., None] == np.arange(8)).any(-2)
    np.testing.assert_array_equal(aux.experts, expected)
    # The case can tell: a router with a bfloat16 product decides some of these tokens otherwise.
    narrow = np.asarray(rounded @ moe.router.kernel[...].astype(jnp.bfloat16), np.float64)
    assert (np.argsort(-narrow, axis=-1)[..., :2] != best).any()


# The report


def test_losses_are_means_over_groups_weighted_by_valid_tokens():
    # One feature, kernel (1, 0). Group 0: x = 0, scores (1/2, 1/2), ties go to expert 0, balance
    # 2 * 1 * 1/2 = 1. Group 1: x = log 3, scores (3/4, 1/4), balance 2 * 1 * 3/4 = 1.5. With 3 and
    # 1 valid tokens the mean is (3 * 1 + 1 * 1.5) / 4 = 1.125; over groups alone it were 1.25.
    router = routing.presets.switch(balance_weight=0.5)
    moe = make(MoEConfig(num_experts=2, group_size=4, router=router), FeedForwardConfig(1, 1))
    moe.router.kernel[...] = jnp.array([[1.0, 0.0]])
    x = jnp.repeat(jnp.array([0.0, np.log(3)]), 4).reshape(1, 8, 1)
    valid = jnp.array([[True, True, True, False, True, False, False, False]])
    _, aux = apply(moe, x, valid, mode=TRAIN)
    assert set(aux.losses) == {"balance"}
    np.testing.assert_allclose(aux.losses["balance"], 1.125, rtol=1e-6)
    np.testing.assert_allclose(aux.loss, 0.5625, rtol=1e-6)


def sequence_loss(span: str, group_size: int, length: int, valid=None) -> jax.Array:
    router = Router(Sigmoid(), TopK(1), (LoadBalance(1.0, per_token=True, span=span),))
    moe = make(
        MoEConfig(num_experts=2, group_size=group_size, router=router), FeedForwardConfig(1, 1)
    )
    # Logits (x, -x): scores over their sum are (3/4, 1/4) at x = log 3.
    moe.router.kernel[...] = jnp.array([[1.0, -1.0]])
    x = jnp.concatenate([jnp.ones((1, length)), -jnp.ones((1, length))])[..., None] * np.log(3)
    valid = all_valid(x) if valid is None else valid
    return apply(moe, x, valid, mode=TRAIN)[1].losses["balance"]


@pytest.mark.parametrize("group_size", [2, 3, 4, 8, 64])
def test_a_loss_of_sequences_is_of_rows_whatever_the_groups_are(group_size):
    # Two rows of four tokens. All of the first want expert 0 and all of the second expert 1, with
    # scores (3/4, 1/4) and (1/4, 3/4): each row has 2 * 1 * 3/4.
    np.testing.assert_allclose(sequence_loss("sequence", group_size, 4), 1.5, rtol=1e-6)


def test_a_loss_of_groups_is_of_groups():
    # Both rows in one group: an even load, 1. A row or less in each group: 1.5.
    np.testing.assert_allclose(sequence_loss("group", 8, 4), 1.0, rtol=1e-6)
    np.testing.assert_allclose(sequence_loss("group", 2, 4), 1.5, rtol=1e-6)


def test_a_loss_of_sequences_counts_each_by_its_valid_tokens():
    # Three tokens of the first row and one of the second, where the padding of the first row has
    # the logits of the second: it does not count, so that both rows have 1.5.
    valid = jnp.array([[True, True, True, False], [True, False, False, False]])
    np.testing.assert_allclose(sequence_loss("sequence", 3, 4, valid), 1.5, rtol=1e-6)
    # Rows of padding alone have no loss and no weight.
    valid = jnp.array([[True] * 4, [False] * 4])
    np.testing.assert_allclose(sequence_loss("sequence", 8, 4, valid), 1.5, rtol=1e-6)


@pytest.mark.parametrize("name", ["deepseek_moe", "deepseek_v2", "deepseek_v3"])
def test_deepseek_losses_are_those_of_every_row_routed_alone(name):
    # A group of the layer holds one and a half rows here. Alone, a row is one group.
    choices = {} if name == "deepseek_moe" else {"keep_devices": 1, "drop": False}
    choices = {"keep_groups": 1, "groups": 2} if name == "deepseek_v3" else choices | {"devices": 2}
    router = routing.preset(name, k=2, **choices)
    moe, x = make(MoEConfig(num_experts=4, group_size=12, router=router)), normal((3, 8, WIDTH))
    _, aux = apply(moe, x, all_valid(x), mode=TRAIN)
    assert aux.losses
    state = {key: value[...] for key, value in moe.router.state.items()}
    logits = x @ moe.router.kernel[...]
    alone = [router(row, capacity=8, state=state).losses for row in logits]
    for key, value in aux.losses.items():
        np.testing.assert_allclose(value, np.mean([row[key] for row in alone]), rtol=1e-5)


def test_the_loss_is_the_weighted_sum_of_the_named_losses():
    # Logits 0 for 4 experts: z-loss log(4)**2; all ties go to expert 0: balance 4 * 1 * 1/4 = 1.
    router = routing.presets.switch(balance_weight=0.5, z_weight=0.25)
    moe = make(MoEConfig(num_experts=4, group_size=4, router=router))
    moe.router.kernel[...] = jnp.zeros((WIDTH, 4))
    x = normal((1, 8, WIDTH))
    _, aux = apply(moe, x, all_valid(x), mode=TRAIN)
    np.testing.assert_allclose(aux.losses["balance"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(aux.losses["z"], np.log(4) ** 2, rtol=1e-6)
    np.testing.assert_allclose(aux.loss, 0.5 + 0.25 * np.log(4) ** 2, rtol=1e-6)


def test_without_losses_the_layer_adds_zero():
    moe, x = make(MoEConfig(num_experts=2, router=ROUTERS["expert_choice"])), normal((1, 4, WIDTH))
    _, aux = apply(moe, x, all_valid(x), mode=TRAIN)
    assert aux.losses == {} and float(aux.loss) == 0.0


@pytest.mark.parametrize("name", ROUTERS)
def test_recorded_experts_are_those_of_the_dispatch_tensor(name):
    router = dataclasses.replace(ROUTERS[name], capacity=TIGHT)
    moe = make(MoEConfig(num_experts=4, group_size=8, router=router))
    x, valid = normal((3, 6, WIDTH)), jnp.arange(18).reshape(3, 6) % 7 > 0
    _, aux = apply(moe, x, valid, mode=Mode("train", record=True))
    assert aux.experts.shape == (3, 6, 4) and aux.experts.dtype == bool
    # 18 tokens are 3 groups of 8 with 6 of padding; factor 0.5 gives 8 / 4 * 0.5 = 1 slot.
    tokens = jnp.pad(x.reshape(18, WIDTH), ((0, 6), (0, 0))).reshape(3, 8, WIDTH)
    mask = jnp.pad(valid.reshape(18), (0, 6)).reshape(3, 8)
    plan = jax.jit(lambda logits: routing.route(router, logits, capacity=1, valid=mask))(
        tokens @ moe.router.kernel[...]
    )
    expected = plan.dispatch.any(-1).reshape(24, 4)[:18].reshape(3, 6, 4)
    np.testing.assert_array_equal(aux.experts, expected)
    np.testing.assert_array_equal(aux.counts.load, expected.sum((0, 1)))
    np.testing.assert_array_equal(aux.counts.unrouted, (valid & ~expected.any(-1)).sum())
    _, silent = apply(moe, x, valid, mode=TRAIN)
    assert silent.experts is None


def test_the_recorded_choice_of_padding_is_minus_one():
    # Padding prefers expert 1, and -2 would be a choice of expert 1 that got no slot.
    moe = make(MoEConfig(num_experts=2, router=Router(Softmax(), TopK(1))))
    moe.router.kernel[...] = jnp.array([[0.0, 1.0]] * WIDTH)
    x, valid = jnp.ones((1, 2, WIDTH)), jnp.array([[True, False]])
    _, aux = moe(x, valid, mode=Mode("full", record=True))
    np.testing.assert_array_equal(aux.choices, [[[1], [-1]]])


def test_counts_are_sums_over_groups():
    # Two groups of 4; both send their positive tokens to expert 0, which has one slot per group.
    moe = one_way(TIGHT)
    first = jnp.array([1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    x = jnp.zeros((1, 8, WIDTH)).at[0, :, 0].set(first)
    valid = jnp.array([[True] * 7 + [False]])
    _, aux = apply(moe, x, valid)
    np.testing.assert_array_equal(aux.counts.demand, [4, 3])
    np.testing.assert_array_equal(aux.counts.load, [2, 2])
    assert (float(aux.counts.unrouted), float(aux.counts.valid)) == (3.0, 7.0)
    assert float(aux.counts.dropped) == 3.0


@pytest.mark.parametrize(
    ("every", "layers"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (6, [])]
)
def test_which_layers_are_moe(every, layers):
    config = MoEConfig(every=every)
    assert list(config.moe_layers(5)) == layers


def test_parameters_are_float32_with_logical_axes():
    moe = make(MoEConfig(num_experts=3), dataclasses.replace(EXPERT, gated=True))
    parameters = {
        "router.kernel": ((4, 3), ("embed", "router")),
        "experts.up": ((3, 4, 6), ("expert", "expert_embed", "expert_mlp")),
        "experts.gate": ((3, 4, 6), ("expert", "expert_embed", "expert_mlp")),
        "experts.down": ((3, 6, 4), ("expert", "expert_mlp", "expert_embed")),
    }
    flat = {".".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(moe, nnx.Param))}
    found = {
        name: (leaf.get_value().shape, leaf.get_metadata()["axes"]) for name, leaf in flat.items()
    }
    assert found == parameters
    assert {leaf.get_value().dtype for leaf in flat.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "router", ["remoe", "top2_mtf", "no_token_left_behind", "moe_plus_plus", "expert_choice"]
)
def test_a_report_marks_the_choices_that_a_token_makes(router):
    choices = {"second": "threshold"} if router == "top2_mtf" else {}
    layer = make(MoEConfig(num_experts=4, group_size=16, router=routing.preset(router, **choices)))
    valid = jnp.arange(16)[None] < 12
    _, aux = layer(normal((1, 16, WIDTH)), valid, mode=Mode("eval", record=True))
    made, wanted = np.asarray(aux.choices)[0], np.asarray(aux.wanted)[0]
    assert not wanted[12:].any() and wanted[made >= 0].all()
    # Every choice has a seat or is dropped, or its expert is free.
    with_expert = np.where(made < 0, -1 - made, made) < 4
    assert (wanted & with_expert).sum() == aux.counts.demand.sum()
