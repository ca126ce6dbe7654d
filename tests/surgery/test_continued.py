"""The state of a changed run, array by array, from a state whose every number is drawn."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.loading import experiment_of
from moe_jax.config.optimizer import AdamW, OptimizerConfig
from moe_jax.errors import ConfigError
from moe_jax.models.places import places
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing import Capacity, Everyone, Router, Softmax
from moe_jax.surgery.continued import _whole, check_going_on, follow, trees_of
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.merge import Merging, alignment
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.prune import Pruning
from moe_jax.surgery.versions import Taking
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, named_leaves
from tests.surgery.small import VOCAB, assert_close, config, weights
from tests.system import tiny

ADAM, AVERAGE = "opt_state/1/0/", "opt_state/4/average/"
FROZEN_ROUTER = {
    "setting": "frozen/router",
    "steps": (1, 2),
    "values": (1.0, 0.0),
    "shape": "steps",
}


def first(model):
    """Zeros in the shapes of a run's first state, which has an average of the parameters."""
    optimizer = make_optimizer(OptimizerConfig(rule=AdamW(), ema_decay=0.9), steps=10)
    mesh = make_mesh(MeshConfig())
    abstract = Recipe(model, VOCAB, optimizer, 0, mesh).abstract()[1]
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in named_leaves(abstract).items()}


def drawn(leaves, seed=0):
    """Other numbers of the same shapes; every count is 5."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(x.shape), x.dtype) if x.shape else jnp.full_like(x, 5)
        for name, x in leaves.items()
        if name != "key"
    } | {"key": leaves["key"] + 1}


def changed(change, edit=lambda state, model: {}, **changes):
    """The old state, the state that follows, the first state of the changed run, and both models.

    ``edit`` returns arrays that replace drawn ones.
    """
    model = config(**changes)
    old = drawn(first(model))
    old |= edit(old, model)
    weights = LayerWeights.of_leaves(model, VOCAB, old)
    new = change(weights)[0].model
    fresh = first(new)
    return old, follow(old, fresh, weights, change), fresh, (model, new)


def layer(leaves, model, prefix, name):
    """One array of one layer under a prefix of the state."""
    place = places(model)[f"params/layers/{name}"]
    leaf = np.asarray(leaves[prefix + place.leaf.removeprefix("params/")])
    return leaf if place.entry is None else leaf[place.entry]


def of_copies(up, down, kernel):
    return up.repeat(2, 0), down.repeat(2, 0), kernel.repeat(2, 1)


def of_parts(up, down, kernel):
    """6 hidden units in two parts: the units 0 to 2 of expert 0, then its units 3 to 5."""
    halves = [half for e in range(4) for half in (up[e][:, :3], up[e][:, 3:])]
    lower = [half for e in range(4) for half in (down[e][:3], down[e][3:])]
    return np.stack(halves), np.stack(lower), kernel.repeat(2, 1)


def of_units(up, down, kernel):
    zeros = np.zeros((4, 8, 2))
    return np.concatenate([up, zeros], 2), np.concatenate([down, zeros.swapaxes(1, 2)], 1), kernel


def of_two(up, down, kernel):
    chosen = [0, 1, 2, 3, 0, 3]
    return up[chosen], down[chosen], kernel[:, chosen]


def of_kept(up, down, kernel):
    return up[[0, 2, 3]], down[[0, 2, 3]], kernel[:, [0, 2, 3]]


# Layer 0 stays, so the layers of the changed model are not stacked in one scan.
WAYS = {
    "copies": (Growth(copies=2, layers=(1,)), of_copies),
    "parts": (Growth(parts=2, noise=0.1, layers=(1,)), of_parts),
    "hidden": (Growth(hidden=8, layers=(1,)), of_units),
    "copy": (Growth(copy=(0, 3), layers=(1,)), of_two),
    "pruned": (Pruning({1: [3, 0, 2]}), of_kept),
}
NAMES = ("feed_forward/experts/up", "feed_forward/experts/down", "feed_forward/router/kernel")


@pytest.mark.parametrize("way", WAYS)
def test_moments_go_with_their_experts_and_counts_go_on(way):
    change, expected = WAYS[way]
    old, new, fresh, (before, after) = changed(change, scan_layers=True)
    assert {n: x.shape for n, x in new.items()} == {n: x.shape for n, x in fresh.items()}
    for moment in ("mu/", "nu/"):
        for name in NAMES:
            stays = [
                layer(s, m, ADAM + moment, f"0/{name}") for s, m in ((old, before), (new, after))
            ]
            np.testing.assert_array_equal(*stays)
        wanted = expected(*(layer(old, before, ADAM + moment, f"1/{name}") for name in NAMES))
        for name, array in zip(NAMES, wanted, strict=True):
            np.testing.assert_array_equal(layer(new, after, ADAM + moment, f"1/{name}"), array)
        table = ADAM + moment + "embedding/table"
        np.testing.assert_array_equal(new[table], old[table])
    assert {int(new[n]) for n in new if not new[n].shape} == {5}
    np.testing.assert_array_equal(new["key"], old["key"])


# Experts 0 and 2 are one, with three tokens and one; expert 1 is the head of a group of its own.
MERGING = {
    "groups": {1: np.array([0, 1, 0, 2])},
    "usage": {1: np.array([3.0, 5.0, 1.0, 4.0])},
}


def twins(state, model):
    """Expert 2 of layer 1 is expert 0 with its units in the reverse order."""
    found = {}
    for name, axis in (("up", -1), ("gate", -1), ("down", -2)):
        place = places(model)[f"params/layers/1/feed_forward/experts/{name}"]
        array = state[place.leaf][place.entry]
        array = array.at[2].set(jnp.flip(array[0], axis))
        found[place.leaf] = state[place.leaf].at[place.entry].set(array)
    return found


@pytest.mark.parametrize("redirect", [False, True])
def test_moments_of_merged_experts_are_means_by_use_in_the_order_of_the_units(redirect):
    old, new, fresh, (before, after) = changed(
        Merging(**MERGING, redirect=redirect), twins, scan_layers=True
    )
    assert {n: x.shape for n, x in new.items()} == {n: x.shape for n, x in fresh.items()}
    for moment in ("mu/", "nu/"):
        up, down, kernel = (layer(old, before, ADAM + moment, f"1/{name}") for name in NAMES)
        wanted = (
            np.stack([0.75 * up[0] + 0.25 * up[2][:, ::-1], up[1], up[3]]),
            np.stack([0.75 * down[0] + 0.25 * down[2][::-1], down[1], down[3]]),
            kernel if redirect else kernel[:, [0, 1, 3]],
        )
        for name, array in zip(NAMES, wanted, strict=True):
            found = layer(new, after, ADAM + moment, f"1/{name}")
            np.testing.assert_allclose(found, array, atol=1e-6)
            stays = [
                layer(s, m, ADAM + moment, f"0/{name}") for s, m in ((old, before), (new, after))
            ]
            np.testing.assert_array_equal(*stays)
    assert {int(new[n]) for n in new if not new[n].shape} == {5}


def taking(model, router=False):
    """Expert 1 of layer 1 of another run, and the state of that run."""
    theirs = drawn(first(model), seed=1)
    donors = trees_of(LayerWeights.of_leaves(model, VOCAB, theirs), theirs)
    return Taking(donors, [1], [1], router, "runs/other"), theirs


@pytest.mark.parametrize("router", [False, True])
def test_taken_experts_bring_their_parameters_moments_and_average(router):
    change, theirs = taking(config(scan_layers=True), router)
    old, new, _, (before, after) = changed(change, scan_layers=True)
    for tree in ("params/", ADAM + "mu/", ADAM + "nu/", AVERAGE):
        for name in NAMES:
            here, there = (layer(s, before, tree, f"1/{name}") for s in (old, theirs))
            wanted = here.copy()
            if "kernel" not in name:
                wanted[1] = there[1]
            elif router:
                wanted[:, 1] = there[:, 1]
            np.testing.assert_array_equal(layer(new, after, tree, f"1/{name}"), wanted)
            stays = [layer(s, before, tree, f"0/{name}") for s in (old, new)]
            np.testing.assert_array_equal(*stays)
    table = ADAM + "mu/embedding/table"
    np.testing.assert_array_equal(new[table], old[table])
    assert {int(new[n]) for n in new if not new[n].shape} == {5}


def test_a_run_of_another_optimizer_gives_no_moments():
    change, _ = taking(config())
    donors = {name: tree for name, tree in change.donors.items() if not name.endswith("nu")}
    with pytest.raises(ConfigError, match="runs/other has other moments .*/nu.: use --optimizer"):
        changed(dataclasses.replace(change, donors=donors))


def test_the_average_of_the_parameters_computes_its_function():
    old, new, _, models = changed(Growth(copies=2))

    def average(leaves, model):
        own = {"params/" + n.removeprefix(AVERAGE): x for n, x in leaves.items() if AVERAGE in n}
        return LayerWeights.of_leaves(model, VOCAB, leaves | own)

    assert_close(*(average(s, m) for s, m in zip((old, new), models, strict=True)))


def test_a_merged_average_has_the_order_of_units_of_the_parameters():
    # The units of expert 1 of the average lie elsewhere than those of the parameters, so that the
    # average alone would match other pairs.
    groups, used = {0: np.array([0, 0, 1, 2]), 1: np.arange(4)}, np.array([2.0, 1.0, 1.0, 1.0])
    change = Merging(groups, {0: used, 1: used}, redirect=False)
    own, other = weights(config()), weights(config(), 1)
    found = mixtures(change.average("opt_state/4/average", other, own))[0].experts
    before = mixtures(own)[0].experts
    one, two = ({n: np.asarray(a)[i] for n, a in before.items()} for i in (0, 1))
    order = alignment(one, two)
    average = {name: np.asarray(array) for name, array in mixtures(other)[0].experts.items()}
    up = (2 * average["up"][0] + average["up"][1][:, order]) / 3
    np.testing.assert_allclose(found["up"][0], up, rtol=1e-6)


def test_a_part_of_the_optimizer_starts_anew_as_a_whole():
    """A factored moment of 4 experts does not fit 8 experts, and its count begins again with it."""
    shapes = {"opt_state/1/count": (), "opt_state/1/row/a": (3,), "opt_state/1/row/experts": (4,)}
    others = {"opt_state/3/count": (), "step": (), "params/a": (3,)}
    old = {name: np.full(shape, 5.0) for name, shape in {**shapes, **others}.items()}
    first = {name: np.zeros(array.shape) for name, array in old.items()}
    first["opt_state/1/row/experts"] = np.zeros(8)
    found = _whole({"params/a": np.ones(3), "step": old["step"]}, old, first)
    assert {name: float(array.max()) for name, array in found.items()} == {
        "opt_state/3/count": 5,
        "step": 5,
        "params/a": 1,
    }


def test_a_bias_that_the_growth_adds_has_no_moments_yet():
    everyone = Router(Softmax(), Everyone(), capacity=Capacity(dropless="always"))
    _, new, _, (_, after) = changed(Growth(copy=(0,)), router=everyone)
    bias = layer(new, after, ADAM + "mu/", "0/feed_forward/router/bias")
    np.testing.assert_array_equal(bias, np.zeros(5))


@pytest.mark.parametrize(
    ("settings", "overrides", "match"),
    [
        ({}, {"optimizer.frozen": ("router",)}, r"optimizer\.frozen gives the optimizer"),
        ({"optimizer.ema_decay": 0.9}, {"optimizer.ema_decay": 0.0}, r"optimizer\.ema_decay gives"),
        ({}, {"optimizer.frozen_experts": 1}, r"optimizer\.frozen_experts gives"),
        ({}, {"optimizer.rule": {"type": "SGD"}}, r"optimizer\.rule\S* gives"),
        ({}, {"training.schedules": (FROZEN_ROUTER,)}, r"training\.schedules gives"),
        ({}, {"data.batch_size": 16}, "keeps its data"),
    ],
)
def test_a_run_that_goes_on_keeps_its_data_and_the_arrays_of_its_optimizer(
    settings, overrides, match
):
    before = experiment_of(tiny.get_config(), settings)
    with pytest.raises(ConfigError, match=match):
        check_going_on(before, experiment_of(before, overrides))


def test_a_run_that_goes_on_may_have_other_rates_and_other_numbers_of_frozen_experts():
    before = experiment_of(tiny.get_config(), {"optimizer.frozen_experts": 1})
    rates = {"optimizer.learning_rate": 0.5, "optimizer.clip_norm": 2.0, "training.steps": 9}
    check_going_on(before, experiment_of(before, rates | {"optimizer.frozen_experts": 2}))
