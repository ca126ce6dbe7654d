"""Networks that are added up, projected, gated and widened, beside their outputs in numpy."""

import jax
import numpy as np
import pytest

from moe_jax.surgery.networks import added, gated, projected, scaled, side_by_side, widened

X = np.random.default_rng(7).normal(size=(5, 2)).astype(np.float32)


def drawn(hidden, width=2, *, gate=True, bias=True, seed=0):
    """The parameters of a network with drawn numbers."""
    rng = np.random.default_rng(seed)
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    shapes |= {"up_bias": (hidden,), "down_bias": (width,)} if bias else {}
    shapes |= {"gate": (width, hidden)} if gate else {}
    shapes |= {"gate_bias": (hidden,)} if gate and bias else {}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def output(network, x=X, offset=0.0):
    """The output of a network of ReLUs."""
    up = x @ network["up"] + network.get("up_bias", 0)
    if "gate" in network:
        up = np.maximum(x @ network["gate"] + network.get("gate_bias", 0), 0) * (up + offset)
    else:
        up = np.maximum(up, 0)
    return up @ network["down"] + network.get("down_bias", 0)


def test_experts_side_by_side_add_up_with_their_gates():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 2, 4), "up_bias": (3, 1, 4), "down": (3, 4, 2), "down_bias": (3, 1, 2)}
    experts = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gates, x = np.array([0.5, 0.3, 0.2]), rng.normal(size=(5, 2)).astype(np.float32)

    def network(up, up_bias, down, down_bias):
        return np.maximum(x @ up + up_bias, 0) @ down + down_bias

    each = [network(**{name: array[e] for name, array in experts.items()}) for e in range(3)]
    found = {name: np.asarray(array) for name, array in side_by_side(experts, gates).items()}
    assert {name: array.shape for name, array in found.items()} == {
        "up": (2, 12),
        "up_bias": (12,),
        "down": (12, 2),
        "down_bias": (2,),
    }
    wanted = sum(gate * y for gate, y in zip(gates, each, strict=True))
    np.testing.assert_allclose(network(**found), wanted, atol=1e-5)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sum_of_networks_has_the_hidden_units_of_all(gate, bias):
    one, other = drawn(3, gate=gate, bias=bias), drawn(4, gate=gate, bias=bias, seed=1)
    found = added([one, other])
    assert found["up"].shape == (2, 7) and found["down"].shape == (7, 2)
    np.testing.assert_allclose(output(found), output(one) + output(other), rtol=1e-5, atol=1e-5)


def test_factors_of_inputs_and_outputs_are_in_the_weights():
    one, before, after = drawn(3), np.float32([2, -3]), np.float32([0.5, 7])
    found = output(scaled(one, before, after))
    np.testing.assert_allclose(found, output(one, X * before) * after, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output(scaled(one, 1, 3)), 3 * output(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_network_contains_the_projections_around_it(bias):
    one, rng = drawn(4, width=3, bias=bias), np.random.default_rng(1)
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3), (3, 2)))
    found = projected(one, down, up)
    assert found["up"].shape == (2, 4) and found["down"].shape == (4, 2)
    np.testing.assert_allclose(output(found), output(one, X @ down) @ up, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_network_with_biases_computes_a_network_without(gate, bias):
    one = drawn(3, gate=gate, bias=bias)
    found = gated(one, 0.25)
    assert found.keys() == drawn(3).keys()
    np.testing.assert_allclose(output(found, offset=0.25), output(one, offset=0.25), rtol=1e-5)


def test_new_units_are_drawn_and_add_nothing():
    one = drawn(200)
    found = widened(one, 600, jax.random.key(0))
    np.testing.assert_allclose(output(found), output(one), rtol=1e-4, atol=1e-4)
    for name in ("up", "gate"):
        np.testing.assert_array_equal(found[name][:, :200], one[name])
        assert np.std(found[name][:, 200:]) == pytest.approx(one[name].std(), rel=0.1)
    assert (
        not np.asarray(found["down"][200:]).any() and not np.asarray(found["up_bias"][200:]).any()
    )
    assert not np.array_equal(found["up"][:, 200:], found["gate"][:, 200:])
