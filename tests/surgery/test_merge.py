"""Groups of experts, aligned and merged."""

import dataclasses

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.surgery.api import _merging
from moe_jax.surgery.merge import (
    Merging,
    alignment,
    check_groups,
    cosines,
    groups_of,
    heads_of,
    merge,
    merge_redirected,
)
from moe_jax.surgery.mixture import check_changeable, mixtures, with_mixtures
from tests.surgery.small import assert_close, batch, config, weights

ORDER = np.array([2, 0, 1, 5, 4, 3])


def test_every_expert_joins_the_head_that_is_most_similar():
    usage = np.array([1.0, 9.0, 2.0, 5.0])
    similarity = np.array([[1, 0.2, 0, 0.3], [0.2, 1, 0.8, 0], [0, 0.8, 1, 0.1], [0.3, 0, 0.1, 1]])
    # The heads are the experts 1 and 3. Expert 0 is nearer to 3, expert 2 nearer to 1.
    assert groups_of(usage, similarity, 2).tolist() == [1, 0, 0, 1]
    # Within 0 and 1, and within 2 and 3, every expert joins its neighbour.
    assert groups_of(usage, similarity, 2, neighbours=2).tolist() == [0, 0, 1, 1]
    # The heads are 1 and 3: expert 2 is used less than expert 0 and nearer to 1.
    assert groups_of(np.array([6.0, 9.0, 2.0, 5.0]), similarity, 2, 2).tolist() == [0, 0, 1, 1]


def test_products_become_cosines():
    vectors = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    expected = [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(cosines(vectors @ vectors.T), expected, atol=1e-12)


def shuffled(mixture, index, order):
    """The layer with the hidden units of one expert in another order."""
    axes = {"up": -1, "gate": -1, "down": -2, "up_bias": -1, "gate_bias": -1}
    experts = {}
    for name, array in mixture.experts.items():
        array = np.array(array)
        if name in axes:
            array[index] = np.take(array[index], order, axis=axes[name])
        experts[name] = array
    return dataclasses.replace(mixture, experts=experts)


def test_units_in_another_order_are_found_again():
    mixture = mixtures(weights(config(mlp_bias=True)))[0]
    one, other = (
        {name: array[0] for name, array in m.experts.items()}
        for m in (mixture, shuffled(mixture, 0, ORDER))
    )
    np.testing.assert_array_equal(ORDER[alignment(one, other)], np.arange(6))


def test_an_expert_in_another_order_of_units_merges_into_itself():
    mixture = mixtures(weights(config(mlp_bias=True)))[0].take([0, 0, 1, 2])
    found = merge(
        shuffled(mixture, 1, ORDER), np.array([0, 0, 1, 2]), np.array([3.0, 5.0, 1.0, 1.0])
    )
    # Expert 1 is the head of its group, for its five tokens; its order of the units stays.
    for name, array in shuffled(mixture, 1, ORDER).experts.items():
        np.testing.assert_allclose(found.experts[name], np.asarray(array)[[1, 2, 3]], atol=1e-6)
    np.testing.assert_array_equal(found.router["kernel"], mixture.router["kernel"][:, [1, 2, 3]])
    assert found.num_experts == found.moe.num_experts == 3


def test_the_mean_is_weighted_by_use():
    mixture = mixtures(weights(config()))[0]
    bias = {"down": np.stack([np.full((6, 8), v, np.float32) for v in (1.0, 3.0, 7.0, 7.0)])}
    equal = dataclasses.replace(mixture, experts={**mixture.experts, **bias})
    found = merge(equal, np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 0.0, 0.0]))
    np.testing.assert_allclose(found.experts["down"][0], 1 / 4 + 3 * 3 / 4)
    np.testing.assert_allclose(found.experts["down"][1], 7.0)


def test_a_router_needs_its_k():
    mixture = mixtures(weights(config()))[0]
    with pytest.raises(ConfigError, match="k=2 experts per token, but there are 1 experts"):
        merge(mixture, np.zeros(4, int), np.ones(4))


def same_in_groups(found, group):
    """The model whose experts are equal to the first expert of their group."""
    index = np.array([list(group).index(g) for g in group])
    layers = {
        name: dataclasses.replace(m, experts={n: a[index] for n, a in m.experts.items()})
        for name, m in mixtures(found).items()
    }
    return with_mixtures(found, layers)


@pytest.mark.parametrize("router", ["mixtral", "switch", "deepseek_v3", "phimoe"])
def test_a_model_of_equal_experts_merges_exactly_if_logits_are_redirected(router):
    # Experts of a group are equal, so that one of them computes for all, with the sum of gates.
    group = np.array([0, 1, 1, 0])
    choices = {"groups": 1, "keep_groups": 1, "k": 2} if router == "deepseek_v3" else {}
    model = config(routing.preset(router, **choices), latent_dim=4)
    before = same_in_groups(weights(model), group)
    merged = {name: merge_redirected(m, group, np.ones(4)) for name, m in mixtures(before).items()}
    after = with_mixtures(before, merged)
    assert [layer.moe.num_experts for layer in after.model.sparse_layers()] == [2, 2]
    assert_close(before, after)


def test_a_router_that_reads_logits_reads_those_of_the_heads():
    old = weights(config(routing.preset("moe_plus_plus")))
    groups = {0: np.array([0, 1, 0, 1]), 1: np.array([0, 0, 1, 1])}
    usage = {0: np.array([1.0, 2.0, 3.0, 1.0]), 1: np.array([5.0, 1.0, 0.0, 2.0])}
    assert [heads_of(groups[name], usage[name]) for name in (0, 1)] == [[2, 1], [0, 3]]
    merging = Merging(groups, usage, redirect=False)
    new = merging(old)[0]
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    name = "params/layers/1/feed_forward/router/residual"
    expected = np.asarray(old.arrays[name])[[2, 1, 4, 5, 6, 7]][:, [0, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(new.arrays[name], expected)
    moments = merging.moments("mu", old, old)
    np.testing.assert_array_equal(moments.arrays[name], expected)


def test_merged_experts_with_all_logits_do_not_change_again():
    merged = {
        name: merge_redirected(m, np.array([0, 0, 1, 0]), np.ones(4))
        for name, m in mixtures(weights(config())).items()
    }
    found = with_mixtures(weights(config()), merged)
    with pytest.raises(ConfigError, match="share the logits of their members"):
        check_changeable(found)


@pytest.mark.parametrize(("redirect", "sizes"), [(True, [3, 3]), (False, [2, 2])])
def test_only_experts_whose_logits_follow_them_stay_in_their_groups(redirect, sizes):
    # Three merged experts do not fit two groups of neighbours, but all four logits stay in theirs.
    found = weights(config(routing.preset("deepseek_v3", k=1, groups=2, keep_groups=1)))
    merging = _merging(found, iter([batch()]), sizes[0], False, redirect)
    merged, _ = merging(found)
    assert [m.num_experts for m in mixtures(merged).values()] == sizes
    for across in (False, True):
        check_groups(found, 3, across=across)
    if not redirect:
        assert all({*group[:2]} != {*group[2:]} for group in merging.groups.values())


def test_groups_are_checked_before_the_text_is_read():
    check_groups(weights(config()), 1)
    with pytest.raises(ConfigError, match="keep at least 1 and fewer than it has"):
        check_groups(weights(config()), 4)
    free = config(routing.preset("longcat_flash", k=2))
    with pytest.raises(ConfigError, match="experts=2 in layer 0: redirect adds up the choices"):
        check_groups(weights(free), 2)
