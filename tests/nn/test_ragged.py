"""The layer with sorted choices is the layer with slots, in value and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import DECODE, TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing import presets

WIDTH = 4
# Dropless ones, one with slots that some find taken, one that scales what experts read, one that
# leaves some second choices unused, and one without a router.
ROUTERS = {
    "olmoe": presets.olmoe(k=2),
    "deepseek_v3": presets.deepseek_v3(k=2, groups=1, keep_groups=1),
    "llama4": presets.llama4(),
    "gshard": presets.gshard(capacity_factor=0.5),
    "hash": presets.hash(),
}


def gradients(router, transport, what, mode=TRAIN, **settings):
    """Output, report and gradients by every weight and input of a layer of 4 gated experts."""
    expert = FeedForwardConfig(WIDTH, 6, "gelu", gated=True, bias=True)
    settings = {"expert_dim": 6, "group_size": 16, "transport": transport, **settings}
    config = MoEConfig(num_experts=4, router=router, **settings)
    moe = ConfiguredMoE(config, expert, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 16, WIDTH))
    if what != "even" and hasattr(moe.router, "kernel"):
        # The first feature is 1, so the first row of the kernel prefers or shuns an expert.
        x = x.at[..., 0].set(1.0)
        kernel = moe.router.kernel[...]
        bias = jnp.zeros_like(kernel[0]).at[0].set(9.0 if what == "one expert" else -9.0)
        moe.router.kernel[...] = kernel.at[0].set(bias)
    valid = jnp.arange(64).reshape(4, 16) % 5 > 0
    ids = jnp.arange(64).reshape(4, 16) * 7 % 11

    @jax.jit
    def run(moe, x):
        def objective(moe, x):
            y, aux = moe(x, valid, mode=mode, token_ids=ids, rng=jax.random.key(3))
            return jnp.sin(y).sum() + aux.loss, (y, aux)

        return jax.grad(objective, (0, 1), has_aux=True)(moe, x)

    return run(moe, x)


def assert_close(found, expected):
    for got, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = max(np.abs(np.asarray(wanted, np.float32)).max(initial=0.0), 1e-6)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("what", ["even", "one expert", "empty expert"])
@pytest.mark.parametrize("name", ROUTERS)
def test_sorted_choices_and_slots_agree_in_value_and_all_gradients(name, what):
    expected = gradients(ROUTERS[name], "einsum", what)
    found = gradients(ROUTERS[name], "ragged", what)
    assert_close(found, expected)
    (weights, _), (_, aux) = found
    if what == "empty expert" and name in ("olmoe", "llama4"):
        assert float(aux.counts.load[0]) == 0
        np.testing.assert_array_equal(weights.experts.up[0], 0.0)
        assert np.abs(weights.experts.up[1]).max() > 0


def test_the_same_at_inference_beside_a_shared_expert():
    settings = {"mode": DECODE, "shared": SharedConfig(hidden=3)}
    found = gradients(ROUTERS["gshard"], "ragged", "even", **settings)
    assert_close(found, gradients(ROUTERS["gshard"], "gather", "even", **settings))


@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=2, fsdp=2)])
def test_each_device_sorts_its_own_groups(mesh):
    expected = gradients(ROUTERS["olmoe"], "einsum", "even")
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
        assert_close(gradients(ROUTERS["olmoe"], "ragged", "even"), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": presets.expert_choice()}, "router.select=TopTokens.* use transport='gather'"),
        ({"exchange": "all_to_all"}, "exchange='all_to_all' requires transport='gather' or"),
        ({"expert_dropout": 0.4}, "but expert_dropout=0.4"),
        ({"expert_mask": 0.3}, "but expert_mask=0.3"),
        ({"expert_dims": (4, 8)}, r"but expert_dims=\(4, 8\)"),
    ],
)
def test_what_needs_slots_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(transport="ragged", **settings)


def test_projections_of_attention_are_experts_like_others():
    assert AttentionExpertsConfig(transport="ragged").layer.transport == "ragged"
    with pytest.raises(ConfigError, match="attention_experts.*tokens that choose"):
        AttentionExpertsConfig(transport="ragged", router=presets.expert_choice())
