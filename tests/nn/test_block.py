import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attend import View
from moe_jax.nn.attention import AttentionConfig
from moe_jax.nn.block import Block, BlockConfig, Context
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import DECODE, TRAIN
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig

DENSE = BlockConfig(AttentionConfig(8, 2, 2, 4), FeedForwardConfig(8, 16), moe=None, dropout=0.0)
SPARSE = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=2, expert_dim=16, group_size=4))
X = jax.random.normal(jax.random.key(1), (2, 4, 8))
POSITIONS = jnp.arange(4)[None] + jnp.zeros((2, 1), jnp.int32)
SEGMENTS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
CONTEXT = Context(View(SEGMENTS, POSITIONS), SEGMENTS > 0, SEGMENTS)


def test_sub_layers_read_normed_inputs_and_add_to_the_residual():
    block = Block(DENSE, jax.random.key(0))
    mixed = X + block.attention(block.attention_norm(X), CONTEXT.view)
    expected = mixed + block.feed_forward(block.feed_forward_norm(mixed))
    y, reports, cache = block(X, CONTEXT, mode=TRAIN, rng=None)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert reports == () and cache is None


@pytest.mark.parametrize("place", ["output", "both"])
def test_outputs_of_sub_layers_are_normalised_before_the_sum(place):
    block = Block(dataclasses.replace(DENSE, norm=NormConfig(place=place)), jax.random.key(0))
    block.attention_output_norm.scale[...] = jnp.arange(1.0, 9.0)
    block.feed_forward_output_norm.scale[...] = jnp.arange(2.0, 10.0)
    assert hasattr(block, "attention_norm") == (place == "both")
    before = block.attention_norm if place == "both" else lambda x: x
    mixed = X + block.attention_output_norm(block.attention(before(X), CONTEXT.view))
    before = block.feed_forward_norm if place == "both" else lambda x: x
    expected = mixed + block.feed_forward_output_norm(block.feed_forward(before(mixed)))
    y, _, _ = block(X, CONTEXT, mode=TRAIN, rng=None)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_a_moe_block_routes_valid_tokens_and_reports():
    block = Block(SPARSE, jax.random.key(0))
    mixed = X + block.attention(block.attention_norm(X), CONTEXT.view)
    inputs = block.feed_forward_norm(mixed)
    expected, _ = block.feed_forward(inputs, CONTEXT.valid, mode=DECODE)
    y, (report,), cache = block(X, CONTEXT, mode=DECODE, rng=None)
    np.testing.assert_allclose(y, mixed + expected, atol=1e-6)
    np.testing.assert_allclose(y[1, 2:], mixed[1, 2:], atol=1e-6)  # padding: residual alone
    assert float(report.counts.valid) == 6.0


def test_a_learned_number_multiplies_the_output_of_a_layer():
    block = Block(dataclasses.replace(DENSE, output_scale=True), jax.random.key(0))
    plain, _, _ = Block(DENSE, jax.random.key(0))(X, CONTEXT, mode=TRAIN, rng=None)
    np.testing.assert_array_equal(block(X, CONTEXT, mode=TRAIN, rng=None)[0], plain)
    block.output_scale[...] = jnp.array([3.0])
    np.testing.assert_allclose(block(X, CONTEXT, mode=TRAIN, rng=None)[0], 3 * plain, rtol=1e-6)


def test_dropout_needs_a_key():
    block = Block(dataclasses.replace(DENSE, dropout=0.5), jax.random.key(0))
    plain, _, _ = Block(DENSE, jax.random.key(0))(X, CONTEXT, mode=TRAIN, rng=None)
    silent, _, _ = block(X, CONTEXT, mode=TRAIN, rng=None)
    random, _, _ = block(X, CONTEXT, mode=TRAIN, rng=jax.random.key(0))
    np.testing.assert_array_equal(silent, plain)
    assert not np.allclose(random, plain)
