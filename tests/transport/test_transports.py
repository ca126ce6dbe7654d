"""Every transport against every preset: equal values and gradients, and loops behind both."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import PRESETS, Plan, Router, preset, route
from moe_jax.transport import Einsum, Gather, Transport
from tests.routing.helpers import ROUTERS, E, S, jitted_groups, normal

G, M = 3, 6
TIGHT = 2
KEY = jax.random.key(0)
Array = np.ndarray
Parameters = dict[str, jax.Array]

# A plan looks the same whatever the options of its preset, but for renormalised gates.
NAMES = [*(function.__name__ for function in PRESETS), "top2+renormalize"]
every_router = pytest.mark.parametrize("router", [ROUTERS[name] for name in NAMES], ids=NAMES)
# One choice per token, two, and experts that choose.
KINDS = ["switch", "top2+renormalize", "expert_choice"]
every_kind = pytest.mark.parametrize("router", [ROUTERS[name] for name in KINDS], ids=KINDS)
every_transport = pytest.mark.parametrize(
    "transport", [Einsum(), Gather()], ids=["einsum", "gather"]
)


def parameters(case: str, dtype: str = "float32") -> Parameters:
    """Returns inputs ``x (G, S, M)``, router kernel ``(M, E)`` and expert weights ``(E, M, M)``."""
    x, kernel = normal(0, G, S, M), normal(1, M, E, scale=0.3)
    if case in ("one expert", "empty expert"):
        # The first feature is 1 everywhere, so its row of the kernel adds to an expert's logits.
        x[..., 0] = 1
        kernel[0] = [5, 0, 0, 0] if case == "one expert" else [-5, 0, 0, 0]
    experts = normal(2, E, M, M, scale=0.5)
    return {"x": x.astype(dtype), "kernel": kernel.astype(dtype), "experts": experts.astype(dtype)}


def mask(case: str) -> Array:
    """Returns ``valid (G, S)``: in the case ``padding`` some of a group and all of another."""
    valid = np.ones((G, S), bool)
    if case == "padding":
        valid[1, 5:] = False
        valid[2] = False
    return valid


CASES = ("plain", "padding", "one expert", "empty expert")


def forward(
    transport: Transport, router: Router, capacity: int, p: Parameters, valid: Array
) -> tuple[jax.Array, Plan]:
    """A whole layer: router in float32 at least, tanh experts, ``(G, S, M)``."""
    wide = jnp.promote_types(p["x"].dtype, jnp.float32)
    logits = jnp.einsum("gsm,me->gse", p["x"].astype(wide), p["kernel"].astype(wide))
    plan = route(router, logits, capacity=capacity, valid=valid, rng=KEY)
    sent = transport.dispatch(p["x"], plan)
    assert sent.shape == (G, E, capacity, M) and sent.dtype == p["x"].dtype
    done = jnp.tanh(jnp.einsum("gecm,emn->gecn", sent, p["experts"]) + 0.3)
    return transport.combine(done, plan), plan


def loss(
    transport: Transport, router: Router, capacity: int, p: Parameters, valid: Array
) -> tuple[jax.Array, jax.Array]:
    """A fixed random weighting of the output, and the output."""
    y, _ = forward(transport, router, capacity, p, valid)
    return (y * normal(3, G, S, M).astype(y.dtype)).astype(jnp.float32).sum(), y


@functools.cache
def gradients(transport: Transport, router: Router, capacity: int) -> Callable:
    """Returns the jitted ``f(p, valid) -> ((loss, y), gradients)``."""

    def f(p: Parameters, valid: jax.Array):
        of = functools.partial(loss, transport, router, capacity)
        return jax.value_and_grad(of, has_aux=True)(p, valid)

    return jax.jit(f)


def compare_transports(router: Router, capacity: int) -> None:
    for case in CASES:
        p, valid = parameters(case), mask(case)
        (_, expected), expected_gradients = gradients(Einsum(), router, capacity)(p, valid)
        (_, y), got = gradients(Gather(), router, capacity)(p, valid)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6, err_msg=case)
        for name, gradient in expected_gradients.items():
            assert np.abs(gradient).max() > 1e-3, (case, name)
            np.testing.assert_allclose(
                got[name], gradient, rtol=1e-4, atol=1e-5, err_msg=f"{case}: {name}"
            )


@every_router
def test_gather_equals_einsum_in_value_and_every_gradient(router: Router):
    compare_transports(router, TIGHT)


@every_kind
def test_gather_equals_einsum_where_nothing_is_dropped(router: Router):
    compare_transports(router, S)


@every_kind
def test_gather_equals_einsum_in_bfloat16(router: Router):
    # Both round at other places; a step of bfloat16 is 2**-8, and sums have at most E terms of
    # order one.
    p, valid = parameters("padding", "bfloat16"), mask("padding")
    (_, expected), expected_gradients = gradients(Einsum(), router, TIGHT)(p, valid)
    (_, y), got = gradients(Gather(), router, TIGHT)(p, valid)
    assert y.dtype == expected.dtype == jnp.bfloat16
    wide = functools.partial(np.asarray, dtype=np.float32)
    np.testing.assert_allclose(wide(y), wide(expected), rtol=2**-6, atol=2**-7)
    for name, gradient in expected_gradients.items():
        assert got[name].dtype == jnp.bfloat16
        size = np.abs(wide(gradient)).max()
        np.testing.assert_allclose(wide(got[name]), wide(gradient), rtol=0, atol=size * 2**-5)


@every_transport
@every_kind
def test_output_is_the_weighted_sum_of_the_experts(router: Router, transport: Transport):
    # Loops over slots: the token of each slot goes through that slot's expert.
    p, valid = parameters("padding"), mask("padding")
    (_, y), _ = gradients(transport, router, TIGHT)(p, valid)
    plan = jitted_groups(router, TIGHT)(p["x"] @ p["kernel"], valid, KEY)
    expected = np.zeros((G, S, M))
    dispatch = np.asarray(plan.dispatch)
    for (g, s, e, c), gate in np.ndenumerate(np.asarray(plan.combine)):
        if dispatch[g, s, e, c]:
            expected[g, s] += gate * np.tanh(p["x"][g, s] @ p["experts"][e] + 0.3)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@every_transport
@every_router
def test_padding_gets_no_slot_no_output_and_no_gradient(router: Router, transport: Transport):
    p, valid = parameters("padding"), mask("padding")
    (_, y), got = gradients(transport, router, TIGHT)(p, valid)
    assert not np.any(y[~valid]) and not np.any(got["x"][~valid])
    assert np.any(y[valid]) and np.any(got["x"][valid])
    # What padding holds does not matter to anybody.
    other = p | {"x": np.where(valid[..., None], p["x"], 1e3).astype(np.float32)}
    (_, other_y), other_got = gradients(transport, router, TIGHT)(other, valid)
    np.testing.assert_array_equal(y, other_y)
    for name in got:
        np.testing.assert_array_equal(got[name], other_got[name])


@every_transport
@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_an_expert_nobody_chose_has_exactly_zero_gradient(name: str, transport: Transport):
    # With second="none" every token asks for one expert, and the case sends all to expert 0.
    choices = {} if name.startswith("switch") else {"second": "none"}
    router, p = preset(name, **choices), parameters("one expert")
    (_, y), got = gradients(transport, router, TIGHT)(p, mask("plain"))
    assert np.any(got["experts"][0]) and not np.any(got["experts"][1:])
    # Two slots for eight tokens: six get nothing.
    np.testing.assert_array_equal(np.any(np.asarray(y) != 0, axis=-1).sum(1), [TIGHT] * G)


@every_transport
def test_empty_slots_are_zero_rows(transport: Transport):
    # Two tokens and four slots in each of two experts: token 0 prefers expert 1, token 1 expert 0.
    logits = np.array([[[0, 1], [1, 0]]], np.float32)
    plan = jitted_groups(preset("switch"), 2)(logits, np.ones((1, 2), bool))
    sent = transport.dispatch(np.array([[[1, 2], [3, 4]]], np.float32), plan)
    np.testing.assert_array_equal(sent, [[[[3, 4], [0, 0]], [[1, 2], [0, 0]]]])
    # What the experts make of empty slots is not read: gate e / (1 + e) times rows 10 and 30.
    gate = np.e / (1 + np.e)
    done = np.array([[[[10], [99]], [[30], [99]]]], np.float32)
    np.testing.assert_allclose(transport.combine(done, plan), [[[30 * gate], [10 * gate]]])


@every_transport
@pytest.mark.parametrize("name", ["switch", "expert_choice"])
def test_one_expert_is_a_dense_layer(name: str, transport: Transport):
    # The only expert has gate 1 and room for everybody; expert choice shuffles its slots.
    x, w = normal(4, G, S, M), normal(5, M, M)

    def sparse(x: jax.Array, w: jax.Array) -> jax.Array:
        logits = x[..., :1]
        valid = np.ones((G, S), bool)
        plan = route(preset(name), logits, capacity=S, valid=valid)
        y = transport.combine(jnp.tanh(transport.dispatch(x, plan) @ w), plan)
        return (y * normal(6, G, S, M)).sum()

    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return (jnp.tanh(x @ w) * normal(6, G, S, M)).sum()

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (sparse, dense))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["switch", "top2+renormalize", "expert_choice_mtf"])
def test_layer_gradients_equal_finite_differences(name: str):
    # Directional central differences in float64, one direction per parameter. The other
    # transport has the same gradients (above).
    router, valid = ROUTERS[name], mask("padding")
    with jax.enable_x64(True):
        p = parameters("padding", "float64")

        def f(p: Parameters) -> jax.Array:
            return (forward(Gather(), router, TIGHT, p, valid)[0] * normal(3, G, S, M)).sum()

        f, step = jax.jit(f), 1e-5
        gradient = jax.jit(jax.grad(f))(p)
        for seed, key in enumerate(p):
            direction = normal(20 + seed, *p[key].shape).astype(np.float64)
            up, down = (f(p | {key: p[key] + sign * step * direction}) for sign in (1, -1))
            numeric = (up - down) / (2 * step)
            analytic = np.vdot(gradient[key], direction)
            np.testing.assert_allclose(analytic, numeric, rtol=1e-6, err_msg=key)
