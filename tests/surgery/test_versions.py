"""Hashes, changes and exchange of single experts."""

import hashlib

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.surgery.compared import layers_with_experts
from moe_jax.surgery.mixture import mixtures, with_arrays
from moe_jax.surgery.source import OpenedModel
from moe_jax.surgery.versions import (
    check_same_experts,
    digest,
    network_of,
    on_host,
    relative_change,
    router_of,
    with_experts_of,
)
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.transplant import weight_shapes
from tests.surgery.small import VOCAB, config, weights

BIASED = config(routing.preset("loss_free", k=2))
MIXED = config(expert_dims=(4, 6), expert_dim=6)


def layers_of(model, seed=0):
    return mixtures(weights(model, seed))


def test_a_hash_is_of_names_shapes_and_little_endian_float32():
    array = np.array([[1.0, 2.0]])
    expected = hashlib.sha256(b"up(1, 2)" + array.astype("<f4").tobytes()).hexdigest()[:16]
    assert digest({"up": array}) == expected
    assert digest({"up": array.T}) != expected != digest({"down": array})
    # Every value of a bfloat16 array is a float32 value, so both types have one hash.
    assert digest({"up": array.astype("bfloat16")}) == expected


def test_a_change_is_relative_to_the_norm_before():
    # Norm before: 5 of (3, 4). Change: (0, 1).
    before, after = {"a": np.array([3.0]), "b": np.array([4.0])}, {"a": [3.0], "b": [5.0]}
    assert relative_change(before, after) == pytest.approx(0.2)
    assert relative_change(before, before) == 0
    assert relative_change({"a": np.zeros(2)}, {"a": np.ones(2)}) == float("inf")


@pytest.mark.parametrize("model", [BIASED, MIXED], ids=["biased", "mixed"])
def test_an_expert_is_its_rows_and_its_part_of_the_router(model):
    mixture = on_host(layers_of(model)[0])
    kernel, names = mixture.router["kernel"], ("up", "gate", "down")
    for expert in range(4):
        network, router = network_of(mixture, expert), router_of(mixture, expert)
        np.testing.assert_array_equal(router["router/kernel"], kernel[:, expert])
        if model is BIASED:
            assert network.keys() == set(names)
            np.testing.assert_array_equal(network["up"], mixture.experts["up"][expert])
            assert router["state/bias"] == mixture.state["bias"][expert]
        else:  # experts 0 and 1 have the first width
            group, row = divmod(expert, 2)
            assert network.keys() == {f"groups/{group}/{name}" for name in names}
            stack = mixture.experts[f"groups/{group}/up"]
            np.testing.assert_array_equal(network[f"groups/{group}/up"], stack[row])
    assert len({digest(network_of(mixture, expert)) for expert in range(4)}) == 4


@pytest.mark.parametrize("model", [BIASED, MIXED], ids=["biased", "mixed"])
@pytest.mark.parametrize("router", [True, False])
def test_taken_experts_are_the_donors_and_all_else_stays(model, router):
    here, donor = layers_of(model)[1], layers_of(model, 1)[1]
    taken = with_experts_of(here, donor, [1, 2], router=router)
    for expert in range(4):
        source = donor if expert in (1, 2) else here
        assert relative_change(network_of(source, expert), network_of(taken, expert)) == 0
        source = source if router else here
        assert relative_change(router_of(source, expert), router_of(taken, expert)) == 0
    found = weights(model)
    changed = with_arrays(found, {1: taken})
    assert changed.model == found.model
    again = mixtures(changed)
    assert digest(network_of(again[1], 2)) == digest(network_of(donor, 2))
    assert digest(network_of(again[0], 2)) == digest(network_of(mixtures(found)[0], 2))


def test_other_shapes_are_refused_by_name():
    here = layers_of(BIASED)
    wider = layers_of(config(BIASED.moe.router, expert_dim=9))
    message = r"runs/b has other experts: layer 0 experts/down is \(4, 9, 8\) there and \(4, 6, 8\)"
    with pytest.raises(ConfigError, match=message):
        check_same_experts(here, wider, "runs/b")
    with pytest.raises(ConfigError, match=r"layer 1 .* absent there"):
        check_same_experts(here, {0: here[0]}, "runs/b")
    with pytest.raises(ConfigError, match="no experts: upcycle it"):
        check_same_experts({}, here, "runs/b")


def test_modules_that_look_ahead_are_left_out(tmp_path):
    # Layer 2 is the module behind the two layers of the model.
    model = config(lookahead=1, scan_layers=False)
    found = LayerWeights.of_leaves(model, VOCAB, weight_shapes(model, VOCAB).leaves)
    assert list(mixtures(found)) == [0, 1, 2]
    opened = OpenedModel(tmp_path, found, None, "", {})
    assert list(layers_with_experts(opened, tmp_path)) == [0, 1]
