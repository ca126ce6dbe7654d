"""Models as arrays by layer, and layers whose experts are taken."""

import dataclasses

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.moe_config import LayerOverride
from moe_jax.surgery.mixture import (
    check_changeable,
    mixtures,
    over_layers,
    with_logits_before,
    with_mixtures,
)
from moe_jax.surgery.weights import LayerWeights
from tests.surgery.small import MOE, assert_close, config, weights


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_is_the_same_after_it_was_taken_apart(scan):
    found = weights(config(scan_layers=scan))
    assert {name: a.shape for name, a in found.arrays.items()} == found.shapes
    again = dataclasses.replace(found, model=config(scan_layers=not scan))
    back = LayerWeights.of_model(again.module())
    assert back.arrays.keys() == found.arrays.keys()
    assert all(np.array_equal(back.arrays[name], array) for name, array in found.arrays.items())
    assert_close(found, again)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "xmoe", "noisy_top_k", "zaya"])
def test_the_order_of_experts_changes_nothing(name):
    # A permutation moves each expert with its logit, its bias and its state.
    choices = {"groups": 1, "keep_groups": 1, "k": 2} if name == "deepseek_v3" else {}
    found = weights(config(routing.preset(name, **choices)))
    order = [2, 0, 3, 1]
    moved = {name: mixture.take(order) for name, mixture in mixtures(found).items()}
    assert_close(found, with_mixtures(found, moved))


def test_routers_read_the_logits_of_the_experts_that_moved():
    # Each layer has an order of its own, and its router reads the logits in the order before it.
    found = weights(config(routing.preset("moe_plus_plus"), num_layers=3))
    orders = {0: [2, 0, 3, 1], 1: [3, 2, 1, 0], 2: [1, 0, 2, 3]}
    moved = {name: mixture.take(orders[name]) for name, mixture in mixtures(found).items()}
    assert_close(found, with_mixtures(found, with_logits_before(found, moved, orders)))
    names = "params/layers/{}/feed_forward/router/residual"
    before = np.asarray(found.arrays[names.format(1)])
    after = with_mixtures(found, with_logits_before(found, moved, orders)).arrays
    # Four experts, then free ones: a copy, a zero and two constants.
    rows, columns = [2, 0, 3, 1, 4, 5, 6, 7], [3, 2, 1, 0, 4, 5, 6, 7]
    np.testing.assert_array_equal(after[names.format(1)], before[rows][:, columns])


def test_layers_may_differ():
    found = weights(config(num_layers=4))
    layers = mixtures(found)
    new = with_mixtures(found, {1: layers[1].take([0, 2, 3]), 2: layers[2].take([3, 1, 0])})
    assert {i: m.num_experts for i, m in mixtures(new).items()} == {0: 4, 1: 3, 2: 3, 3: 4}
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    up = "params/layers/2/feed_forward/experts/up"
    np.testing.assert_array_equal(new.arrays[up], np.asarray(found.arrays[up])[[3, 1, 0]])


def test_overrides_hold_what_differs_from_most_layers():
    other = dataclasses.replace(MOE, num_experts=2, expert_dim=5)
    found = over_layers(MOE, {0: MOE, 1: other, 2: MOE})
    assert found.overrides == (LayerOverride((1,), None, 2, 5),)
    assert found.at(1) == dataclasses.replace(other, every=1)
    assert over_layers(MOE, {0: other, 1: other}) == other


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (config(every=0), "has no experts: upcycle it first"),
        (config(routing.preset("hash")), "chooses without reading the tokens"),
        (config(expert_dims=(4, 6)), "experts of several widths"),
        (config(lookahead=1), "looks ahead"),
    ],
)
def test_models_whose_experts_cannot_change(model, match):
    with pytest.raises(ConfigError, match=match):
        check_changeable(weights(model))


def test_a_layer_without_experts_is_named():
    found = weights(config(every=2))
    with pytest.raises(ConfigError, match="layer 0 has no experts; the MoE layers are 1"):
        with_mixtures(found, {0: mixtures(found)[1]})


def test_a_group_keeps_its_primary_logit_if_experts_leave_it():
    # Shazeer 2017, appendix B: the second plane has the primary logits, a mean over a group.
    head = routing.Linear(bias=True)
    router = routing.Router(routing.TwoLevelSoftmax(groups=2), routing.TopK(1), head=head)
    mixture = mixtures(weights(config(router)))[0]
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)

    def primaries(layer):
        logits = layer.moe.router.head.logits(x, layer.router, layer.num_experts)
        return logits[..., 1].reshape(5, 2, -1).mean(-1)

    fewer = mixture.take([1, 3])
    np.testing.assert_allclose(primaries(fewer), primaries(mixture), rtol=1e-5)
    more = mixture.take([0, 0, 1, 2, 3, 3])
    np.testing.assert_allclose(primaries(more), primaries(mixture), rtol=1e-5)
    with pytest.raises(ConfigError, match="take equally many experts of each group"):
        mixture.take([0, 1])
