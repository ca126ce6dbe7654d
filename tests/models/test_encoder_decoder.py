"""The encoder-decoder: experts choose in the encoder, tokens in the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.models import EncoderDecoder, EncoderDecoderConfig
from moe_jax.nn.mode import DECODE, TRAIN
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import RelativeBias

VOCAB, T, L, WIDTH = 16, 6, 5, 8
CHOICE = MoEConfig(
    every=2,
    num_experts=4,
    expert_dim=6,
    group_size=T,
    router=routing.preset("expert_choice", capacity_factor=1.0),
)
TOP2 = dataclasses.replace(CHOICE, group_size=L, router=routing.preset("gshard", second="all"))
CONFIG = EncoderDecoderConfig(
    encoder_layers=4,
    decoder_layers=2,
    width=WIDTH,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    gated=True,
    tie_embeddings=False,
    encoder_moe=CHOICE,
    decoder_moe=TOP2,
)


@pytest.fixture(scope="module")
def model():
    return EncoderDecoder(CONFIG, VOCAB, jax.random.key(0))


def run(model, source, target, source_segments=None, target_segments=None, mode=DECODE, rng=None):
    source_segments = jnp.ones_like(source) if source_segments is None else source_segments
    target_segments = jnp.ones_like(target) if target_segments is None else target_segments

    @jax.jit
    def forward(model, source, target):
        memory, first = model.encode(source, source_segments, mode=mode, rng=rng)
        hidden, second = model.decode(
            target, target_segments, memory, source_segments, mode=mode, rng=rng
        )
        return model.logits(hidden), first, second

    return forward(model, source, target)


SOURCE, TARGET = jnp.arange(T)[None], jnp.arange(L)[None] + T


def test_experts_choose_in_the_encoder_and_tokens_in_the_decoder(model):
    logits, encoder, decoder = run(model, SOURCE, TARGET, mode=TRAIN, rng=jax.random.key(1))
    assert logits.shape == (1, L, VOCAB) and logits.dtype == jnp.float32
    assert len(encoder) == 2 and len(decoder) == 1
    for report in encoder:
        np.testing.assert_array_equal(report.counts.load, [1, 1, 1, 1])  # 6 tokens over 4 experts
        assert report.losses == {}
    assert float(decoder[0].counts.demand.sum()) == 2 * L
    assert set(decoder[0].losses) == {"balance"}


def test_expert_choice_in_the_decoder_is_refused():
    with pytest.raises(ConfigError, match="decoder_moe.allow_future_leak=True"):
        dataclasses.replace(CONFIG, decoder_moe=CHOICE)
    leaky = dataclasses.replace(CHOICE, allow_future_leak=True)
    dataclasses.replace(CONFIG, decoder_moe=leaky)


def test_the_decoder_is_causal_and_sees_the_whole_encoder(model):
    # Token t of the source has id t, of the target id T + t: rows of the embedding tell them apart.
    def score(model, place):
        segments = jnp.ones_like(SOURCE)
        memory, _ = model.encode(SOURCE, segments, mode=DECODE)
        hidden, _ = model.decode(TARGET, jnp.ones_like(TARGET), memory, segments, mode=DECODE)
        return jnp.sin(model.logits(hidden)[0, place]).sum()

    gradients = jax.jit(jax.vmap(jax.grad(score), (None, 0)))(model, jnp.arange(L))
    size = np.abs(gradients.embedding.table[...]).sum(-1)  # (place, token id)
    assert (size[:, :T] > 0).all(), "every target sees every source"
    own = size[:, T : T + L]
    np.testing.assert_array_equal(own > 0, np.tril(np.ones((L, L), bool)))


def test_segments_do_not_meet_and_padding_changes_nothing(model):
    # Two pairs packed in one row, against each alone; nothing is dropped and no expert chooses.
    config = dataclasses.replace(CONFIG, encoder_moe=dataclasses.replace(TOP2, group_size=T))
    model = EncoderDecoder(config, VOCAB, jax.random.key(0))
    bias = model.encoder_bias.table
    bias[...] = jnp.zeros_like(bias[...])  # positions count from the row's start
    model.decoder_bias.table[...] = jnp.zeros_like(model.decoder_bias.table[...])
    packed, _, _ = run(
        model,
        SOURCE,
        TARGET,
        jnp.array([[1, 1, 1, 2, 2, 0]]),
        jnp.array([[1, 1, 2, 2, 0]]),
    )
    first, _, _ = run(model, SOURCE[:, :3], TARGET[:, :2])
    second, _, _ = run(model, SOURCE[:, 3:5], TARGET[:, 2:4])
    np.testing.assert_allclose(packed[:, :2], first, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 2:4], second, rtol=1e-4, atol=1e-5)


def test_scanned_and_unrolled_stacks_are_the_same_model(model):
    unrolled = EncoderDecoder(
        dataclasses.replace(CONFIG, scan_layers=False), VOCAB, jax.random.key(0)
    )
    (logits, *_), (other, *_) = (run(m, SOURCE, TARGET) for m in (model, unrolled))
    np.testing.assert_allclose(logits, other, rtol=1e-5, atol=1e-6)


def test_positions_both_ways_are_told_apart():
    # 4 buckets: 0 is the token itself and 1 the one before it, 2 and 3 are for later ones.
    bias = RelativeBias(1, jax.random.key(0), buckets=4, both_ways=True)
    bias.table[...] = jnp.arange(4.0)[:, None]
    np.testing.assert_array_equal(
        bias(jnp.arange(3), jnp.arange(3))[0, 0], [[0, 3, 3], [1, 0, 3], [1, 1, 0]]
    )


def test_parameters_by_hand(model):
    attention = 4 * WIDTH * 8
    norm, dense, expert = WIDTH, 3 * WIDTH * 12, 3 * WIDTH * 6
    router, bias = WIDTH * 4, 32 * 2
    encoder = 4 * (attention + 2 * norm) + 2 * dense + 2 * (4 * expert + router)
    decoder = 2 * (2 * attention + 3 * norm) + dense + 4 * expert + router
    ends = 2 * VOCAB * WIDTH + 2 * norm + 2 * bias
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert total == encoder + decoder + ends


def test_reads_a_batch_of_spans(model):
    keys = jax.random.split(jax.random.key(5), 2)
    source = jax.random.randint(keys[0], (2, T), 0, VOCAB)
    target = jax.random.randint(keys[1], (2, L), 0, VOCAB)
    around, segments = (
        jnp.ones_like(source).at[1, 4:].set(0),
        jnp.ones_like(target).at[0, 3:].set(0),
    )
    batch = {
        "encoder_inputs": source,
        "encoder_segments": around,
        "inputs": target,
        "segments": segments,
        "positions": jnp.arange(L)[None] * segments,
    }
    reading = model.read(batch, mode=DECODE)
    hidden, reports = reading.hidden, reading.reports
    logits, first, second = run(model, source, target, around, segments)
    np.testing.assert_allclose(model.logits(hidden)[0, :3], logits[0, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.logits(hidden)[1], logits[1], rtol=1e-5, atol=1e-5)
    assert len(reports) == len(first) + len(second) == 3


def test_names_of_the_layers_with_experts():
    layers = CONFIG.sparse_layers()
    assert [layer.name for layer in layers] == ["encoder 1", "encoder 3", "decoder 1"]
    assert [layer.of_inputs for layer in layers] == [True, True, False]
    routers = [layer.moe.router for layer in layers]
    assert routers == [CHOICE.router, CHOICE.router, TOP2.router]


def test_every_router_gets_its_own_demand():
    free = dataclasses.replace(CHOICE, router=routing.preset("loss_free", k=1, bias_rate=1.0))
    config = dataclasses.replace(CONFIG, encoder_moe=free, decoder_moe=free)
    model = EncoderDecoder(config, VOCAB, jax.random.key(0))
    demands = [jnp.roll(jnp.array([4.0, 0.0, 0.0, 0.0]), place) for place in range(3)]
    model.update_routers([routing.Counts(each, each, 0.0, 4.0) for each in demands])
    biases = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    # In the state the decoder's layer comes before the encoder's two; the busiest goes down.
    found = np.concatenate([np.reshape(bias, (-1, 4)) for bias in biases])
    np.testing.assert_array_equal(np.sign(found), [[1, 1, -1, 1], [-1, 1, 1, 1], [1, -1, 1, 1]])
