"""Router heads by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing import Cosine, Linear, NoHead, UnitSlots
from moe_jax.routing.head import Parameter


def arrays(**values) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def test_linear():
    given = arrays(kernel=[[1, 2], [3, 4]], bias=[10, 20])
    x = np.array([[1, 1], [0, 2]], np.float32)
    # Column sums 4 and 6; twice the second row.
    np.testing.assert_array_equal(Linear().logits(x, given, 2), [[4, 6], [6, 8]])
    np.testing.assert_array_equal(Linear(bias=True).logits(x, given, 2), [[14, 26], [16, 28]])


def test_linear_with_planes():
    # One expert, two planes: the token (1, 2) against the columns (1, 3) and (2, 4).
    x, given = np.array([[1, 2]], np.float32), arrays(kernel=[[[1, 2]], [[3, 4]]])
    np.testing.assert_array_equal(Linear().logits(x, given, 1), [[[7, 10]]])
    made = Linear(bias=True).parameters(width=5, experts=3, planes=2)
    assert (made["kernel"].shape, made["bias"].shape) == ((5, 3, 2), (3, 2))


def test_linear_parameters_are_those_of_the_papers():
    def kernel(init: str) -> Parameter:
        return Linear(init=init).parameters(5, 3, 1)["kernel"]

    axes = ("embed", "router")
    assert kernel("scaled") == Parameter((5, 3), axes, "fan_in", 5)
    assert kernel("normal") == Parameter((5, 3), axes, "normal", 0.02)
    assert kernel("zeros") == Parameter((5, 3), axes, "zeros", 0.0)
    assert set(Linear().parameters(5, 3, 1)) == {"kernel"}
    assert Linear(bias=True).parameters(5, 3, 1)["bias"] == Parameter((3,), ("router",), "zeros")


def test_cosine():
    # Unit embeddings (0.6, 0.8) and (0, 1); the token (3, 0) has norm 3.
    given = arrays(projection=[[1, 0], [0, 1]], embedding=[[3, 4], [0, 2]])
    x = np.array([[3, 0]], np.float32)
    np.testing.assert_allclose(Cosine(2).logits(x, given, 2), [[1.8, 0]], rtol=1e-6)
    np.testing.assert_allclose(Cosine(2, True).logits(x, given, 2), [[0.6, 0]], rtol=1e-6)
    # X-MoE's 16 dimensions.
    made = Cosine().parameters(64, 8, 1)
    assert made["projection"].shape == (64, 16)
    embedding = made["embedding"]
    assert (embedding.shape, embedding.init, embedding.size) == ((8, 16), "orthogonal", 0.32)


def test_embeddings_shorter_than_one_are_made_unit_vectors_too():
    # A tenth of the embeddings of test_cosine.
    given = arrays(projection=[[1, 0], [0, 1]], embedding=[[0.3, 0.4], [0, 0.2]])
    x = np.array([[3, 0]], np.float32)
    np.testing.assert_allclose(Cosine(2).logits(x, given, 2), [[1.8, 0]], rtol=1e-6)


def test_unit_slots():
    # Unit slots (0.6, 0.8) and (0, 1), scale 2; the token (5, 0) is (1, 0).
    given = arrays(slots=[[[3, 0]], [[4, 2]]], log_scale=np.log(2))
    x = np.array([[5, 0]], np.float32)
    np.testing.assert_allclose(UnitSlots().logits(x, given, 1), [[[1.2, 0]]], rtol=1e-6)
    made = UnitSlots().parameters(width=5, experts=3, planes=2)
    assert (made["slots"].shape, made["log_scale"].shape) == ((5, 3, 2), ())


def test_unit_tokens_of_padding_have_zero_logits_and_finite_gradients():
    given = arrays(slots=[[[3, 0]], [[4, 2]]], log_scale=0)
    gradient = jax.grad(lambda x: UnitSlots().logits(x, given, 1).sum())(jnp.zeros((1, 2)))
    assert np.isfinite(gradient).all()
    assert not np.any(UnitSlots().logits(jnp.zeros((1, 2)), given, 1))


def test_no_head():
    assert NoHead().parameters(5, 3, 1) == {}
    np.testing.assert_array_equal(NoHead().logits(jnp.ones((2, 5)), {}, 3), np.zeros((2, 3)))
