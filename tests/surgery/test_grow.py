"""More experts and wider experts that compute the same function at first."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.routing import Capacity, Router, Sigmoid, Softmax, TopK
from moe_jax.surgery.grow import copied, perturbed, split, widened, with_copies
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.mixture import mixtures, with_mixtures
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.transplant import weight_shapes
from tests.surgery.small import VOCAB, assert_close, config, logits, weights

KEY = jax.random.key(5)
SIGMOID = Router(Sigmoid(), TopK(2, rank=routing.Bias()), capacity=Capacity(dropless="always"))
SOFTMAX = Router(Softmax(), TopK(2, rank=routing.Bias()), capacity=Capacity(dropless="always"))
FULL = Router(Softmax(), TopK(2), capacity=Capacity(factor=0.5, eval_factor=0.5, minimum=1))
ONE = Router(Softmax(), TopK(1, normalize=True), capacity=Capacity(dropless="always"))
GROUPS = dataclasses.replace(
    SIGMOID, select=TopK(2, normalize=True, limit=routing.Limit(2, 1, "max"))
)
ALL_GROUPS = {  # a limit that keeps all groups limits nothing
    "one_group": routing.preset("deepseek_v3", k=2, groups=1, keep_groups=1),
    "two_groups": routing.preset("deepseek_v3", k=2, groups=2, keep_groups=2),
}
EVERY = routing.preset("jacobs_1991")


def grown(model, change):
    """The old weights, the new ones, and the reason for which they differ."""
    old = weights(model)
    found = {name: change(mixture) for name, mixture in mixtures(old).items()}
    new = with_mixtures(old, {name: one.mixture for name, one in found.items()})
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    return old, new, found[0].reason


def shape_of(model):
    """The first MoE layer of a model of zeros."""
    shapes = weight_shapes(model, VOCAB).leaves
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    return mixtures(LayerWeights.of_leaves(model, VOCAB, zeros))[0]


CHANGES = {
    "copied": lambda mixture: copied(mixture, 2),
    "split": lambda mixture: split(mixture, 3),
    "widened": lambda mixture: widened(mixture, 9, KEY),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "router",
    [routing.preset("mixtral"), SIGMOID, SOFTMAX, GROUPS, EVERY],
    ids=["mixtral", "sigmoid", "softmax", "groups", "everyone"],
)
def test_the_function_is_kept(router, change):
    old, new, reason = grown(config(router, mlp_bias=True), CHANGES[change])
    assert reason == ""
    assert_close(old, new)


@pytest.mark.parametrize("change", ["copied", "split"])
@pytest.mark.parametrize("groups", ALL_GROUPS)
def test_a_limit_that_keeps_all_groups_makes_no_difference(groups, change):
    router = ALL_GROUPS[groups]
    assert router.select.limit.by == "top2"
    old, new, reason = grown(config(router), CHANGES[change])
    assert reason == ""
    assert_close(old, new)


def test_copies_have_the_slots_of_their_expert():
    # Half of an even share: tokens are dropped, and the same ones with copies.
    old, new, reason = grown(config(FULL), CHANGES["copied"])
    assert reason == "" and np.abs(logits(old) - logits(old, "eval")).max() > 1e-3
    assert_close(old, new, "eval")


ONE_GROUP = dataclasses.replace(
    ONE, select=TopK(1, normalize=True, limit=routing.Limit(1, 1, "top2"))
)


@pytest.mark.parametrize("router", [EVERY, ONE, ONE_GROUP], ids=["everyone", "one", "one_group"])
def test_copies_of_single_experts_keep_the_function(router):
    old, new, reason = grown(config(router), lambda mixture: with_copies(mixture, [2, 0]))
    assert reason == "" and new.model.moe.num_experts == 6
    assert_close(old, new)


def test_copies_stay_in_their_group():
    mixture = mixtures(weights(config(GROUPS)))[0]
    kernel = np.asarray(mixture.router["kernel"])
    grown = with_copies(mixture, [3, 1]).mixture
    np.testing.assert_array_equal(grown.router["kernel"], kernel[:, [0, 1, 1, 2, 3, 3]])
    with pytest.raises(ConfigError, match="take equally many experts of each group"):
        with_copies(mixture, [0, 1])


def test_copies_of_single_experts_of_two_choices_say_that_they_change_them():
    old, new, reason = grown(config(), lambda mixture: with_copies(mixture, [1]))
    assert reason == "a copy takes the place of another choice, or its gate"
    assert np.abs(logits(old) - logits(new)).max() > 1e-3


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (routing.preset("deepseek_v3", k=2, groups=2, keep_groups=1), "two best experts"),
        (dataclasses.replace(ONE, gate_on="in"), "gates multiply the inputs"),
        (routing.preset("no_token_left_behind"), "one slot"),
        (dataclasses.replace(FULL, capacity=Capacity(devices=2)), "may drop one copy alone"),
        (routing.preset("sinkhorn"), "Sinkhorn ranks copies"),
    ],
)
def test_routers_that_copies_change_say_why(router, reason):
    assert reason in copied(shape_of(config(router)), 2).reason


def test_noise_parts_copies():
    mixture = copied(mixtures(weights(config()))[0], 2).mixture
    np.testing.assert_array_equal(mixture.experts["up"][0], mixture.experts["up"][1])
    noisy = perturbed(mixture, 0.1, KEY)
    for before, after in (
        (mixture.experts["up"], noisy.experts["up"]),
        (mixture.router["kernel"], noisy.router["kernel"]),
    ):
        change = np.asarray(after - before)
        assert 0.07 < change.std() / np.std(before) < 0.13
    assert (np.asarray(noisy.experts["up"][0]) != np.asarray(noisy.experts["up"][1])).all()


def test_new_units_have_no_output():
    mixture = mixtures(weights(config(mlp_bias=True)))[0]
    experts = widened(mixture, 9, KEY).mixture.experts
    assert experts["down"].shape == (4, 9, 8) and not np.asarray(experts["down"][:, 6:]).any()
    assert np.asarray(experts["up"][:, :, 6:]).std() > 0 and not experts["up_bias"][..., 6:].any()


@pytest.mark.parametrize(
    ("router", "change", "match"),
    [
        (None, lambda m: copied(m, 1), "factor=1 adds no expert"),
        (None, lambda m: split(m, 4), "factor=4 does not divide expert_dim=6"),
        (None, lambda m: widened(m, 6, KEY), "hidden=6 is not above expert_dim=6"),
        (None, lambda m: with_copies(m, [4]), "list experts from 0 to 3, each once"),
        (None, lambda m: with_copies(m, []), "list experts from 0 to 3, each once"),
        (GROUPS, lambda m: with_copies(m, [1]), "groups"),
        (
            dataclasses.replace(FULL, capacity=Capacity(devices=2)),
            lambda m: with_copies(m, [1]),
            "capacity.devices=2 does not divide 5 experts",
        ),
        (routing.preset("gshard"), lambda m: copied(m, 2), "only with TopK and Everyone"),
    ],
)
def test_bad_growth_is_one_line(router, change, match):
    with pytest.raises(ConfigError, match=match) as error:
        change(shape_of(config(router)))
    assert "\n" not in str(error.value)


def test_experts_whose_logits_the_next_router_reads_are_widened_and_not_added():
    old = weights(config(routing.preset("moe_plus_plus")))
    with pytest.raises(ConfigError, match="reads the logits of the MoE layer before"):
        Growth(copies=2)(old)
    new, difference = Growth(hidden=8)(old)
    assert not difference
    assert_close(old, new)
