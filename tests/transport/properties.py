"""What every transport does with every router's plans."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.grouped import on_choices
from moe_jax.routing import Forced, Plan, route
from moe_jax.transport import Einsum, Gather, Transport, choices_of, in_order_of_experts
from tests.routing.cases import (
    TIGHT,
    TRANSPORTS,
    Case,
    Property,
    case_with_one_expert,
    recorded,
    registered,
)
from tests.routing.helpers import S, compiled, normal

Array = np.ndarray
Parameters = dict[str, jax.Array]
TRANSPORT: dict[str, Property] = {}
each_transport = registered(TRANSPORT, *TRANSPORTS)

G, M = 3, 6
KEY = jax.random.key(0)
IDS = np.random.default_rng(5).integers(0, 64, (G, S)).astype(np.int32)
CASES = ("plain", "padding", "one expert", "empty expert")


def parameters(case: Case, what: str, dtype: str = "float32") -> Parameters:
    """Returns ``x (G, S, M)``, router ``kernel (M, E, P)`` and ``experts (E, M, M)``."""
    x = normal(0, G, S, M)
    kernel = normal(1, M, case.scored, case.router.planes, scale=0.3)
    if what in ("one expert", "empty expert"):
        # The first feature is 1 everywhere, so its row of the kernel adds to an expert's logits.
        x[..., 0] = 1
        kernel[0] = 0
        kernel[0, 0] = 5 if what == "one expert" else -5
    experts = normal(2, case.experts, M, M, scale=0.5)
    return {"x": x.astype(dtype), "kernel": kernel.astype(dtype), "experts": experts.astype(dtype)}


def mask(what: str) -> Array:
    """Returns ``valid (G, S)``: in the case ``padding`` some of a group and all of another."""
    valid = np.ones((G, S), bool)
    if what == "padding":
        valid[1, 5:] = False
        valid[2] = False
    return valid


def planned(case: Case, logits: Array, valid: Array, capacity: int) -> Plan:
    """Routes ``logits (G, S, E, P)`` in training."""
    state = {
        name: jnp.zeros(shape) for name, shape in case.router.state_shapes(case.experts).items()
    }
    forced = isinstance(case.router.select, Forced)
    return route(
        case.router,
        case.shaped(logits),
        capacity=capacity,
        valid=valid,
        token_ids=IDS,
        rng=KEY,
        state=state,
        record=recorded(logits, case.router.select.k) if forced else None,
    )


def forward(
    transport: Transport, case: Case, capacity: int, p: Parameters, valid: Array
) -> tuple[jax.Array, Plan]:
    """A whole layer: router in float32 at least, tanh experts, ``(G, S, M)``."""
    wide = jnp.promote_types(p["x"].dtype, jnp.float32)
    logits = jnp.einsum("gsm,mep->gsep", p["x"].astype(wide), p["kernel"].astype(wide))
    plan = planned(case, logits, valid, capacity)
    sent = transport.dispatch(p["x"], plan)
    assert sent.shape == (G, case.experts, capacity, M) and sent.dtype == p["x"].dtype
    done = jnp.tanh(jnp.einsum("gecm,emn->gecn", sent, p["experts"]) + 0.3)
    return transport.combine(done, plan), plan


@dataclasses.dataclass(frozen=True)
class ShiftedTanh:
    """Experts ``tanh(x kernel + 0.3)`` in two stages."""

    def before(self, linear, x):
        return linear(x, "kernel")

    def after(self, linear, pre, gate):
        return jnp.tanh(pre + 0.3) * gate


def forward_sorted(
    case: Case, capacity: int, p: Parameters, valid: Array
) -> tuple[jax.Array, Plan]:
    """The same, with the choices of all groups sorted by expert."""
    wide = jnp.promote_types(p["x"].dtype, jnp.float32)
    logits = jnp.einsum("gsm,mep->gsep", p["x"].astype(wide), p["kernel"].astype(wide))
    plan = planned(case, logits, valid, capacity)
    gate, choices = choices_of(*in_order_of_experts(plan.slots))
    tokens, parameters = p["x"].reshape(G * S, M), {"kernel": p["experts"]}
    y = on_choices(ShiftedTanh(), parameters, tokens, gate, choices)
    return y.reshape(G, S, M), plan


def gradients(transport: Transport, case: Case, capacity: int = TIGHT) -> Callable:
    """Returns the jitted ``f(p, valid) -> ((loss, (y, plan)), gradients)``."""
    return _gradients(transport, case.executed, capacity)


@functools.cache
def _gradients(transport: Transport, case: Case, capacity: int) -> Callable:
    return _compiled(functools.partial(forward, transport), case, capacity)


@functools.cache
def sorted_gradients(case: Case, capacity: int) -> Callable:
    """The same with the choices sorted by expert."""
    return _compiled(forward_sorted, case, capacity)


def _compiled(forward: Callable, case: Case, capacity: int) -> Callable:

    def loss(p: Parameters, valid: jax.Array):
        y, plan = forward(case, capacity, p, valid)
        return (y * normal(3, G, S, M).astype(y.dtype)).astype(jnp.float32).sum(), (y, plan)

    return compiled(jax.value_and_grad(loss, has_aux=True))


def compare_transports(case: Case, capacity: int) -> None:
    for what in CASES:
        p, valid = parameters(case, what), mask(what)
        (_, (expected, _)), expected_gradients = gradients(Einsum(), case, capacity)(p, valid)
        others = [gradients(Gather(), case, capacity)]
        if not case.router.select.experts_choose:
            others += [sorted_gradients(case.executed, capacity)]
        for other in others:
            (_, (y, _)), got = other(p, valid)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6, err_msg=what)
            for name, gradient in expected_gradients.items():
                assert np.isfinite(gradient).all()
                assert name == "kernel" or np.abs(gradient).max() > 1e-3, (what, name)
                np.testing.assert_allclose(
                    got[name], gradient, rtol=1e-4, atol=1e-5, err_msg=f"{what}: {name}"
                )


@registered(TRANSPORT, "gather")
def gather_equals_einsum(case: Case, transport: Transport) -> None:
    # And so do blocks where tokens choose: in value and in input, router and expert gradients, with
    # empty experts and with all tokens on one expert.
    del transport
    compare_transports(case, TIGHT)


@each_transport
def output_is_the_weighted_sum_of_experts(case: Case, transport: Transport) -> None:
    # Loops over slots: what sits in each slot goes through that slot's expert.
    p, valid = parameters(case, "padding"), mask("padding")
    (_, (y, plan)), _ = gradients(transport, case)(p, valid)
    expected, x = np.zeros((G, S, M)), np.asarray(p["x"])
    dispatch, combine = np.asarray(plan.dispatch), np.asarray(plan.combine)
    for g, e, c in np.ndindex(G, case.experts, TIGHT):
        done = np.tanh((dispatch[g, :, e, c] @ x[g]) @ p["experts"][e] + 0.3)
        expected[g] += combine[g, :, e, c, None] * done
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@each_transport
def padding_is_nowhere(case: Case, transport: Transport) -> None:
    # No slot, no output, no gradient; and what padding holds does not matter to anybody.
    p, valid = parameters(case, "padding"), mask("padding")
    run = gradients(transport, case)
    (_, (y, plan)), got = run(p, valid)
    assert not np.any(np.asarray(plan.dispatch)[~valid])
    assert not np.any(y[~valid]) and not np.any(got["x"][~valid])
    assert np.any(y[valid]) and np.any(got["x"][valid])
    other = p | {"x": np.where(valid[..., None], p["x"], 1e3).astype(np.float32)}
    (_, (other_y, _)), other_got = run(other, valid)
    np.testing.assert_allclose(y, other_y, rtol=1e-5, atol=1e-6)
    for name in got:
        np.testing.assert_allclose(got[name], other_got[name], rtol=1e-5, atol=1e-6)


@each_transport
def an_expert_without_tokens_gets_no_gradient(case: Case, transport: Transport) -> None:
    # Exactly zero: of all tokens one is routed, and it cannot fill all experts.
    p, valid = parameters(case, "plain"), np.zeros((G, S), bool)
    valid[1, 2] = True
    (_, (_, plan)), got = gradients(transport, case)(p, valid)
    busy = np.asarray(plan.dispatch).any((0, 1, 3))
    assert busy.any() and not busy.all()
    np.testing.assert_array_equal(np.any(got["experts"], axis=(1, 2)), busy)


@compiled
def dense_gradients(x: jax.Array, w: jax.Array):
    """Returns the value of a dense layer under fixed random weights, and both gradients."""

    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return (jnp.tanh(x @ w) * normal(6, G, S, M)).sum()

    return jax.value_and_grad(dense, (0, 1))(x, w)


@each_transport
def one_expert_is_dense(case: Case, transport: Transport) -> None:
    # The only expert has gate 1 and room for everybody, whatever the logits; a sigmoid is 1 in
    # float32 from 20 on.
    one = case_with_one_expert(case.name)
    x, w = normal(4, G, S, M), normal(5, M, M)
    got, expected = _sparse_gradients(transport, one.executed)(x, w), dense_gradients(x, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@functools.cache
def _sparse_gradients(transport: Transport, one: Case) -> Callable:
    def sparse(x: jax.Array, w: jax.Array) -> jax.Array:
        logits = jnp.repeat(x[..., :1, None] + 40, one.router.planes, -1)
        plan = planned(one, logits, np.ones((G, S), bool), S)
        y = transport.combine(jnp.tanh(transport.dispatch(x, plan) @ w), plan)
        return (y * normal(6, G, S, M)).sum()

    return compiled(jax.value_and_grad(sparse, (0, 1)))
