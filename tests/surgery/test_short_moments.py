"""Moments shorter than their parameters: factored second moments and the use of experts."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config.expert_rates import ExpertRates
from moe_jax.config.optimizer import Adafactor, OptimizerConfig
from moe_jax.models.places import places
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.surgery.continued import follow
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.merge import Merging
from moe_jax.surgery.prune import Pruning
from moe_jax.surgery.short_moments import shortened, written_out
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, named_leaves
from tests.surgery.small import VOCAB, config
from tests.surgery.test_continued import drawn

FACTORED, USE = "opt_state/1/0/", "opt_state/3/tokens/"
UP, DOWN = "feed_forward/experts/up", "feed_forward/experts/down"


def first(model):
    """Zeros in the shapes of a run with factored moments and rates by use."""
    rule, rates = Adafactor(factored_from=4), ExpertRates(0.5)
    optimizer = make_optimizer(OptimizerConfig(rule=rule, expert_rates=rates), steps=10)
    abstract = Recipe(model, VOCAB, optimizer, 0, make_mesh(MeshConfig())).abstract()[1]
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in named_leaves(abstract).items()}


def moments_of(squares):
    """Optax's factored moments of one step whose squared gradients are ``squares``."""
    rule = optax.scale_by_factored_rms(min_dim_size_to_factor=4, epsilon=0.0)
    state = rule.init({"a": jnp.zeros(squares.shape)})
    _, state = rule.update({"a": jnp.sqrt(squares)}, state, {"a": jnp.zeros(squares.shape)})
    return state.v_row["a"], state.v_col["a"]


def rank_one(shape, seed):
    """Positive numbers that the means of rows and columns determine."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[:-1] + (1,), shape[:-2] + (1, shape[-1])
    return jnp.asarray(rng.uniform(1, 2, rows) * rng.uniform(1, 2, columns), jnp.float32)


@pytest.mark.parametrize("shape", [(13, 8), (8, 13), (3, 6, 8), (3, 8, 6), (8, 3, 6), (8, 6, 5)])
def test_factored_moments_are_written_out_as_optax_reads_them(shape):
    axes = np.sort(np.argsort(shape)[-2:])
    others = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    squares = rank_one((*others, *(shape[axis] for axis in axes)), 0)
    squares = jnp.moveaxis(squares, (-2, -1), axes)
    rows, columns = moments_of(squares)
    leaves = {"params/a": jnp.zeros(shape), "o/v_row/a": rows, "o/v_col/a": columns}
    leaves["o/v/a"] = jnp.zeros(1)
    whole = written_out(leaves)
    np.testing.assert_allclose(whole["o/v/a"], squares, rtol=1e-5)
    again = shortened({**whole, "o/v/a": whole["o/v/a"] * 2}, leaves, leaves)
    assert again["o/v/a"].shape == (1,)
    for name in ("o/v_row/a", "o/v_col/a"):
        np.testing.assert_allclose(again[name], 2 * leaves[name], rtol=1e-5)
    stays = shortened(whole, leaves, leaves)
    assert stays["o/v_row/a"] is rows and stays["o/v_col/a"] is columns


def state(model):
    """A drawn state whose factored moments and uses are positive; squares by parameter."""
    found, squares = drawn(first(model)), {}
    for seed, name in enumerate(n for n in found if n.startswith(FACTORED + "v_row/")):
        param = name.removeprefix(FACTORED + "v_row/")
        if found[FACTORED + "v/" + param].shape == (1,):
            squares[param] = rank_one(found["params/" + param].shape, seed)
            found[name], found[FACTORED + "v_col/" + param] = moments_of(squares[param])
    for name in found:
        if name.startswith(USE):
            found[name] = jnp.arange(1.0, 1 + found[name].size).reshape(found[name].shape)
    return found, squares


def changed(change):
    """The state that follows, the old squares of layer 1, and the models."""
    model = config(scan_layers=True)
    old, squares = state(model)
    weights = LayerWeights.of_leaves(model, VOCAB, old)
    new = change(weights)[0].model
    fresh = first(new)
    found = follow(old, fresh, weights, change)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in fresh.items()}
    assert {int(found[n]) for n in found if not found[n].shape} == {5}
    return found, squares, model, new


def of_layer(leaves, model, name, prefix=""):
    place = places(model)[f"params/layers/1/{name}"]
    leaf = np.asarray(leaves[prefix + place.leaf.removeprefix("params/")])
    return leaf if place.entry is None else leaf[place.entry]


def use_of_layer(leaves, model):
    place = places(model)[f"params/layers/1/{UP}"]
    leaf = place.leaf.removeprefix("params/").removesuffix("/experts/up")
    array = np.asarray(leaves[USE + leaf])
    return array if place.entry is None else array[place.entry]


def check(found, model, wanted, use):
    for name, squares in wanted.items():
        rows, columns = moments_of(jnp.asarray(squares))
        for part, expected in (("v_row/", rows), ("v_col/", columns)):
            array = of_layer(found, model, name, FACTORED + part)
            np.testing.assert_allclose(array, expected, rtol=1e-5)
    np.testing.assert_allclose(use_of_layer(found, model), use)


def test_kept_experts_keep_their_factored_moments_and_their_use():
    found, squares, before, after = changed(Pruning({0: [0, 1], 1: [3, 0]}))
    wanted = {name: of_layer(squares, before, name)[[0, 3]] for name in (UP, DOWN)}
    check(found, after, wanted, [5, 8])


def test_copied_experts_copy_their_factored_moments_and_their_use():
    found, squares, before, after = changed(Growth(copies=2))
    wanted = {name: of_layer(squares, before, name).repeat(2, 0) for name in (UP, DOWN)}
    check(found, after, wanted, [5, 5, 6, 6, 7, 7, 8, 8])


def test_new_hidden_units_start_with_the_mean_of_the_others():
    found, squares, before, after = changed(Growth(hidden=8))
    # Up has the shape (E, M, F) = (4, 8, 8), and the units are its last axis. One of the two parts
    # has a mean for each unit, and the other has one for each of the M inputs.
    mean = of_layer(squares, before, UP).mean((1, 2))
    parts = [of_layer(found, after, UP, FACTORED + part) for part in ("v_row/", "v_col/")]
    units = min(parts, key=lambda part: np.abs(part[:, 6:] - mean[:, None]).max())
    np.testing.assert_allclose(units[:, 6:], np.stack([mean, mean], 1), rtol=1e-5)
    np.testing.assert_allclose(use_of_layer(found, after), [5, 6, 7, 8])


def test_merged_experts_have_means_by_use():
    merging = Merging(
        groups={0: np.array([0, 1, 2, 3]), 1: np.array([0, 1, 0, 2])},
        usage={0: np.ones(4), 1: np.array([3.0, 5.0, 1.0, 4.0])},
        redirect=False,
    )
    found, _, _, after = changed(merging)
    np.testing.assert_allclose(use_of_layer(found, after), [0.75 * 5 + 0.25 * 7, 6, 8])
