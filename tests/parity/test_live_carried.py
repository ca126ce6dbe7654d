"""ZAYA1's routers of ``transformers``, each of which reads the sum of the layer before."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")

import jax  # noqa: E402

from moe_jax import routing  # noqa: E402
from moe_jax.nn.router import RouterLayer  # noqa: E402

B, L, M, E, DIM = 2, 19, 12, 5, 7
NAMES = {
    "down": "down_proj.weight",
    "down_bias": "down_proj.bias",
    "scale": "router_mlp.norm.weight",
    "first": "router_mlp.fc1.weight",
    "first_bias": "router_mlp.fc1.bias",
    "second": "router_mlp.fc2.weight",
    "second_bias": "router_mlp.fc2.bias",
    "kernel": "router_mlp.out_proj.weight",
    "carried_scale": "router_states_scale",
}


def theirs(layer: int, generator):
    from transformers.models.zaya import ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaRouter

    config = ZayaConfig(
        vocab_size=32,
        hidden_size=M,
        num_hidden_layers=3,
        num_experts=E,
        router_hidden_size=DIM,
        moe_intermediate_size=4,
    )
    router = ZayaRouter(config, layer)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        router.balancing_biases[:-1] = torch.randn(E, generator=generator) / 8
    return router


def ours(router) -> RouterLayer:
    layer = RouterLayer(routing.preset("zaya", dim=DIM, offset=-0.2), M, E, jax.random.key(0), 1.0)
    tensors = router.state_dict()
    for name, theirs in NAMES.items():
        if theirs in tensors:
            array = tensors[theirs].numpy()
            getattr(layer, name)[...] = jnp.asarray(array.T if theirs.endswith("weight") else array)
    bias = router.balancing_biases.numpy().copy()
    bias[-1] = 0
    layer.state["bias"][...] = jnp.asarray(bias)
    return layer


@pytest.mark.parametrize("seed", [0, 1])
def test_three_routers_of_zaya_one_after_the_other(seed: int):
    generator = torch.Generator().manual_seed(seed)
    before, carried, skipped = None, None, 0
    for index in range(3):
        router = theirs(index, generator)
        router.balancing_biases[-1] = -0.2
        x = torch.randn((B, L, M), generator=generator)
        with torch.no_grad():
            _, gates, experts, before = router(x, before)
        plan, carried = ours(router)(
            jnp.asarray(x.numpy()),
            capacity=L,
            valid=jnp.ones((B, L), bool),
            token_ids=None,
            record=None,
            rng=None,
            carried=carried,
        )
        wanted = np.zeros((B * L, E), np.float32)
        np.put_along_axis(wanted, experts.numpy(), gates.numpy(), 1)
        found = np.asarray(plan.combine).sum(-1).reshape(B * L, E)
        np.testing.assert_array_equal(found > 0, wanted > 0)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(carried, before.numpy(), rtol=1e-4, atol=1e-5)
        skipped += int((found.sum(1) == 0).sum())
    assert 0 < skipped < 3 * B * L, "some tokens skip the experts"
