"""Networks of experts on sorted choices, against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.ad_checkpoint import saved_residuals

from moe_jax import grouped
from moe_jax.grouped import Choices, megablox, product
from moe_jax.nn.feed_forward import FeedForwardConfig

TOKENS, EXPERTS, K, WIDTH, HIDDEN = 20, 5, 2, 6, 7
GATED = FeedForwardConfig(WIDTH, HIDDEN, "silu", gated=True, bias=True, limit=1.5, up_offset=1.0)
PLAIN = FeedForwardConfig(WIDTH, HIDDEN, "relu")
# Which experts tokens choose: all of them, the first two alone, or one for every token.
LOADS = {"all": range(EXPERTS), "some empty": [0, 3], "one hot": [2]}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    run = functools.partial
    kernel = grouped.Backend(
        run(megablox.product, interpret=True), run(megablox.outer, interpret=True)
    )
    monkeypatch.setitem(product.BACKENDS, "megablox", kernel)


def made(network, load="all", tokens=TOKENS, dropped=3, spare=2):
    """Parameters, tokens, gates, experts ``(T, K)`` (-1 for a dropped choice), and the choices."""
    rng = np.random.default_rng(tokens)
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    shapes |= {"gate": (WIDTH, HIDDEN)} if network.gated else {}
    shapes |= {f"{name}_bias": shape[1:] for name, shape in shapes.items()} if network.bias else {}
    parameters = {
        name: jnp.asarray(rng.normal(size=(EXPERTS, *shape)), "float32")
        for name, shape in shapes.items()
    }
    experts = rng.choice(LOADS[load], size=(tokens, K))
    experts.reshape(-1)[rng.permutation(tokens * K)[:dropped]] = -1
    gate = np.where(experts < 0, 0, rng.random((tokens, K))).astype(np.float32)
    return (
        parameters,
        jnp.asarray(rng.normal(size=(tokens, WIDTH)), "float32"),
        jnp.asarray(gate),
        experts,
        in_order(experts, gate, spare),
    )


def in_order(experts, gate, spare):
    """The choices, sorted, with ``spare`` rows that no choice has."""
    flat = experts.reshape(-1)
    order = np.argsort(np.where(flat < 0, EXPERTS, flat), kind="stable")
    filled = (flat >= 0).sum()
    rows = filled + spare
    token, weight = np.full(rows, len(experts)), np.zeros(rows, np.float32)
    token[:filled], weight[:filled] = order[:filled] // K, gate.reshape(-1)[order[:filled]]
    place = np.full(flat.size, rows)
    place[order[:filled]] = np.arange(filled)
    sizes = np.bincount(flat[flat >= 0], minlength=EXPERTS)
    return Choices(*map(jnp.asarray, (token, weight, place.reshape(experts.shape), sizes)))


def oracle(network, gate_on, experts, parameters, tokens, gate):
    """Every expert on every token, and the sum over the chosen ones."""

    def output(own, x, g):
        def linear(x, name, gate=None):
            y = jnp.dot(x, own[name], precision="highest")
            return y + own.get(f"{name}_bias", 0.0)

        x = x * g if gate_on == "in" else x
        y = network.after(linear, network.before(linear, x), None)
        return y * g if gate_on == "out" else y

    total = jnp.zeros_like(tokens)
    for k in range(K):
        for expert in range(EXPERTS):
            own = {name: value[expert] for name, value in parameters.items()}
            y = output(own, tokens, gate[:, k, None])
            total += jnp.where(experts[:, k, None] == expert, y, 0)
    return total


def values(function, scale, parameters, tokens, gate):
    """Outputs, and gradients of parameters, tokens and gates, all by norm of order one."""
    dy = scale * jnp.asarray(np.random.default_rng(9).normal(size=tokens.shape), "float32")
    y, pull = jax.vjp(function, parameters, tokens, gate)
    gradients = jax.tree.map(lambda x: x / scale, pull(dy))
    return {"y": y, "parameters": gradients[0], "tokens": gradients[1], "gate": gradients[2]}


def assert_same(found, wanted, kept, bound=2e-6):
    found["gate"], wanted["gate"] = (jnp.where(kept, x["gate"], 0) for x in (found, wanted))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        error = np.linalg.norm(one - other)
        assert error <= bound * max(np.linalg.norm(other), 1e-6), jax.tree_util.keystr(path)


def compare(network, backend, gate_on, load="all", scale=1.0, **sizes):
    *arrays, experts, choices = made(network, load, **sizes)
    with grouped.using(backend):
        run = functools.partial(grouped.on_choices, network, choices=choices, gate_on=gate_on)
        found = jax.jit(functools.partial(values, run, scale))(*arrays)
    every = functools.partial(oracle, network, gate_on, experts)
    wanted = jax.jit(functools.partial(values, every, scale))(*arrays)
    assert_same(found, wanted, experts >= 0)


@pytest.mark.parametrize("gate_on", ["in", "out", "none"])
@pytest.mark.parametrize("backend", ["loop", "blocks", "megablox"])
def test_values_and_gradients_are_those_of_every_expert_on_every_token(backend, gate_on):
    compare(GATED, backend, gate_on)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("backend", ["loop", "blocks"])
def test_small_gradients_and_empty_experts(backend, load):
    compare(PLAIN, backend, "out", load, scale=1e-5)


def test_no_choice_at_all():
    compare(PLAIN, "loop", "out", dropped=TOKENS * K)


@pytest.mark.parametrize("load", ["all", "one hot"])
def test_whole_blocks_and_rests(load):
    compare(GATED, "loop", "out", load, tokens=300)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 9), st.sampled_from(sorted(LOADS)))
def test_a_loop_agrees_for_any_sizes(tokens, spare, load):
    *arrays, experts, choices = made(PLAIN, load, tokens=tokens, spare=spare)
    with grouped.using("loop"):
        found = grouped.on_choices(PLAIN, *arrays, choices)
    np.testing.assert_allclose(found, oracle(PLAIN, "out", experts, *arrays), rtol=1e-5, atol=1e-5)


def kept_for_backward(backend):
    """Shapes of the float arrays that the backward pass reads."""
    *arrays, _, choices = made(GATED, tokens=30, dropped=0, spare=0)
    with grouped.using(backend):
        kept = saved_residuals(lambda *given: grouped.on_choices(GATED, *given, choices), *arrays)
    return [aval.shape for aval, _ in kept if aval.dtype == jnp.float32]


@pytest.mark.parametrize("backend", ["loop", "blocks"])
def test_only_pre_activations_grow_with_the_number_of_choices(backend):
    rows = 30 * K
    shapes = [shape for shape in kept_for_backward(backend) if shape and shape[0] >= rows]
    # Up and gate, and the weights of the rows; no inputs, hidden layer or outputs of rows.
    assert sorted(shape[1:] for shape in shapes if shape[1:] not in [(), (1,)]) == [(HIDDEN,)] * 2
