"""Modules that predict further tokens (DeepSeek-V3, section 2.2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.models.lookahead import ahead, valid_ahead
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig

VOCAB, L, WIDTH = 16, 6, 8
ROUTER = routing.preset("loss_free", k=2, bias_rate=1.0)
MOE = MoEConfig(every=2, num_experts=4, expert_dim=6, group_size=L, router=ROUTER)
CONFIG = DecoderConfig(
    num_layers=2, width=WIDTH, num_heads=2, head_dim=4, mlp_dim=12, moe=MOE, lookahead=2
)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(CONFIG, VOCAB, jax.random.key(0)))()


def batch_of(inputs, targets):
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    return {
        "inputs": jnp.array([inputs]),
        "targets": jnp.array([targets]),
        "segments": segments,
        "positions": positions,
    }


INPUTS, TARGETS = [1, 5, 6, 1, 7, 0], [5, 6, 2, 7, 8, 0]


@jax.jit
def read(model, batch):
    return model.read(batch, mode=DECODE)


def test_what_comes_later():
    assert ahead(jnp.array([[4, 5, 6]]), 1).tolist() == [[5, 6, 0]]
    assert ahead(jnp.array([[4, 5, 6]]), 0).tolist() == [[4, 5, 6]]
    assert ahead(jnp.array([[4, 5, 6]]), 4).tolist() == [[0, 0, 0]]
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    assert valid_ahead(segments, 0).tolist() == [[True, True, True, True, True, False]]
    assert valid_ahead(segments, 1).tolist() == [[True, False, True, True, False, False]]
    assert valid_ahead(segments, 2).tolist() == [[False, False, True, False, False, False]]


def test_a_module_merges_the_next_token_with_what_is_known(model):
    # A module without its layer: only norms and the projection, by hand.
    batch = batch_of(INPUTS, TARGETS)
    module = model.lookahead[0]
    reading = read(model, batch)

    def unit(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.norm.eps)

    table = np.asarray(model.embedding.table[...]) * np.sqrt(WIDTH)
    both = np.concatenate([unit(table[TARGETS]), unit(np.asarray(reading.hidden[0]))], -1)
    merged = both @ np.asarray(module.merge[...])
    seen = {}

    def layers(x, context, **_):
        seen["x"] = x
        return x, (), None

    module = nnx.clone(module)
    object.__setattr__(module, "layers", layers)
    x, for_head, _ = module(
        reading.hidden, model.embedding(batch["targets"], None), None, mode=DECODE, rng=None
    )
    np.testing.assert_allclose(seen["x"][0], merged, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(for_head[0], unit(merged), rtol=1e-4, atol=1e-5)
    assert x is seen["x"]


def test_a_guess_knows_the_tokens_before_it_and_no_other(model):
    # Column i of the first module has read targets up to i, of the second up to i + 1.
    base = read(model, batch_of(INPUTS, TARGETS))
    assert len(base.ahead) == 2
    other = read(model, batch_of(INPUTS, [*TARGETS[:2], 9, *TARGETS[3:]]))
    np.testing.assert_array_equal(base.hidden, other.hidden)
    for found, changed, first in zip(base.ahead, other.ahead, (2, 1), strict=True):
        same = (np.asarray(found) == np.asarray(changed)).all(-1)[0]
        assert same[:first].all() and not same[first]
        # The second document does not see the first.
        assert same[3:].all()


def test_the_main_model_does_not_depend_on_looking_ahead(model):
    plain = Decoder(dataclasses.replace(CONFIG, lookahead=0), VOCAB, jax.random.key(0))
    batch = batch_of(INPUTS, TARGETS)
    found, wanted = read(model, batch), read(plain, batch)
    np.testing.assert_allclose(found.hidden, wanted.hidden, rtol=1e-5, atol=1e-6)
    assert wanted.ahead == () and len(wanted.reports) == 1


def test_its_experts_come_after_those_of_the_layers(model):
    assert [layer.index for layer in CONFIG.sparse_layers()] == [1, 2, 3]
    reading = read(model, batch_of(INPUTS, TARGETS))
    assert len(reading.reports) == 3
    # All five tokens have a target; three have one after that in their own document.
    assert [int(aux.counts.valid) for aux in reading.reports] == [5, 5, 3]
    assert [int(valid.sum()) for _, valid in model.routed(batch_of(INPUTS, TARGETS))] == [5, 5, 3]
    moved = nnx.clone(model)
    demands = [jnp.roll(jnp.array([8.0, 0.0, 0.0, 0.0]), i) for i in range(3)]
    moved.update_routers([routing.Counts(each, each, 0.0, 8.0) for each in demands])
    stacks = [moved.layers, *(module.layers for module in moved.lookahead)]
    routers = [list(stack.layers())[-1].block.feed_forward.router for stack in stacks]
    for place, router in enumerate(routers):
        (bias,) = jax.tree.leaves(nnx.state(router, nnx.Not(nnx.Param)))
        assert bias.shape == (4,) and np.argmin(bias) == place


def test_dense_last_layers_and_wrong_numbers():
    dense = dataclasses.replace(CONFIG, num_layers=3)
    assert [layer.index for layer in dense.sparse_layers()] == [1]
    with pytest.raises(ConfigError, match="DecoderConfig.lookahead=-1"):
        dataclasses.replace(CONFIG, lookahead=-1)
