"""Small models whose every parameter is drawn, and their logits with a slot for every choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import models, routing
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.surgery.weights import LayerWeights

VOCAB, LENGTH = 13, 8
MOE = MoEConfig(
    every=1, num_experts=4, expert_dim=6, group_size=8, router=routing.preset("mixtral")
)
MODEL = DecoderConfig(
    num_layers=2, width=8, num_heads=2, head_dim=4, mlp_dim=12, gated=True, moe=MOE
)

TWO_STACKS = EncoderDecoderConfig(
    encoder_layers=3,
    decoder_layers=2,
    width=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    encoder_moe=MOE,
    decoder_moe=MOE,
)


def config(router=None, **changes):
    """A decoder with this router; other fields of the model or of its experts change by name."""
    own = {f.name for f in dataclasses.fields(MoEConfig)}
    inner = {name: value for name, value in changes.items() if name in own}
    moe = dataclasses.replace(MOE, router=router or MOE.router, **inner)
    outer = {name: value for name, value in changes.items() if name not in own}
    return dataclasses.replace(MODEL, moe=moe, **outer)


def two_stacks(router=None, model=TWO_STACKS, **changes):
    """An encoder-decoder with this router in both stacks; fields of its experts change by name."""
    moe = dataclasses.replace(MOE, router=router or MOE.router, **changes)
    return dataclasses.replace(model, encoder_moe=moe, decoder_moe=moe)


@functools.cache
def weights(model, seed=0):
    """A model in which biases and routers' state are drawn too, so that every array matters."""
    module = models.make(model, VOCAB, jax.random.key(seed))
    graph, state = nnx.split(module)
    flat, rng = dict(nnx.to_flat_state(state)), np.random.default_rng(seed)
    for path, variable in flat.items():
        value = np.asarray(variable.get_value())
        draw = 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        flat[path] = variable.replace(jnp.asarray(value + draw))
    return LayerWeights.of_model(nnx.merge(graph, nnx.from_flat_state(flat)))


def batch(seed=0, rows=2):
    """A batch of ``moe_jax.data``."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    ones = np.ones((rows, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": ones,
        "positions": positions,
    }


def pair(seed=0, rows=2):
    """A batch of sources and targets; the sources are shorter by a token."""
    targets, sources = batch(seed, rows), batch(seed + 1, rows)
    segments = sources["segments"].copy()
    segments[:, -1] = 0
    return {**targets, "encoder_inputs": sources["inputs"], "encoder_segments": segments}


def logits(found, capacity="full"):
    """The logits ``(B, L, V)`` of a model."""
    graph, state = nnx.split(found.module())
    read = batch() if isinstance(found.model, DecoderConfig) else pair()

    @jax.jit
    def computed(state):
        model = nnx.merge(graph, state)
        return model.logits(model.read(read, mode=Mode(capacity)).hidden)

    return np.asarray(computed(state))


def assert_close(one, other, capacity="full"):
    """Asserts that two models have equal logits up to the rounding of float32."""
    np.testing.assert_allclose(logits(one, capacity), logits(other, capacity), atol=2e-5, rtol=2e-5)
