"""Logits of any size: routers in float32 do what they do in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import LoadBalance, Mixture, Sigmoid, SoftSlots, TopK, preset
from moe_jax.routing.head import Cosine, UnitSlots
from moe_jax.routing.select.bias import Biased
from tests.matrix import sample
from tests.routing.cases import KEY, TIGHT, Case, case, names
from tests.routing.helpers import S, compiled, inputs, normal, scored
from tests.routing.properties import draws

Array = np.ndarray
DRAWS = ("normal", "gumbel", "uniform")
SHIFTS = (-25.0, -60.0, -200.0, -9900.0, 9000.0)


def sizes(case: Case) -> Array:
    """Returns ``(N, S, E, P)`` logits on a grid of sixteenths, which both types hold exactly."""
    draw = np.random.default_rng(5)
    shape = (S, case.scored, case.router.planes)
    spread = [np.round(16 * draw.normal(size=shape) * size) / 16 for size in (1, 30, 300, 3000)]
    rows = np.repeat(draw.integers(-10_000, 10_001, shape[:1] + (1,) + shape[2:]), shape[1], 1)
    hot = np.full(shape, -1e4)
    hot[np.arange(S), np.arange(S) % case.scored] = 1e4
    shifted = [3 * spread[0] + shift for shift in SHIFTS]
    found = [*spread, np.zeros(shape), rows, hot, -hot, *shifted]
    return np.clip(np.stack(found), -1e4, 1e4)


def measured(case: Case, logits: Array, dtype: type) -> dict[str, Array]:
    """Returns gates, losses, seats and the gradients of both for each of ``logits``."""
    group = case.of(logits[0], np.arange(S) != 3)
    state = {
        name: jnp.asarray(value, None if name == "experts" else dtype)
        for name, value in case.state(group).items()
    }

    def both(x: jax.Array):
        plan = case.router(
            case.shaped(x),
            capacity=TIGHT,
            valid=group.valid,
            token_ids=group.ids,
            rng=KEY,
            state=state,
        )
        gates = plan.combine.sum(-1)
        task = (gates * normal(11, S, case.experts)).sum()
        if isinstance(plan.slots, Mixture):
            task += (plan.dispatch.sum(-1) * normal(13, S, case.experts)).sum()
        if plan.free is not None:
            task += (plan.free * normal(17, *plan.free.shape)).sum()
        loss = sum(plan.losses.values(), jnp.zeros((), x.dtype))
        return jnp.stack([task, loss]), (gates, loss, plan.dispatch.sum(-1) > 0)

    @compiled
    def each(xs: jax.Array):
        return jax.lax.map(jax.jacrev(both, has_aux=True), xs)

    gradient, (gates, loss, seated) = each(jnp.asarray(logits, dtype))
    found = {"gradient": gradient, "gates": gates, "loss": loss, "seated": seated}
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both types get the noise of float32."""
    for name in DRAWS:
        draw = getattr(jax.random, name)

        def cast(key, shape=(), dtype=jnp.float32, *args, draw=draw, **bounds):
            return draw(key, shape, jnp.float32, *args, **bounds).astype(dtype)

        monkeypatch.setattr(jax.random, name, cast)


def comparable(case: Case, logits: Array) -> Array:
    """Returns where float32 can tell the experts of a token apart: ``(N,)``.

    Noise is rounded away beside logits of thousands, and a score of less than the machine epsilon
    beside a bias. A cap on the experts of a token projects the scores themselves, and a bias ranks
    them: of two scores near 1 float32 cannot tell which is larger, unless all are 1. If free
    experts take most tokens, the whole gradient is as small as ``p (1 - p)`` of few gates near 1,
    which float32 rounds to the machine epsilon.
    """
    largest, least = np.abs(logits).max((1, 2, 3)), logits.min((1, 2, 3))
    capped = getattr(case.router.select, "cap", None) is not None
    if draws(case.router) or capped or case.router.free.count:
        return largest < 20
    ranked = isinstance(getattr(case.router.select, "rank", None), Biased)
    apart = (least > -80) & ((largest < 16) | (least > 40)) | (least <= -9000)
    return apart if ranked else np.ones(len(logits), bool)


@pytest.mark.parametrize("name", sample(names()))
def test_logits_of_any_size_give_what_they_give_in_float64(name: str, same_draws):
    one = case(name)
    logits = sizes(one)
    narrow = measured(one, logits, np.float32)
    assert all(np.isfinite(value).all() for value in narrow.values())
    with jax.enable_x64(True):
        wide = measured(one, logits, np.float64)
    same = comparable(one, logits)
    if not isinstance(one.router.select, SoftSlots):  # A share of a slot may underflow.
        np.testing.assert_array_equal(narrow["seated"][same], wide["seated"][same])
    # Float32 holds a sum of logits of this size to so much.
    error = 1e-5 + 4 * np.finfo(np.float32).eps * np.abs(logits).max((1, 2, 3))
    for what in ("gates", "loss", "gradient"):
        got, wanted = (x[what].reshape(len(logits), -1) for x in (narrow, wide))
        bound = error * np.maximum(np.abs(wanted).max(1), 1e-3)
        off = np.abs(got - wanted).max(1) > bound
        assert not (off & same).any(), (what, np.flatnonzero(off & same))


@pytest.mark.parametrize("shift", [0.0, -20.0, -25.0, -40.0, -60.0, -1000.0])
def test_deepseek_v3_gates_sum_to_the_factor_however_small_its_scores(shift: float):
    router = preset("deepseek_v3", k=2, groups=1, keep_groups=1)
    logits = np.round(normal(3, S, 4) * 16) / 16 + shift
    plan = router(jnp.asarray(logits), capacity=S, state={"bias": jnp.zeros(4)})
    np.testing.assert_allclose(plan.combine.sum((1, 2)), 2.5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -20.0, -60.0, -1000.0])
def test_no_shift_of_all_logits_escapes_the_balance_loss(shift: float):
    # All tokens want expert 0 first: the loss is above 1, its value at an even load, and however
    # far below zero the logits are it is that of their softmax, to which small sigmoids tend.
    row = jnp.array([3.0, 1.0, 0.0, -1.0])
    part = LoadBalance(per_token=True)

    def loss(logits: jax.Array) -> jax.Array:
        given = inputs(logits)
        made = Sigmoid()(given)
        return part(made, TopK(1)(made, given), given)

    value, gradient = jax.value_and_grad(loss)(jnp.tile(row + shift, (S, 1)))
    assert value > 1
    if shift < -15:
        np.testing.assert_allclose(value, 4 * jax.nn.softmax(row)[0], rtol=1e-4)
    assert np.isfinite(gradient).all() and gradient[0, 0] > 0


def test_the_best_experts_are_found_where_all_scores_round_to_the_same():
    for shift in (-300.0, 60.0):
        given = inputs([[0.0 + shift, 2.0 + shift, 1.0 + shift]])
        made = Sigmoid()(given)
        assert len(np.unique(made.scores)) == 1
        choice = TopK(2)(made, given)
        np.testing.assert_array_equal(choice.expert, [[1, 2]])


@pytest.mark.parametrize("size", [1e-25, 1e-8, 1.0, 1e25])
@pytest.mark.parametrize("head", [Cosine(dim=2, unit_tokens=True), UnitSlots()])
def test_unit_vectors_have_norm_one_at_any_size(head, size: float):
    # Along the first axis of the experts the cosine is 1, whatever the size of token and weights.
    eye = size * jnp.eye(2)
    if isinstance(head, UnitSlots):
        parameters = {"slots": eye[..., None], "log_scale": jnp.zeros(())}
    else:
        parameters = {"projection": jnp.eye(2), "embedding": eye}
    run = functools.partial(head.logits, parameters=parameters, experts=2)
    logits = run(jnp.array([[size, 0.0], [0.0, 0.0]])).reshape(2, 2)
    np.testing.assert_allclose(logits, [[1, 0], [0, 0]], atol=1e-6)
    gradient = jax.grad(lambda x: (run(x) ** 2).sum())(jnp.array([[0.0, 0.0]]))
    assert np.isfinite(gradient).all()


def test_the_balance_loss_reads_clean_scores():
    # Noise makes expert 0 the choice of both tokens; without it both scores are 1/2: 2 * 1 * 1/2.
    made = scored([[0.9, 0.1]] * 2, clean=[[0.5, 0.5]] * 2)
    given = inputs(made.noisy)
    choice = TopK(1)(made, given)
    assert float(LoadBalance()(made, choice, given)) == pytest.approx(1)
    assert float(LoadBalance(per_token=True)(made, choice, given)) == pytest.approx(1)
