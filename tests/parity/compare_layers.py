"""Our MoE layer on the weights and tokens of a recorded one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig

FIXTURES = Path(__file__).parent / "fixtures" / "layers"
LATENTS = {"nemotron_3_nano": None, "nemotron_3_super": 5}
K = 3
# Our parameter by the one of ``transformers``, which stores every matrix transposed.
PARAMETERS = {
    "gate.weight": "router.kernel",
    "experts.up_proj": "experts.up",
    "experts.down_proj": "experts.down",
    "shared_experts.up_proj.weight": "shared.network.up",
    "shared_experts.down_proj.weight": "shared.network.down",
    "fc1_latent_proj.weight": "latent.down",
    "fc2_latent_proj.weight": "latent.up",
}


def parameter(layer: ConfiguredMoE, path: str):
    """Returns the parameter of a module at a path with dots."""
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


def layer_of(record: dict[str, np.ndarray]) -> ConfiguredMoE:
    """Returns our layer with the weights of a record."""
    experts, hidden, narrow = record["experts.up_proj"].shape
    width = record["x"].shape[-1]
    config = MoEConfig(
        num_experts=experts,
        expert_dim=hidden,
        latent_dim=narrow if "fc1_latent_proj.weight" in record else 0,
        group_size=record["x"].shape[1],
        router=routing.preset("deepseek_v3", k=K, groups=4, keep_groups=2, balance_weight=0.0),
        shared=SharedConfig(len(record["shared_experts.up_proj.weight"])),
    )
    layer = ConfiguredMoE(config, FeedForwardConfig(width, hidden, "relu2"), jax.random.key(0))
    for theirs, ours in PARAMETERS.items():
        if theirs in record:
            parameter(layer, ours)[...] = jnp.asarray(record[theirs].swapaxes(-1, -2))
    layer.router.state["bias"][...] = jnp.asarray(record["bias"])
    return layer


def assert_layer_parity(record: dict[str, np.ndarray]) -> None:
    """Asserts equal outputs, and equal gradients of ``sin`` of them for tokens and weights."""

    def objective(layer, x):
        y, aux = layer(x, jnp.ones(x.shape[:2], bool), mode=TRAIN)
        return jnp.sin(y).sum() + aux.loss, y

    run = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
    (_, y), (gradients, of_x) = run(layer_of(record), jnp.asarray(record["x"]))
    np.testing.assert_allclose(y, record["y"], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(of_x, record["gradient x"], rtol=1e-4, atol=2e-5)
    compared = [name for name in PARAMETERS if name in record]
    assert len(compared) == sum(name.startswith("gradient ") for name in record) - 1
    for name in compared:
        ours, theirs = parameter(gradients, PARAMETERS[name])[...], record[f"gradient {name}"]
        np.testing.assert_allclose(ours, theirs.swapaxes(-1, -2), rtol=1e-4, atol=2e-5)
