"""Head and attention by rows have the outputs of their model, and no product transposes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import Learned
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.serving.rows import RowAttention, by_rows

MOE = MoEConfig(every=1, num_experts=2, expert_dim=4, group_size=16)
SMALL = DecoderConfig(
    num_layers=1, width=5, num_heads=4, num_kv_heads=2, head_dim=2, mlp_dim=8, moe=MOE
)
VOCAB = 11


def outputs(model, length=5):
    tokens = jnp.arange(2 * length).reshape(2, length) % VOCAB
    ones, places = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(length), tokens.shape)
    hidden, _ = model.hidden(tokens, ones, places, mode=DECODE)
    return model.logits(hidden)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True, "positions": Learned(length=8)}, {"logit_cap": 5.0}],
    ids=["own head", "tied", "capped"],
)
def test_a_head_with_a_row_per_token_has_the_logits_of_its_model(changes):
    model = Decoder(dataclasses.replace(SMALL, **changes), VOCAB, jax.random.key(0))
    run = jax.jit(outputs)
    np.testing.assert_allclose(run(by_rows(model)), run(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "details",
    [
        Details(),
        Details(qkv_bias=True, output_bias=True, qk_norm="head", sinks=True, output_gate=True),
        Details(keys_as_values=True, value_norm=True),
    ],
    ids=["plain", "biases, norms, sinks and gate", "keys as values"],
)
@pytest.mark.parametrize("length", [5, 16], ids=["10 rows", "32 rows"])
def test_attention_by_rows_has_the_outputs_of_its_model(details, length):
    config = dataclasses.replace(SMALL, attention=details)
    model = Decoder(config, VOCAB, jax.random.key(0))
    found = by_rows(model, smallest=1)
    own = found.layers.parts[0][0].attention
    assert isinstance(own, RowAttention)
    # 4 heads of 2 features are 8 outputs of queries and inputs of the output; 2 are 4 of keys.
    assert own.query.shape == (8, 5) and own.key.shape == (4, 5) and own.output.shape == (5, 8)
    run = jax.jit(outputs, static_argnums=1)
    np.testing.assert_allclose(run(found, length), run(model, length), rtol=1e-5, atol=1e-5)


def test_small_stacked_and_very_large_attention_stays():
    small = by_rows(Decoder(SMALL, VOCAB, jax.random.key(0)))
    assert not isinstance(_attention_of(small), RowAttention)
    # The map of queries has 5 x 8 entries of 4 bytes.
    bound = {
        most: by_rows(Decoder(SMALL, VOCAB, jax.random.key(0)), 1, most) for most in (159, 160)
    }
    kinds = {most: isinstance(_attention_of(model), RowAttention) for most, model in bound.items()}
    assert kinds == {159: False, 160: True}
    stacked = Decoder(dataclasses.replace(SMALL, num_layers=2), VOCAB, jax.random.key(0))
    assert stacked.layers.repeats == (2,)
    assert not isinstance(_attention_of(by_rows(stacked, smallest=1)), RowAttention)


def test_the_head_of_a_mesh_stays_split():
    model = Decoder(SMALL, VOCAB, jax.random.key(0))
    with jax.set_mesh(make_mesh(MeshConfig(data=4, expert=2))):
        assert by_rows(model) is model


def _attention_of(model):
    return model.layers.parts[0][0].attention
