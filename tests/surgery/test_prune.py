"""Which experts stay."""

import dataclasses

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.moe_config import LayerOverride
from moe_jax.surgery.mixture import mixtures, neighbours_of
from moe_jax.surgery.prune import (
    best,
    best_of_all_layers,
    best_of_layer,
    check_number,
    fewest,
    prune,
)
from tests.surgery.small import config, weights

SCORES = {0: np.array([0.4, 0.1, 0.3, 0.2]), 1: np.array([0.05, 0.9, 0.05, 0.0])}


def test_a_layer_keeps_its_best():
    assert [best_of_layer(of, 2) for of in SCORES.values()] == [[0, 2], [0, 1]]  # of a tie, 0
    assert best_of_layer(SCORES[0], 2, groups=2) == [0, 2]  # 0.4 of 0 and 1, 0.3 of 2 and 3
    assert best_of_layer(SCORES[1], 2, groups=2) == [1, 2]


def test_all_layers_keep_the_best_of_all():
    # Four experts in all: 0.9, 0.4, 0.3 and 0.2. Two in any case: 0.9 and 0.05 in layer 1.
    assert best_of_all_layers(SCORES, 2, {0: 1, 1: 1}) == {0: [0, 2, 3], 1: [1]}
    assert best_of_all_layers(SCORES, 2, {0: 1, 1: 2}) == {0: [0, 2], 1: [0, 1]}
    with pytest.raises(ConfigError, match="keeps 2 experts over 2 layers, but the routers need 4"):
        best_of_all_layers(SCORES, 1, {0: 2, 1: 2})


def test_layers_differ_in_number_if_their_experts_are_compared():
    # Six experts in all, and two per layer for ``k``: then 0.2 and 0.1 of layer 0 before 0.05.
    model = weights(config())
    assert best(SCORES, 3, fewest(model), neighbours_of(model)) == {0: [0, 1, 2, 3], 1: [0, 1]}
    assert best(SCORES, 3, None, neighbours_of(model)) == {0: [0, 2, 3], 1: [0, 1, 2]}


def test_the_kept_experts_keep_their_arrays():
    old = weights(config())
    new = prune(old, {0: [3, 1, 2], 1: [0, 1]})
    assert {name: m.num_experts for name, m in mixtures(new).items()} == {0: 3, 1: 2}
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    down = "params/layers/0/feed_forward/experts/down"
    np.testing.assert_array_equal(new.arrays[down], np.asarray(old.arrays[down])[1:])
    kernel = "params/layers/0/feed_forward/router/kernel"
    np.testing.assert_array_equal(new.arrays[kernel], np.asarray(old.arrays[kernel])[:, 1:])
    assert old.arrays[down].shape[0] == 4


def test_layers_of_different_width_are_compared_and_keep_their_width():
    narrow = (LayerOverride((1,), expert_dim=4),)
    old = weights(config(overrides=narrow, scan_layers=False))
    kept = best(SCORES, 3, fewest(old), neighbours_of(old))
    new = prune(old, kept)
    assert kept == {0: [0, 1, 2, 3], 1: [0, 1]}
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    down = {n: m.experts["down"].shape for n, m in mixtures(new).items()}
    assert down == {0: (4, 6, 8), 1: (2, 4, 8)}


def test_a_router_needs_its_k():
    found = weights(config())
    assert fewest(found) == {0: 2, 1: 2}
    for experts, match in (
        (1, "k=2 experts per token, but there are 1 experts"),
        (4, "experts=4, and layer 0 has 4: keep at least 1 and fewer than it has"),
        (0, "experts=0, and layer 0 has 4"),
    ):
        with pytest.raises(ConfigError, match=match):
            check_number(found, experts)
    with pytest.raises(ConfigError, match="layer 9 has no experts; the MoE layers are 0, 1"):
        prune(found, {9: [0, 1]})


def test_a_router_that_reads_logits_reads_those_that_stay():
    old = weights(config(routing.preset("moe_plus_plus"), num_layers=2))
    new = prune(old, {0: [0, 2, 3], 1: [1, 2, 3]})
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    name = "params/layers/1/feed_forward/router/residual"
    rows, columns = [0, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]  # 4 to 7 compute nothing
    np.testing.assert_array_equal(new.arrays[name], np.asarray(old.arrays[name])[rows][:, columns])


@pytest.mark.parametrize("kept", [{0: [0, 1, 2], 1: [0, 1]}, {0: [0, 1, 2]}])
def test_routers_that_read_logits_need_equally_many_experts(kept):
    old = weights(config(routing.preset("moe_plus_plus"), num_layers=2))
    with pytest.raises(ConfigError, match="keep equally many in all layers"):
        prune(old, kept)
    check_number(old, 3)
    with pytest.raises(ConfigError, match="do not compare them across layers"):
        check_number(old, 3, across=True)


GROUPED = {
    "limit": routing.preset("deepseek_v3", k=1, groups=2, keep_groups=1),
    "groups": routing.Router(
        routing.Softmax(), select=routing.TopGroups(groups=2, k_groups=1, k=1)
    ),
}


@pytest.mark.parametrize("router", GROUPED.values(), ids=GROUPED)
def test_each_group_of_a_restricted_router_keeps_equally_many(router):
    old = weights(config(router))
    assert best(SCORES, 2, None, neighbours_of(old)) == {0: [0, 2], 1: [1, 2]}
    assert mixtures(prune(old, {0: [0, 2], 1: [1, 3]}))[0].num_experts == 2
    with pytest.raises(ConfigError, match="take equally many experts of each group"):
        prune(old, {0: [0, 1]})
    with pytest.raises(ConfigError, match="limit: 1 of 2 groups of 3 experts"):
        check_number(old, 3)
    with pytest.raises(ConfigError, match="2 experts and not 3 .*limit: .*do not compare them"):
        check_number(old, 2, across=True)


@pytest.mark.parametrize(
    "change",
    [
        {"select": routing.TopK(2, limit=routing.Limit(2, 2))},  # a limit that excludes no group
        {"capacity": routing.Capacity(devices=2)},
    ],
)
def test_layers_that_need_multiples_are_not_compared(change):
    old = weights(config(dataclasses.replace(routing.preset("mixtral"), **change)))
    with pytest.raises(ConfigError, match="can have 2 experts and not 3 .*do not compare them"):
        check_number(old, 2, across=True)


def test_a_mean_over_layers_may_be_above_the_number_of_one():
    old = prune(weights(config()), {0: [0, 1], 1: [0, 1, 2, 3]})  # 3 on average
    check_number(old, 2, across=True)
    with pytest.raises(ConfigError, match="experts=2, and layer 0 has 2"):
        check_number(old, 2)
    with pytest.raises(ConfigError, match="experts=3, and a layer has on average 3"):
        check_number(old, 3, across=True)
