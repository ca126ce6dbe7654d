import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, Reading
from moe_jax.nn.mode import EVAL, TRAIN
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing import Capacity, Counts, LoadBalance, Router, Softmax, TopK
from moe_jax.run import session as session_module
from moe_jax.run.session import Session
from moe_jax.training import objective as objective_module
from moe_jax.training import step as step_module
from moe_jax.training.metrics import eval_means, train_record
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, TrainState, from_named_leaves, named_leaves
from moe_jax.training.step import (
    EvalSums,
    Losses,
    Measured,
    Objective,
    eval_step,
    train_step,
)

VOCAB, ROWS, LENGTH = 64, 16, 16
BALANCE, ROUTER_Z, HEAD_Z = 0.1, 0.01, 0.001
ROUTER = routing.presets.switch(balance_weight=BALANCE, z_weight=ROUTER_Z, input_jitter=0.0)
# Valid tokens per row: microbatches of 4 rows have 64, 20, 39 and 0 of them.
LENGTHS = np.array([16, 16, 16, 16, 0, 1, 3, 16, 15, 11, 8, 5, 0, 0, 0, 0])
OBJECTIVE = Objective(z_loss=HEAD_Z)
# Compiling is most of the time; the machine code it makes need not be fast.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model(router=ROUTER, every=1, remat="none", **settings):
    """Two layers; a group is a row."""
    moe = MoEConfig(
        every=every,
        num_experts=8,
        expert_dim=32,
        group_size=LENGTH,
        router=router,
        allow_future_leak=router.experts_choose,
        **settings,
    )
    return DecoderConfig(
        num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32, remat=remat, moe=moe
    )


def batch(lengths=LENGTHS, seed=0):
    """Targets are a function of the inputs; the rows are of one or two segments, then padding."""
    inputs = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH))
    place = np.arange(LENGTH)[None]
    segments = np.where(place < 6, 1, 2) * (place < np.asarray(lengths)[:, None])
    positions = np.where(place < 6, place, place - 6) + 0 * inputs
    arrays = {"inputs": inputs, "targets": (5 * inputs + 1) % VOCAB}
    arrays |= {"segments": segments, "positions": positions}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def recipe(config, mesh=None, optimizer=None):
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1]) if mesh is None else mesh
    return Recipe(config, VOCAB, optimizer or make_optimizer(OptimizerConfig(), 20), 0, mesh)


def made(recipe):
    """Graph and a first state drawn by numpy, which takes no compiling."""
    graph, shapes = recipe.abstract()
    rng = np.random.default_rng(0)

    def draw(name, like):
        if name == "key":
            value = np.asarray(jax.random.key_data(jax.random.key(5)))
        elif name.startswith("params/"):
            value = (1.0 if name.endswith("scale") else 0.0) + 0.2 * rng.normal(size=like.shape)
        else:
            value = np.zeros(like.shape)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    leaves = {name: draw(name, like) for name, like in named_leaves(shapes).items()}
    return graph, from_named_leaves(shapes, leaves)


@functools.cache
def measured(microbatches=1, remat="none", loss_chunk=0):
    """``LENGTHS`` under an objective: gradient, losses, layer reports and choices."""
    _, state = made(recipe(model(remat=remat)))
    return gradient_of(microbatches, remat, loss_chunk)(state, batch())


@functools.cache
def gradient_of(microbatches=1, remat="none", loss_chunk=0):
    graph, _ = recipe(model(remat=remat)).abstract()
    objective = Objective(microbatches, loss_chunk, HEAD_Z)
    return compiled(functools.partial(objective.value_and_gradient, graph))


def close(actual, expected, bound=2e-6):
    """Every leaf differs by at most ``bound`` of its largest entry."""
    found, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (path, leaf), (_, other) in zip(found, wanted, strict=True):
        other = np.asarray(other)
        atol = bound * np.abs(other).max(initial=0.0) + 1e-9
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(leaf), other, rtol=0, atol=atol, err_msg=name)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# ---------------------------------------------------------------- microbatches and objective


@pytest.mark.parametrize(("microbatches", "loss_chunk"), [(2, 4), (4, 0)])
def test_microbatches_have_the_gradient_and_reports_of_the_whole_batch(microbatches, loss_chunk):
    # Groups are rows and the router draws nothing, so the parts route as the whole does. The last
    # 4 rows are padding alone: with 4 microbatches one is empty.
    # The cross-entropy in chunks adds up the same.
    gradient, losses, layers, *_ = measured(microbatches, loss_chunk=loss_chunk)
    wanted_gradient, wanted_losses, wanted_layers, *_ = measured()
    close(gradient, wanted_gradient, 5e-6)
    close(losses, wanted_losses)
    assert len(layers) == len(wanted_layers) == 2
    for layer, wanted in zip(layers, wanted_layers, strict=True):
        close(layer.losses, wanted.losses)
        assert bits(layer.counts) == bits(wanted.counts)
        assert layer.counts.valid == LENGTHS.sum() == 123


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_objective_is_loss_and_weighted_means_of_the_layers_losses(microbatches):
    _, losses, layers, *_ = measured(microbatches, loss_chunk=0)
    nll, head_z = by_hand()
    np.testing.assert_allclose(losses.loss, nll, rtol=1e-5)
    routers = sum(
        BALANCE * float(layer.losses["balance"]) + ROUTER_Z * float(layer.losses["z"])
        for layer in layers
    )
    assert routers > 0.2  # two balance losses of at least about 1, by 0.1
    np.testing.assert_allclose(losses.objective, nll + HEAD_Z * head_z + routers, rtol=1e-5)
    # A balance loss is about 1 whatever the number of microbatches: averaged, not summed.
    for layer in layers:
        assert 0.9 < layer.losses["balance"] < 3


WHOLE = Router(
    score=Softmax(),
    select=TopK(2),
    balance=(LoadBalance(0.5, choices="mean", over="batch"),),
    capacity=Capacity(dropless="always"),
)


@functools.cache
def of_whole_batches(microbatches=1, devices=1, **settings):
    """Gradient, losses and layer reports with fractions of the whole batch."""
    mesh = make_mesh(MeshConfig(devices), jax.devices()[:devices])
    graph, state = made(recipe(model(WHOLE, **settings), mesh))
    with jax.set_mesh(mesh):
        step = compiled(functools.partial(Objective(microbatches).value_and_gradient, graph))
        return jax.device_get(step(state, batch())[:3])


@functools.cache
def of_whole_batches_at_once():
    return of_whole_batches()


@pytest.mark.parametrize(("microbatches", "devices"), [(4, 1), (1, 2), (1, 4), (4, 2), (1, 8)])
def test_fractions_of_the_whole_batch_ignore_microbatches_and_devices(microbatches, devices):
    wanted = of_whole_batches_at_once()
    found = of_whole_batches(microbatches, devices)
    close(found[0], wanted[0], 5e-6)
    close(found[1], wanted[1], 5e-6)
    for layer, other in zip(found[2], wanted[2], strict=True):
        np.testing.assert_allclose(layer.losses["balance"], other.losses["balance"], rtol=1e-5)


def test_fractions_of_the_whole_batch_need_no_even_rows():
    _, _, layers = of_whole_batches_at_once()
    losses = [float(layer.losses["balance"]) for layer in layers]
    assert losses[0] != losses[1]
    rows = dataclasses.replace(WHOLE.balance[0], over="span", span="sequence")
    graph, state = made(recipe(model(dataclasses.replace(WHOLE, balance=(rows,)))))
    step = compiled(functools.partial(Objective().value_and_gradient, graph))
    stricter = step(state, batch())[2]
    for layer, loss in zip(stricter, losses, strict=True):
        assert layer.losses["balance"] > loss


def test_no_state_of_a_batch_is_left_after_a_step():
    config = recipe(model(WHOLE))
    graph, state = made(config)
    step = functools.partial(train_step, graph, config.optimizer, Objective(4))
    after, _ = compiled(step)(state, batch())
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(after.router_state))


@functools.cache
def by_hand():
    """Means over valid tokens of the negative log-likelihood and of the squared log-partition."""
    graph, state = made(recipe(model()))
    whole = batch()
    merged = nnx.merge(graph, state.params, state.router_state)
    hidden, _ = compiled(functools.partial(type(merged).hidden, mode=TRAIN))(
        merged, whole["inputs"], whole["segments"], whole["positions"]
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(merged.embedding.table[...], np.float64).T
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, whole["targets"][..., None], -1)[..., 0]
    valid = np.arange(LENGTH)[None] < LENGTHS[:, None]
    return nll[valid].mean(), (log_z**2)[valid].mean()


def test_recomputing_in_the_backward_pass_counts_no_loss_twice():
    close(measured(remat="full"), measured())


def test_what_stands_in_padding_changes_nothing():
    _, state = made(recipe(model()))
    other, valid = batch(), np.arange(LENGTH)[None] < LENGTHS[:, None]
    noise = batch(seed=1)
    for name in ("inputs", "targets"):
        other[name] = np.where(valid, other[name], noise[name])
        assert (other[name] != batch()[name]).sum() > 100
    assert bits(gradient_of()(state, other)) == bits(measured())


def test_a_batch_of_padding_alone_is_finite():
    _, state = made(recipe(model()))
    gradient, losses, *_ = gradient_of()(state, batch(lengths=np.zeros(ROWS)))
    assert float(losses.objective) == float(losses.loss) == 0.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


# ---------------------------------------------------------------- tokens further ahead


def looking_ahead(microbatches=1, weight=0.3):
    config = dataclasses.replace(model(), lookahead=2)
    graph, state = made(recipe(config))
    objective = Objective(microbatches, z_loss=HEAD_Z, lookahead_weight=weight)
    found = compiled(functools.partial(objective.value_and_gradient, graph))(state, batch())
    return graph, state, found


def test_losses_of_tokens_further_ahead_by_hand():
    graph, state, (_, losses, layers, *_) = looking_ahead()
    _, unweighted, *_ = looking_ahead(weight=0.0)[2]
    whole, merged = batch(), nnx.merge(graph, state.params, state.router_state)
    reading = compiled(functools.partial(type(merged).read, mode=TRAIN))(merged, whole)
    totals, tokens = [], []
    for steps, hidden in enumerate(reading.ahead, start=1):
        logits = np.asarray(merged.logits(hidden), np.float64)
        nll = np.log(np.exp(logits).sum(-1))
        total, number = 0.0, 0
        for row, column in np.ndindex(ROWS, LENGTH - steps):
            one, other = whole["segments"][row, column], whole["segments"][row, column + steps]
            if one and one == other:
                target = whole["targets"][row, column + steps]
                total += nll[row, column] - logits[row, column, target]
                number += 1
        totals.append(total)
        tokens.append(number)
    assert tokens[1] < tokens[0] < 123
    np.testing.assert_allclose(losses.lookahead_loss, np.divide(totals, tokens), rtol=1e-5)
    np.testing.assert_array_equal(losses.lookahead_loss, unweighted.lookahead_loss)
    # The objective divides by all 123 tokens, as the paper does.
    added = losses.objective - unweighted.objective
    np.testing.assert_allclose(added, 0.3 * np.mean(totals) / 123, rtol=1e-4)
    assert len(layers) == 4 and losses.loss > 0


def test_a_single_target_further_ahead_is_its_own_mean():
    # Of two tokens one has a next but one: 1.5 per token is 3 per such target.
    losses = Losses(jnp.float32(1), jnp.array([1.5]), None, jnp.float32(2))
    found = objective_module._per_target(losses, {"segments": jnp.array([[1, 1, 0]])}, jnp.array(2))
    assert found == Losses(losses.loss, 3, None, losses.objective)


def test_microbatches_look_as_far_ahead_as_the_whole_batch():
    (gradient, losses, *_), (wanted_gradient, wanted_losses, *_) = (
        looking_ahead(microbatches)[2] for microbatches in (4, 1)
    )
    close(losses.lookahead_loss, wanted_losses.lookahead_loss)
    close(gradient, wanted_gradient, 5e-6)


def test_microbatches_weigh_each_stack_by_its_own_tokens():
    # Rows of few targets have many inputs and the other way round.
    config = EncoderDecoderConfig(
        encoder_layers=1,
        decoder_layers=1,
        width=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        encoder_moe=model().moe,
        decoder_moe=model().moe,
    )
    graph, state = made(recipe(config))
    around = batch(lengths=LENGTHS[::-1])
    whole = batch() | {
        "encoder_inputs": around["inputs"],
        "encoder_segments": np.minimum(around["segments"], 1),
    }
    whole["segments"] = np.minimum(whole["segments"], 1)
    found = [
        compiled(functools.partial(Objective(parts).value_and_gradient, graph))(state, whole)
        for parts in (1, 4)
    ]
    close(found[1][0], found[0][0], 5e-6)
    close(found[1][1:], found[0][1:])


def test_the_record_names_the_losses_further_ahead():
    config = dataclasses.replace(model(), lookahead=1)
    graph, state = made(recipe(config))
    step = functools.partial(train_step, graph, make_optimizer(OptimizerConfig(), 20), OBJECTIVE)
    _, report = compiled(step)(state, batch())
    found = train_record(1, report, [0, 1, 2], learning_rate=0.1, tokens_per_second=5.0)
    assert len(found["lookahead_loss"]) == 1 and found["lookahead_loss"][0] > 0
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]


# ---------------------------------------------------------------- skipped updates, on a small state


@dataclasses.dataclass(frozen=True)
class Given:
    """An objective whose gradient and value are in the batch."""

    frozen: frozenset = frozenset()

    def settings(self, state):
        return {}

    def frozen_now(self, state):
        return {}

    def value_and_gradient(self, graph, state, batch, teacher):
        gradient = jax.tree.map(lambda _: batch["gradient"], state.params)
        losses = Losses(batch["value"], jnp.zeros(0), None, batch["value"])
        return Measured(gradient, losses, (), ())


def small(optimizer=None):
    params = nnx.State({"w": nnx.Param(jnp.array([1.0, -2.0, 3.0]), axes=("embed",))})
    router = nnx.State({"bias": nnx.Variable(jnp.array([0.5, -0.0]))})
    optimizer = optimizer or make_optimizer(OptimizerConfig(), 20)
    zero = jnp.int32(0)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(zero, params, router, optimizer.init(params), key, zero, zero)
    step = functools.partial(train_step, None, optimizer, Given())
    return state, jax.jit(lambda state, **batch: step(state, batch))


GOOD = {"gradient": jnp.array([1.0, 2.0, 2.0]), "value": jnp.float32(1.0)}
NAN, INF = jnp.float32(jnp.nan), jnp.float32(jnp.inf)
BAD = {
    "loss nan": GOOD | {"value": NAN},
    "loss inf": GOOD | {"value": -INF},
    "gradient nan": GOOD | {"gradient": jnp.array([1.0, NAN, 2.0])},
    "gradient inf": GOOD | {"gradient": jnp.array([INF, 2.0, 2.0])},
    # Each entry is finite, the norm is not: clipping by it would make the update zero.
    "norm inf": GOOD | {"gradient": jnp.array([3e38, 3e38, 0.0])},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_changes_no_parameter_and_no_statistic(bad):
    state, step = small()
    state, report = step(state, **GOOD)  # so that the statistics are not zeros
    assert bool(report.updated)
    after, report = step(state, **BAD[bad])
    for name in ("params", "opt_state", "router_state", "key"):
        assert bits(getattr(after, name)) == bits(getattr(state, name)), name
    assert not bool(report.updated)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)


def statistics_of(value):
    """An optimizer whose updates are zeros and whose one statistic is ``value``."""

    def update(updates, state, params):
        del state, params
        return jax.tree.map(jnp.zeros_like, updates), jnp.float32(value)

    return optax.GradientTransformation(lambda params: jnp.float32(0), update)


# Loss and gradient are finite in all of them.
FAULTY = {
    "rate nan": optax.scale(math.nan),
    "rate inf": optax.scale(math.inf),
    "clip nan": optax.chain(optax.clip_by_global_norm(math.nan), optax.scale(-1.0)),
    "statistic nan": statistics_of(math.nan),
    "statistic inf": statistics_of(math.inf),
    # 3 - 3e38 * 2 is finite, and then it is not.
    "sum inf": optax.scale(-1.5e38),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_an_update_that_makes_the_state_non_finite_is_skipped(fault):
    state, step = small(FAULTY[fault])
    for _ in range(1 + (fault == "sum inf")):
        before = state
        state, report = step(state, **GOOD)
    assert np.isfinite(report.losses.loss) and np.isfinite(report.grad_norm)
    assert not bool(report.updated)
    for name in ("params", "opt_state", "router_state"):
        assert bits(getattr(state, name)) == bits(getattr(before, name)), name
    assert (int(state.skipped), int(state.skipped_in_row)) == (1, 1)


def test_a_router_state_that_would_not_be_finite_skips_the_update(monkeypatch):
    def next_state(graph, state, layers):
        return jax.tree.map(lambda x: x * jnp.nan, state.router_state)

    monkeypatch.setattr(step_module, "_next_router_state", next_state)
    state, step = small()
    after, report = step(state, **GOOD)
    assert not bool(report.updated)
    for name in ("params", "opt_state", "router_state"):
        assert bits(getattr(after, name)) == bits(getattr(state, name)), name


def test_skips_are_counted_and_a_good_step_ends_the_row():
    state, step = small()
    seen = []
    for given in (GOOD, BAD["loss nan"], BAD["gradient inf"], GOOD, BAD["norm inf"], GOOD):
        before = state
        state, report = step(state, **given)
        assert (int(report.skipped), int(report.skipped_in_row)) == (
            int(state.skipped),
            int(state.skipped_in_row),
        )
        seen.append((bool(report.updated), int(state.skipped), int(state.skipped_in_row)))
        assert bool(report.updated) == (bits(before.params) != bits(state.params))
    assert seen == [
        (True, 0, 0),
        (False, 1, 1),
        (False, 2, 2),
        (True, 2, 0),
        (False, 3, 1),
        (True, 3, 0),
    ]
    assert int(state.step) == 6
    # The optimizer counts updates, not batches: its schedule waits while steps are skipped.
    assert int(named_leaves(state)["opt_state/3/count"]) == 3


def test_the_norm_reported_is_the_one_before_clipping():
    state, step = small()
    _, report = step(state, **(GOOD | {"gradient": jnp.array([20.0, 40.0, 40.0])}))
    assert float(report.grad_norm) == 60.0


# ---------------------------------------------------------------- keys


@functools.cache
def random_choices():
    """Choices of a router that draws them, ``(layers, B, L, K)``, of three steps.

    The optimizer changes nothing, the batch is the same, and the third step repeats the second.
    """
    graph, state = made(recipe(model(routing.preset("random")), optimizer=optax.set_to_zero()))
    objective = Objective(microbatches=2, record=True)
    step = compiled(functools.partial(train_step, graph, optax.set_to_zero(), objective))
    whole = batch(lengths=np.full(ROWS, LENGTH))
    second, first = step(state, whole)
    reports = [first, step(second, whole)[1], step(second, whole)[1]]
    return [np.stack(report.choices) for report in reports]


def test_two_steps_draw_by_two_keys_and_a_repeated_step_by_the_same():
    first, second, repeated = random_choices()
    # Of 8 experts each, so one in eight agrees by chance.
    assert 0.7 < (first != second).mean() < 0.97
    np.testing.assert_array_equal(repeated, second)


def test_every_microbatch_and_every_layer_draws_by_a_key_of_its_own():
    found = random_choices()[0]
    half = ROWS // 2
    assert 0.7 < (found[:, :half] != found[:, half:]).mean() < 0.97
    assert 0.7 < (found[0] != found[1]).mean() < 0.97


# ---------------------------------------------------------------- evaluation by hand


class Same(nnx.Module):
    """A head whose logits are the hidden states."""

    def logits(self, hidden):
        return hidden


class Parrot(nnx.Module):
    """A model that says the logits of its batch."""

    def __init__(self):
        self.embedding = Same()

    def read(self, batch, *, mode):
        assert mode == EVAL
        return Reading(batch["logits"], ())


def test_padding_is_in_no_sum_of_an_evaluation():
    # Probabilities 3/4 1/4 and 1/4 3/4: right, wrong, and right twice in padding.
    three = math.log(3)
    given = {
        "logits": jnp.array([[[three, 0.0], [0.0, three], [0.0, three], [three, 0.0]]]),
        "targets": jnp.array([[0, 0, 1, 0]]),
        "segments": jnp.array([[1, 2, 0, 0]]),
        "bytes": jnp.array([[3, 5, 7, 9]]),
    }
    graph, params, rest = nnx.split(Parrot(), nnx.Param, ...)
    sums = eval_step(graph, 0, params, rest, given)
    assert (int(sums.correct), int(sums.tokens), int(sums.bytes)) == (1, 2, 8)
    np.testing.assert_allclose(sums.nll, math.log(4 / 3) + math.log(4), rtol=1e-6)


def test_only_predicted_tokens_count():
    # Probabilities 3/4, 1/4 and 3/4 of the targets; the model predicts the second token alone.
    three = math.log(3)
    given = {
        "logits": jnp.array([[[three, 0.0], [0.0, three], [three, 0.0]]]),
        "targets": jnp.array([[0, 0, 0]]),
        "segments": jnp.array([[1, 1, 1]]),
        "bytes": jnp.array([[3, 5, 7]]),
        "predicted": jnp.array([[0, 1, 0]]),
    }
    graph, params, rest = nnx.split(Parrot(), nnx.Param, ...)
    sums = eval_step(graph, 0, params, rest, given)
    assert (int(sums.correct), int(sums.tokens), int(sums.bytes)) == (0, 1, 5)
    np.testing.assert_allclose(sums.nll, math.log(4), rtol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_gradient_is_of_the_predicted_tokens(microbatches):
    # A batch whose tokens are all predicted has the gradient of a batch without masks. Rows of
    # equal length, predicted one at a time, have gradients whose mean is this gradient.
    config = dataclasses.replace(model(every=0), causal=False)
    whole = batch(lengths=(LENGTH,) * ROWS)
    graph, state = made(recipe(config))
    objective = Objective(microbatches=microbatches)

    @jax.jit
    def step_on(given):
        gradient, losses, *_ = objective.value_and_gradient(graph, state, given)
        return losses.loss, gradient

    def step(predicted=None):
        return step_on(whole if predicted is None else whole | {"predicted": predicted})

    every, of_all = step(), step(np.ones_like(whole["inputs"]))
    for one, other in zip(jax.tree.leaves(every), jax.tree.leaves(of_all), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
    rows = [
        step(np.eye(ROWS, dtype=np.int32)[[row]].T * np.ones_like(whole["inputs"]))
        for row in range(ROWS)
    ]
    np.testing.assert_allclose(np.mean([loss for loss, _ in rows]), every[0], rtol=1e-5)
    mean = jax.tree.map(lambda *parts: sum(parts) / ROWS, *(gradient for _, gradient in rows))
    for one, other in zip(jax.tree.leaves(mean), jax.tree.leaves(every[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- the session's compiled steps


@pytest.fixture(scope="module")
def session():
    experiment = Experiment("tiny", model=model(every=2), training=TrainingConfig(steps=20))
    made_by = recipe(experiment.model)
    graph, abstract = made_by.abstract()
    return Session(experiment, made_by.mesh, None, made_by.optimizer, made_by, graph, abstract)


def test_the_same_state_and_batch_make_the_same_bits_and_the_state_is_donated(session):
    runs = []
    for _ in range(2):
        _, state = made(session.recipe)
        for seed in range(3):
            given = state
            state, report = session.train_step(given, session.place(batch(seed=seed)))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.key)))
        runs.append(bits((state, report)))
    assert runs[0] == runs[1]


def test_a_model_with_an_infinite_parameter_is_left_alone_and_recovers(session):
    _, state = made(session.recipe)
    whole = session.place(batch())
    state, _ = session.train_step(state, whole)

    def put(leaves):
        shardings = jax.tree.map(lambda x: x.sharding, session.abstract)
        return jax.device_put(from_named_leaves(session.abstract, leaves), shardings)

    good = {name: np.array(leaf) for name, leaf in named_leaves(state).items()}
    broken = good | {"params/final_norm/scale": np.full(16, np.inf, "f")}
    after, report = session.train_step(put(broken), whole)
    for name, leaf in named_leaves(after).items():
        counted = {"step": 2, "skipped": 1, "skipped_in_row": 1}
        np.testing.assert_array_equal(leaf, counted.get(name, broken[name]), err_msg=name)
    assert not bool(report.updated)
    assert not np.isfinite(report.grad_norm)
    mended = named_leaves(after) | {"params/final_norm/scale": good["params/final_norm/scale"]}
    after, report = session.train_step(put(mended), whole)
    assert bool(report.updated)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (3, 1, 0)


def test_evaluation_in_batches_is_that_of_one_large_batch(session, monkeypatch):
    _, state = made(session.recipe)
    whole = batch() | {"bytes": np.full((ROWS, LENGTH), 3, np.int32)}
    parts = [{name: x[i : i + 4] for name, x in whole.items()} for i in range(0, ROWS, 4)]
    records = []
    for batches in ([whole], parts):
        monkeypatch.setattr(session_module.data, "eval_batches", lambda *_, b=batches, **__: b)
        records.append(session.evaluate(state))
    one, several = records
    for name in ("loss", "bits_per_byte", "accuracy", "dropped_fraction"):
        np.testing.assert_allclose(several[name], one[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(several["layers"][0]["load"], one["layers"][0]["load"], rtol=1e-9)
    assert [layer["layer"] for layer in one["layers"]] == [1]
    # Three bytes a token.
    np.testing.assert_allclose(one["bits_per_byte"], one["loss"] / np.log(2) / 3, rtol=1e-6)
    sums = session.eval_step(state.params, state.router_state, session.place(whole))
    assert (int(sums.tokens), int(sums.bytes)) == (123, 369)
    assert float(sums.layers[0].valid) == 123


def test_an_evaluation_by_hand():
    counts = Counts(
        demand=np.array([5.0, 3.0]),
        load=np.array([3.0, 1.0]),
        unrouted=np.float64(4),
        valid=np.float64(8),
    )
    # 16 bits of surprise over 8 tokens that stand for 32 bytes.
    sums = EvalSums(16 * math.log(2), np.float64(2), np.float64(8), np.float64(32), (counts,))
    record = eval_means(sums, (1,))
    (layer,) = record.pop("layers")
    assert record == {
        "loss": pytest.approx(2 * math.log(2)),
        "bits_per_byte": pytest.approx(0.5),
        "accuracy": 0.25,
        "dropped_fraction": 0.5,
    }
    # Evenness is of what was asked for: 5/8 and 3/8.
    entropy = -(0.625 * math.log2(0.625) + 0.375 * math.log2(0.375))
    assert layer == {
        "layer": 1,
        "dropped_fraction": 0.5,
        "unrouted_fraction": 0.5,
        "load": [0.75, 0.25],
        "demand": [0.625, 0.375],
        "load_entropy": pytest.approx(entropy),
        "max_mean_load": 1.25,
        "max_violation": 0.25,
    }
