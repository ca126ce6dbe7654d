"""The router as a module: its draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.nn import router as router_layer
from moe_jax.nn.router import RouterLayer


def test_jitter_dropout_and_every_group_draw_by_keys_of_their_own(monkeypatch):
    # Noise of one key is the same noise: dropout would keep just the inputs of high jitter.
    router = routing.presets.switch(input_jitter=0.5, input_dropout=0.5)
    layer = RouterLayer(router, 4, 2, jax.random.key(0), 1.0)
    seen = []

    def spy(owner, name, place):
        function = getattr(owner, name)

        def noted(*args):
            seen.append(jnp.atleast_1d(args[place]))
            return function(*args)

        monkeypatch.setattr(owner, name, noted)

    spy(jax.random, "uniform", 0)
    spy(router_layer, "dropout", 2)
    over_groups = router_layer.over_groups

    def noted_groups(function):
        def noted(*args):
            seen.append(args[3])
            return over_groups(function)(*args)

        return noted

    monkeypatch.setattr(router_layer, "over_groups", noted_groups)
    x, valid = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
    layer(x, capacity=3, valid=valid, token_ids=None, record=None, rng=jax.random.key(1))
    keys = np.asarray(jax.random.key_data(jnp.concatenate(seen)))
    assert len(keys) == len(np.unique(keys, axis=0)) == 4
