"""Every transport against every preset, and what the transports do by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import Capacity, Router, Softmax, TopK, preset
from moe_jax.transport import Einsum, Gather, Transport
from tests.routing.cases import TRANSPORTS, Case, case, runs
from tests.routing.helpers import S, jitted_groups, normal
from tests.transport.properties import (
    TIGHT,
    TRANSPORT,
    G,
    M,
    compare_transports,
    forward,
    gradients,
    mask,
    parameters,
    planned,
)

# One choice per token, two with renormalised gates, and experts that choose.
RENORMALIZED = Router(Softmax(), TopK(2), capacity=Capacity(renormalize=True))
KINDS = [case("switch"), Case("top2+renormalize", RENORMALIZED), case("expert_choice")]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_transport = pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)


@pytest.mark.parametrize(("title", "name", "transport"), runs(TRANSPORT))
def test_property(title: str, name: str, transport: str):
    TRANSPORT[title].check(case(name), TRANSPORTS[transport])


@every_kind
def test_gather_equals_einsum_where_nothing_is_dropped(kind: Case):
    compare_transports(kind, S)


@every_kind
def test_gather_equals_einsum_in_bfloat16(kind: Case):
    # Both round at other places; a step of bfloat16 is 2**-8, and sums have at most E terms of
    # order one.
    p, valid = parameters(kind, "padding", "bfloat16"), mask("padding")
    (_, (expected, _)), expected_gradients = gradients(Einsum(), kind)(p, valid)
    (_, (y, _)), got = gradients(Gather(), kind)(p, valid)
    assert y.dtype == expected.dtype == jnp.bfloat16
    wide = functools.partial(np.asarray, dtype=np.float32)
    np.testing.assert_allclose(wide(y), wide(expected), rtol=2**-6, atol=2**-7)
    for name, gradient in expected_gradients.items():
        assert got[name].dtype == jnp.bfloat16
        size = np.abs(wide(gradient)).max()
        np.testing.assert_allclose(wide(got[name]), wide(gradient), rtol=0, atol=size * 2**-5)


@pytest.mark.parametrize("part", ["dispatch", "combine"])
def test_gather_refuses_mixtures_by_name(part: str):
    soft = case("soft_moe")
    plan = planned(soft, normal(0, G, S, 4, TIGHT), mask("plain"), TIGHT)
    given = normal(1, G, S, M) if part == "dispatch" else normal(1, G, 4, TIGHT, M)
    with pytest.raises(ConfigError, match="'gather'.*Mixture.*use transport='einsum'"):
        getattr(Gather(), part)(given, plan)


@every_transport
def test_tokens_beyond_the_capacity_get_nothing(transport: Transport):
    # All eight tokens want expert 0, which has two slots: six get nothing, in order.
    kind = case("switch")
    (_, (y, _)), got = gradients(transport, kind)(parameters(kind, "one expert"), mask("plain"))
    np.testing.assert_array_equal(
        np.any(np.asarray(y) != 0, axis=-1), [[True] * 2 + [False] * 6] * G
    )
    assert np.any(got["experts"][0]) and not np.any(got["experts"][1:])


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
def test_unit_weights_leave_the_choice_and_drop_the_gate(transport: Transport):
    # As Llama 4 combines, whose gates scale what goes in: expert outputs 10 and 30 as they are.
    logits = np.array([[[0, 1], [1, 0]]], np.float32)
    plan = jitted_groups(preset("llama4"), 2)(logits, np.ones((1, 2), bool))
    plan = dataclasses.replace(plan, slots=plan.slots.with_unit_weights())
    done = np.array([[[[10], [99]], [[30], [99]]]], np.float32)
    np.testing.assert_array_equal(transport.combine(done, plan), [[[30], [10]]])


@pytest.mark.parametrize(
    "kind", [KINDS[0], KINDS[1], case("expert_choice_mtf")], ids=lambda kind: kind.name
)
def test_layer_gradients_equal_finite_differences(kind: Case):
    # Directional central differences in float64, one direction per parameter. The other
    # transport has the same gradients (above).
    valid = mask("padding")
    with jax.enable_x64(True):
        p = parameters(kind, "padding", "float64")

        def f(p) -> jax.Array:
            return (forward(Gather(), kind, TIGHT, p, valid)[0] * normal(3, G, S, M)).sum()

        f, step = jax.jit(f), 1e-5
        gradient = jax.jit(jax.grad(f))(p)
        for seed, key in enumerate(p):
            direction = normal(20 + seed, *p[key].shape).astype(np.float64)
            up, down = (f(p | {key: p[key] + sign * step * direction}) for sign in (1, -1))
            numeric = (up - down) / (2 * step)
            analytic = np.vdot(gradient[key], direction)
            np.testing.assert_allclose(analytic, numeric, rtol=1e-6, err_msg=key)
