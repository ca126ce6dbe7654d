"""Frozen parameters keep their bits, have no optimizer state, and count in no norm."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of, experiment_of_texts
from moe_jax.config.optimizer import SGD, Adafactor, AdamW, Lion, Muon, OptimizerConfig
from moe_jax.config.schedules import Constant
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.average import averaged_names, with_average
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.frozen import trained_only
from moe_jax.training.optimizer import make_optimizer, optimizer_of
from moe_jax.training.state import Recipe, named_leaves
from moe_jax.training.step import Objective, train_step
from tests.matrix import sample

ROUTER = routing.preset("loss_free", k=2)
MOE = MoEConfig(every=1, num_experts=8, expert_dim=8, group_size=8, router=ROUTER)
MODEL = DecoderConfig(num_layers=1, width=8, num_heads=2, head_dim=4, moe=MOE, scan_layers=False)
FROZEN = ("router", "embedding", "layers/0/norms")
LAYER = "params/layers/parts/0/0"
NAMES = {
    "params/embedding/table",
    f"{LAYER}/attention_norm/scale",
    f"{LAYER}/feed_forward_norm/scale",
    f"{LAYER}/feed_forward/router/kernel",
    "router_state/layers/parts/0/0/feed_forward/router/state/bias",
}


def experiment(frozen=FROZEN, **optimizer):
    settings = {"warmup_steps": 0, "learning_rate": 0.1} | optimizer
    return Experiment("tiny", MODEL, optimizer=OptimizerConfig(frozen=frozen, **settings))


def recipe(config, sizes=(2, 4)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    return Recipe(MODEL, 16, optimizer_of(config), 0, mesh)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, 4, (2, 8, 8)).astype(np.int32)
    ones = np.ones((8, 8), np.int32)
    positions = np.arange(8, dtype=np.int32) * ones
    return {"inputs": inputs, "targets": targets, "segments": ones, "positions": positions}


def values(state):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


@functools.cache
def stepped(frozen, steps=2):
    """The states and the reports of steps on eight devices, and the compiled step."""
    config = experiment(frozen)
    made = recipe(config)
    graph, state = made.create()
    step = functools.partial(train_step, graph, made.optimizer, Objective.of(config))
    step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
    states, reports = [state], []
    with jax.set_mesh(made.mesh):
        for number in range(steps):
            state, report = step(states[-1], batch(number))
            states.append(state)
            reports.append(report)
    return states, reports, step


def test_frozen_arrays_keep_their_bits_and_all_others_move():
    assert experiment().frozen_leaves == NAMES
    (before, *_, after), _, _ = stepped(FROZEN)
    first, last = values(before), values(after)
    weights = [name for name in first if name.startswith(("params/", "router_state/"))]
    moved = {name for name in weights if first[name].tobytes() != last[name].tobytes()}
    assert moved == set(weights) - NAMES
    assert len(after.params["embedding"]["table"][...].sharding.device_set) == 8


def test_the_state_of_the_optimizer_shrinks_by_two_moments_of_each_frozen_array():
    shapes = {frozen: recipe(experiment(frozen)).abstract()[1] for frozen in (FROZEN, ())}
    bytes_ = {
        frozen: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))
        for frozen, state in shapes.items()
    }
    leaves = named_leaves(shapes[FROZEN])
    frozen = sum(4 * leaves[name].size for name in NAMES if name.startswith("params/"))
    assert bytes_[()] - bytes_[FROZEN] == 2 * frozen
    names = [name for name in leaves if name.startswith("opt_state/")]
    assert not [n for n in names for f in NAMES if n.endswith(f.removeprefix("params/"))]


def test_the_norm_of_the_gradient_is_that_of_the_trained_parameters():
    # The first gradients are equal. With everything trained, the first moment is a tenth of the
    # gradient, after its division by a norm above 1.
    _, (report, *_), _ = stepped(FROZEN)
    (_, other, _), (all_trained, *_), _ = stepped(())
    norm, start = float(all_trained.grad_norm), "opt_state/1/0/mu/"
    squares = {
        name.replace(start, "params/"): float(((10 * np.float64(moment)) ** 2).sum())
        for name, moment in values(other).items()
        if name.startswith(start)
    }
    squares = {name: value * max(norm, 1.0) ** 2 for name, value in squares.items()}
    assert math.sqrt(sum(squares.values())) == pytest.approx(norm, rel=1e-5)
    trained = sum(value for name, value in squares.items() if name not in NAMES)
    assert float(report.grad_norm) == pytest.approx(math.sqrt(trained), rel=1e-5)
    assert float(report.grad_norm) < 0.99 * norm


def test_a_resumed_run_goes_on_exactly(tmp_path):
    (_, middle, last), _, step = stepped(FROZEN)
    made = recipe(experiment())
    like = made.abstract()[1]
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, middle, {})
        found = checkpoints.restore(like)
    with jax.set_mesh(made.mesh):
        again, _ = step(found[1], batch(1))
    assert {n: v.tobytes() for n, v in values(again).items()} == {
        n: v.tobytes() for n, v in values(last).items()
    }


# ---------------------------------------------------------------- the optimizer alone

AXES = {"a": ("embed", "mlp"), "b": ("embed", "mlp")}


def weights(**arrays):
    return nnx.State(
        {name: nnx.Param(np.asarray(x, np.float32), axes=AXES[name]) for name, x in arrays.items()}
    )


def test_a_frozen_gradient_does_not_count_in_clipping_and_nothing_decays():
    # The trained gradient (3, 4) has the norm 5 and is clipped to 1; at the rate 1, weight decay
    # takes half of the weight too: 1 - 0.6 - 0.5 and 1 - 0.8 - 0.5.
    config = OptimizerConfig(
        SGD(0.0, weight_decay=0.5), Constant(), learning_rate=1.0, warmup_steps=0, clip_norm=1.0
    )
    optimizer = trained_only(make_optimizer(config, 10), {"params/b"})
    params = weights(a=[[1, 1]], b=[[1, 1]])
    gradient = weights(a=[[3, 4]], b=[[1000, 1000]])
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["a"][...], [[-0.1, -0.3]], rtol=1e-5)
    np.testing.assert_array_equal(after["b"][...], [[1, 1]])


RULES = [AdamW(), Adafactor(factored_from=2), Lion(), Muon(), SGD()]


@pytest.mark.parametrize("rule", sample(RULES, part=3))
def test_each_rule_trains_as_if_the_frozen_parameters_did_not_exist(rule):
    config = OptimizerConfig(rule, learning_rate=0.1, warmup_steps=0)
    optimizer = trained_only(make_optimizer(config, 10), {"params/b"})
    plain = make_optimizer(config, 10)
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    both, alone = weights(a=a, b=b), weights(a=a)
    updates, state = optimizer.update(weights(a=b, b=a), optimizer.init(both), both)
    expected, other = plain.update(weights(a=b), plain.init(alone), alone)
    np.testing.assert_array_equal(updates["a"][...], expected["a"][...])
    assert not np.any(updates["b"][...])
    size = [sum(x.size for x in jax.tree.leaves(one)) for one in (state, other)]
    assert size[0] == size[1]


def test_an_average_has_no_copy_of_frozen_arrays_and_evaluation_reads_them():
    config = experiment(ema_decay=0.5)
    state = recipe(config, (1, 1)).create()[1]
    names = averaged_names(named_leaves(state))
    table, query = "params/embedding/table", f"{LAYER}/attention/query"
    assert names[table] == table and names[query].startswith("opt_state/")
    assert jax.tree.structure(with_average(state)) == jax.tree.structure(state)
    read = values(with_average(state))
    assert all((read[name] == value).all() for name, value in values(state).items())


# ---------------------------------------------------------------- settings


def test_the_setting_is_checked_with_the_model():
    with pytest.raises(ConfigError, match=r"optimizer.frozen has no group 'expert'; did you mean"):
        experiment_of("quickstart", {"optimizer.frozen": ("expert",)})
    every = ("embedding", "norms", "layers")
    with pytest.raises(ConfigError, match="optimizer.frozen names all parameters"):
        experiment_of("quickstart", {"optimizer.frozen": every})
    found = experiment_of("quickstart", {"optimizer.frozen": ("layers/1/router",)})
    assert found.frozen_leaves == {"params/layers/parts/1/0/feed_forward/router/kernel"}


@pytest.mark.parametrize("text", ["router,layers/1/norms", "('router', 'layers/1/norms')"])
def test_a_command_line_separates_groups_by_commas(text):
    found, _ = experiment_of_texts("quickstart", {"optimizer.frozen": text})
    assert found.optimizer.frozen == ("router", "layers/1/norms")


def test_dense_models_and_encoder_decoders_have_their_own_groups():
    dense = dataclasses.replace(MODEL, moe=MoEConfig(every=0))
    one = dataclasses.replace(experiment(("attention",)), model=dense)
    assert len(one.frozen_leaves) == 4
    with pytest.raises(ConfigError, match="no group 'router'"):
        _ = dataclasses.replace(experiment(), model=dense).frozen_leaves


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_the_first_experts_stay_and_the_others_follow_their_gradient(average):
    # Weight decay and the average of the parameters would move frozen experts.
    config = experiment((), frozen_experts=3, ema_decay=average)
    made = recipe(config, (1,))
    graph, state = made.create()
    before = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    step = jax.jit(functools.partial(train_step, graph, made.optimizer, Objective.of(config)))
    state, report = step(state, batch())
    after = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    averages = averaged_names(named_leaves(state)) if average else {}
    experts = [n for n in after if "/experts/" in n and n.startswith("params/")]
    for name in experts:
        np.testing.assert_array_equal(after[name][:3], before[name][:3])
        assert (after[name][3:] != before[name][3:]).any()
        if average:
            held = after[averages[name]][:3]
            np.testing.assert_allclose(held, before[name][:3], rtol=1e-6)
    whole = jax.jit(Objective().value_and_gradient, static_argnums=0)
    gradient = named_leaves(whole(graph, made.create()[1], batch()).gradient)
    squares = {name: np.square(np.asarray(leaf)) for name, leaf in gradient.items()}
    fixed = sum(leaf[:3].sum() for name, leaf in squares.items() if "/experts/" in name)
    norm = np.sqrt(sum(leaf.sum() for leaf in squares.values()) - fixed)
    np.testing.assert_allclose(report.grad_norm, norm, rtol=1e-5)


def test_frozen_experts_that_leave_none_are_one_line():
    with pytest.raises(ConfigError, match="frozen_experts=8 freezes all 8 experts of layer 0"):
        experiment((), frozen_experts=8).check_settings()
    dense = dataclasses.replace(MODEL, moe=MoEConfig(every=0))
    with pytest.raises(ConfigError, match="no layer has experts"):
        dataclasses.replace(experiment((), frozen_experts=1), model=dense).check_settings()
