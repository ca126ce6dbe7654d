"""A layer whose experts work in a narrower space, against a loop over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.nn.attention import AttentionConfig
from moe_jax.nn.attention_experts import Projections
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.layer import MoE
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing import Capacity, Router, Softmax, TopK

WIDTH, LATENT, E, S = 8, 3, 4, 6
EXPERT = FeedForwardConfig(WIDTH, 6, activation="relu2")
ROUTER = Router(Softmax(), TopK(2), capacity=Capacity(dropless="always"))
X = jax.random.normal(jax.random.key(1), (2, S, WIDTH)) * 2
VALID = jnp.arange(2 * S).reshape(2, S) != 4


def layer(transport: str = "gather", **settings) -> ConfiguredMoE:
    config = MoEConfig(
        num_experts=E,
        expert_dim=EXPERT.hidden,
        latent_dim=LATENT,
        group_size=S,
        router=ROUTER,
        transport=transport,
        shared=SharedConfig(5),
    )
    return ConfiguredMoE(dataclasses.replace(config, **settings), EXPERT, jax.random.key(0))


def expected(moe: ConfiguredMoE, x: np.ndarray) -> np.ndarray:
    """``W_up sum_k g_k E_k(W_down x)`` of the two best experts, and the shared expert of ``x``."""
    down, up = np.asarray(moe.latent.down[...]), np.asarray(moe.latent.up[...])
    first, second = np.asarray(moe.experts.up[...]), np.asarray(moe.experts.down[...])
    kernel, shared = np.asarray(moe.router.kernel[...]), moe.shared.network
    assert (down.shape, up.shape) == ((WIDTH, LATENT), (LATENT, WIDTH))
    assert (first.shape, second.shape) == ((E, LATENT, 6), (E, 6, LATENT))
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        scores = np.exp(token @ kernel)
        scores /= scores.sum()
        narrow = sum(
            scores[e] * np.maximum(token @ down @ first[e], 0) ** 2 @ second[e]
            for e in np.argsort(-scores)[:2]
        )
        hidden = np.maximum(token @ np.asarray(shared.up[...]), 0) ** 2
        out[place] = narrow @ up + hidden @ np.asarray(shared.down[...])
    return out


@pytest.mark.parametrize("transport", ["gather", "einsum", "ragged", "auto"])
def test_the_layer_is_the_formula_of_the_paper(transport: str):
    moe = layer(transport)
    y, aux = jax.jit(lambda moe, x: moe(x, VALID, mode=TRAIN))(moe, X)
    wanted = np.where(VALID[..., None], expected(moe, np.asarray(X)), 0)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    assert aux.counts.demand.sum() == 22 and aux.dropped_fraction == 0


def test_all_transports_have_the_same_gradients():
    def gradients(moe):
        objective = lambda moe, x: jnp.sin(moe(x, VALID, mode=TRAIN)[0]).sum()  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(objective, (0, 1)))(moe, X))

    wanted = gradients(layer("einsum"))
    # Router, two maps of experts, two of the shared expert, two projections, and the tokens.
    assert len(wanted) == 8 and all(np.abs(leaf).max() > 1e-3 for leaf in wanted)
    for transport in ("gather", "ragged"):
        for found, leaf in zip(gradients(layer(transport)), wanted, strict=True):
            np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-4)


def test_projections_that_change_nothing_give_the_layer_without_them():
    wide, plain = layer(latent_dim=WIDTH), layer(latent_dim=0)
    assert not hasattr(plain, "latent")
    wide.latent.down[...] = wide.latent.up[...] = jnp.eye(WIDTH)
    outputs = [moe(X, VALID, mode=TRAIN)[0] for moe in (wide, plain)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_projections_start_at_the_scale_of_their_inputs_and_compute_in_the_type_of_tokens():
    moe = MoE(256, 64, 4, latent_dim=64, rngs=nnx.Rngs(0)).mixture
    for parameter, fan_in in ((moe.latent.down, 256), (moe.latent.up, 64)):
        # A normal truncated at two sigma has .88 of the deviation.
        deviation = float(jnp.std(parameter[...])) * fan_in**0.5
        assert parameter[...].dtype == jnp.float32 and 0.8 < deviation < 0.96
    tokens = jnp.ones((1, 2, 256), jnp.bfloat16)
    assert moe.latent.restore(moe.latent.project(tokens)).dtype == jnp.bfloat16


def test_experts_of_several_widths_share_the_projections():
    moe = layer(expert_dims=(4, 8))
    assert [tuple(group.up[...].shape) for group in moe.experts.groups] == [(2, 3, 4), (2, 3, 8)]
    assert moe(X, VALID, mode=TRAIN)[0].shape == X.shape


def test_experts_in_attention_have_no_latent_space():
    config = MoEConfig(num_experts=E, latent_dim=LATENT)
    projections = Projections(AttentionConfig(WIDTH, 2, 2, 4))
    with pytest.raises(ConfigError, match="latent_dim requires experts that are feed-forward"):
        ConfiguredMoE(config, projections, jax.random.key(0))
