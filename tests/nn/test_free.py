"""A layer with experts without computation, against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import Capacity, FreeExperts, Router, Softmax, TopK

WIDTH, E, S = 4, 4, 6
EXPERT = FeedForwardConfig(WIDTH, 6, activation="relu")
FREE = FreeExperts(constant=1, copy=1, zero=1)
ROUTER = Router(Softmax(), TopK(2), capacity=Capacity(dropless="always"), free=FREE)


def config(transport: str = "gather", **settings) -> MoEConfig:
    return MoEConfig(
        num_experts=E,
        expert_dim=EXPERT.hidden,
        group_size=S,
        router=ROUTER,
        transport=transport,
        **settings,
    )


def expected(layer: ConfiguredMoE, x: np.ndarray) -> np.ndarray:
    """The softmax over seven experts, the two best, and what each of these returns."""
    kernel, up, down = (
        np.asarray(p[...]) for p in (layer.router.kernel, layer.experts.up, layer.experts.down)
    )
    mix, vector = np.asarray(layer.free.mix[...]), np.asarray(layer.free.vector[...])
    assert kernel.shape == (WIDTH, E + 3)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        scores = np.exp(token @ kernel)
        scores /= scores.sum()
        shares = np.exp(token @ mix[:, 0])
        shares /= shares.sum()
        for e in np.argsort(-scores)[:2]:
            if e < E:
                y = np.maximum(token @ up[e], 0) @ down[e]
            else:
                y = [shares[0] * token + shares[1] * vector[0], token, 0 * token][e - E]
            out[place] += scores[e] * y
    return out


@pytest.mark.parametrize("transport", ["gather", "einsum", "ragged"])
def test_the_layer_adds_the_outputs_of_free_experts(transport: str):
    layer = ConfiguredMoE(config(transport), EXPERT, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, S, WIDTH)) * 2
    valid = jnp.arange(2 * S).reshape(2, S) != 4
    y, aux = jax.jit(lambda layer, x: layer(x, valid, mode=TRAIN))(layer, x)
    wanted = np.where(valid[..., None], expected(layer, np.asarray(x)), 0)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    # Two choices of eleven tokens; some of them need no slot, and none is dropped.
    free = aux.counts.observed["free"].sum()
    assert free > 0 and aux.counts.demand.sum() + free == 22
    assert aux.dropped_fraction == 0 and aux.counts.unrouted == 0


def test_a_row_buffer_beside_free_experts_is_refused():
    with pytest.raises(ConfigError, match="exchange_buffer counts tokens without a row as unrou"):
        config("auto", exchange="ragged", exchange_buffer=1.5)
