"""The same run on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import routing
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.parallel.mesh import batch_shards
from tests.matrix import covering

# data, expert, model, fsdp and sequence.
MESHES = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 1, 1, 8), (1, 2, 2, 2)]
MESHES += [(1, 4, 2), (2, 2, 1, 1, 2)]
ROUTERS = ("switch", "gshard", "expert_choice")
BOUND = 2e-5  # of the largest entry: what float32 sums in another order differ by
BATCH = PartitionSpec(("data", "fsdp", "expert"))


def close(actual, expected):
    expected = np.asarray(expected)
    bound = BOUND * max(np.abs(expected).max(initial=0.0), 1e-6)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=bound)


def same(actual, expected):
    """Every leaf is close: loss, outputs, reports and gradients; and the gradient's norm."""
    found, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    assert len(found) == len(wanted) > 5
    for (path, leaf), (_, other) in zip(found, wanted, strict=True):
        try:
            close(leaf, other)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from None
    norms = [optax.global_norm(jax.tree.map(np.asarray, tree[1])) for tree in (actual, expected)]
    np.testing.assert_allclose(*norms, rtol=BOUND)


def on_mesh(run, sizes, module, *arrays):
    mesh = make_mesh(MeshConfig(*sizes))
    module = jax.device_put(module, shardings_of_state(module, mesh))
    divides = arrays[0].shape[0] % batch_shards(MeshConfig(*sizes)) == 0
    arrays = jax.device_put(arrays, NamedSharding(mesh, BATCH if divides else PartitionSpec()))
    with jax.set_mesh(mesh):
        return jax.jit(run)(module, *arrays)


# The layer: 5 groups of 8 tokens, so that every mesh pads with groups of its own number. The width
# differs from the number of tokens, so that no axis passes for another.

X = jax.random.normal(jax.random.key(1), (5, 8, 12))
VALID = jnp.arange(40).reshape(5, 8) % 7 > 0


@functools.cache
def layer(name: str, **settings) -> ConfiguredMoE:
    config = MoEConfig(
        num_experts=8,
        expert_dim=16,
        group_size=8,
        router=dataclasses.replace(routing.preset(name), input_jitter=0.1),
        expert_dropout=0.2,
        transport="gather" if name == "gshard" else "einsum",
    )
    config = dataclasses.replace(config, **settings)
    return ConfiguredMoE(config, FeedForwardConfig(12, 16), jax.random.key(0))


def layer_step(moe, x, valid):
    def objective(moe, x):
        y, aux = moe(x, valid, mode=TRAIN, rng=jax.random.key(2))
        return jnp.sin(y).sum() + aux.loss, (y, aux)

    return jax.value_and_grad(objective, (0, 1), has_aux=True)(moe, x)


@functools.cache
def layer_alone(name: str):
    return jax.jit(layer_step)(layer(name), X, VALID)


@pytest.mark.parametrize(("name", "sizes"), covering(ROUTERS, MESHES))
def test_the_layer_is_the_same_on_every_mesh(sizes, name):
    same(on_mesh(layer_step, sizes, layer(name), X, VALID), layer_alone(name))


# The same by an exchange said outright, and by tokens that go round.

RING = {"transport": "gather", "exchange": "ring", "expert_dropout": 0.0}
ACROSS = [(4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 2, 2, 2), (2, 2, 1, 1, 2)]


@pytest.mark.parametrize(("name", "sizes"), covering(["switch", "gshard"], ACROSS, 2))
def test_an_exchange_said_outright_gives_the_same(sizes, name):
    moe = layer(name, exchange="all_to_all")
    same(on_mesh(layer_step, sizes, moe, X, VALID), layer_alone(name))


@functools.cache
def dropless_alone(name: str):
    settings = RING | {"exchange": "gspmd"}
    return jax.jit(layer_step)(layer(name, **settings), X, VALID)


@pytest.mark.parametrize(
    ("name", "sizes"), covering(["mixtral", "expert_choice", "llama4"], ACROSS)
)
def test_tokens_that_go_round_give_the_same(sizes, name):
    same(on_mesh(layer_step, sizes, layer(name, **RING), X, VALID), dropless_alone(name))


SENT = {"transport": "ragged", "exchange": "ragged", "expert_dropout": 0.0}


@pytest.mark.parametrize(("name", "sizes"), covering(["mixtral", "gpt_oss", "llama4"], ACROSS))
def test_choices_that_are_sent_give_the_same(sizes, name):
    same(on_mesh(layer_step, sizes, layer(name, **SENT), X, VALID), dropless_alone(name))


NONE = AttentionExpertsConfig()

# Whole models, dropout and the random second expert included; decoders are in tests/training.

TOKENS = jax.random.randint(jax.random.key(3), (8, 16), 0, 40)
SEGMENTS = jnp.ones_like(TOKENS).at[::3, 11:].set(0)


# The encoder-decoder: experts choose in the encoder, tokens in the decoder.


@functools.cache
def encoder_decoder() -> EncoderDecoder:
    moe = MoEConfig(num_experts=8, expert_dim=16, group_size=16, router=routing.preset("gshard"))
    choice = dataclasses.replace(moe, router=routing.preset("expert_choice"))
    config = EncoderDecoderConfig(
        encoder_layers=2,
        decoder_layers=2,
        width=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        dropout=0.1,
        encoder_moe=choice,
        decoder_moe=moe,
    )
    return jax.jit(lambda: EncoderDecoder(config, 40, jax.random.key(0)))()


def encoder_decoder_step(model, tokens, segments):
    batch = {
        "encoder_inputs": tokens,
        "encoder_segments": segments,
        "inputs": tokens[:, ::-1],
        "segments": jnp.ones_like(tokens),
        "positions": jnp.arange(16)[None] + 0 * tokens,
    }

    def objective(model):
        reading = model.read(batch, mode=TRAIN, rng=jax.random.key(4))
        hidden, reports = reading.hidden, reading.reports
        loss = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), tokens)
        return loss.mean() + sum(aux.loss for aux in reports), reports

    (value, reports), gradient = jax.value_and_grad(objective, has_aux=True)(model)
    return (value, reports), gradient


@functools.cache
def looking_ahead(attention_experts: AttentionExpertsConfig = NONE) -> Decoder:
    moe = MoEConfig(num_experts=8, expert_dim=16, group_size=16, router=routing.preset("gshard"))
    sizes = {"num_layers": 2, "width": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    sizes |= {"attention_experts": attention_experts}
    config = DecoderConfig(**sizes, dropout=0.1, lookahead=1, moe=moe)
    return jax.jit(lambda: Decoder(config, 40, jax.random.key(0)))()


def looking_ahead_step(model, tokens, segments):
    place = jnp.arange(16)[None] + 0 * tokens
    targets = jnp.roll(tokens, -1, axis=1)
    batch = {"inputs": tokens, "targets": targets, "segments": segments, "positions": place}

    def objective(model):
        reading = model.read(batch, mode=TRAIN, rng=jax.random.key(4))
        value = sum(jnp.sin(model.logits(x)).mean() for x in (reading.hidden, *reading.ahead))
        return value + sum(aux.loss for aux in reading.reports), reading.reports

    (value, reports), gradient = jax.value_and_grad(objective, has_aux=True)(model)
    return (value, reports), gradient


def test_looking_ahead_is_the_same_on_a_mesh():
    alone = jax.jit(looking_ahead_step)(looking_ahead(), TOKENS, SEGMENTS)
    same(on_mesh(looking_ahead_step, (4, 2, 1), looking_ahead(), TOKENS, SEGMENTS), alone)


@pytest.mark.parametrize(
    ("sizes", "exchange"), covering([(2, 4, 1), (1, 2, 2, 2)], ["gspmd", "all_to_all"], 2)
)
def test_experts_in_attention_are_the_same_on_a_mesh(sizes, exchange):
    experts = AttentionExpertsConfig(every=1, group_size=16, transport="gather")
    alone = jax.jit(looking_ahead_step)(looking_ahead(experts), TOKENS, SEGMENTS)
    model = looking_ahead(dataclasses.replace(experts, exchange=exchange))
    same(on_mesh(looking_ahead_step, sizes, model, TOKENS, SEGMENTS), alone)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (1, 2, 2, 2), (2, 2, 1, 1, 2)], ids=str)
def test_the_encoder_decoder_is_the_same_on_every_mesh(sizes):
    alone = jax.jit(encoder_decoder_step)(encoder_decoder(), TOKENS, SEGMENTS)
    same(on_mesh(encoder_decoder_step, sizes, encoder_decoder(), TOKENS, SEGMENTS), alone)
