"""Experts in attention: by hand, against plain attention, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.attend import View
from moe_jax.counting import count
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.attention import AttentionConfig, Details
from moe_jax.nn.attention_experts import (
    AttentionExpertsConfig,
    ProjectedAttention,
    ProjectionExperts,
    Projections,
)
from moe_jax.nn.block import Block, BlockConfig, Context
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.mode import DECODE, TRAIN, Mode
from moe_jax.nn.moe_config import MoEConfig
from tests.nn.test_attention import loop

GQA = AttentionConfig(width=8, num_heads=4, num_kv_heads=2, head_dim=4)
DENSE = BlockConfig(GQA, FeedForwardConfig(8, 16))
MOE = MoEConfig(
    every=1, num_experts=3, expert_dim=16, group_size=8, router=routing.preset("switch")
)
X = jax.random.normal(jax.random.key(1), (2, 4, 8))
POSITIONS = jnp.arange(4)[None] + jnp.zeros((2, 1), jnp.int32)
SEGMENTS = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
CONTEXT = Context(View(SEGMENTS, POSITIONS), SEGMENTS > 0, SEGMENTS)
ON = AttentionExpertsConfig(every=2, num_experts=3, group_size=8)
SMALL = DecoderConfig(
    num_layers=4, width=8, num_heads=2, head_dim=4, mlp_dim=16, moe=MoEConfig(expert_dim=16)
)


def block_of(experts: MoEConfig, **settings) -> Block:
    config = dataclasses.replace(DENSE, attention_experts=experts, **settings)
    return Block(config, jax.random.key(0))


def test_the_columns_are_the_products_with_each_map_in_turn():
    # One expert, M = 1, D = 1, two heads of queries and one of keys and of values.
    attention = AttentionConfig(width=1, num_heads=2, num_kv_heads=1, head_dim=1, rotary=None)
    experts = ProjectionExperts(Projections(attention), 2, jax.random.key(0))
    experts.query[...] = jnp.array([[[[2.0], [3.0]]], [[[20.0], [30.0]]]])
    experts.key[...] = jnp.array([[[[5.0]]], [[[50.0]]]])
    experts.value[...] = jnp.array([[[[7.0]]], [[[70.0]]]])
    y = experts(jnp.array([[[1.0], [2.0]], [[1.0], [-1.0]]]))
    expected = [[[2, 3, 5, 7], [4, 6, 10, 14]], [[20, 30, 50, 70], [-20, -30, -50, -70]]]
    np.testing.assert_array_equal(y, expected)
    assert Projections(attention).columns == 4
    split = ProjectedAttention(attention, jax.random.key(0))
    np.testing.assert_array_equal(split._mapped(y[:1], "query"), [[[[2], [4]], [[3], [6]]]])
    np.testing.assert_array_equal(split._mapped(y[:1], "key"), [[[[5], [10]]]])
    np.testing.assert_array_equal(split._mapped(y[:1], "value"), [[[[7], [14]]]])


@pytest.mark.parametrize("details", [Details(), Details(qkv_bias=True, qk_norm="head", clip=0.5)])
def test_one_expert_is_plain_attention(details):
    # The only expert's gate is 1.
    attention = dataclasses.replace(GQA, details=details)
    dense = Block(dataclasses.replace(DENSE, attention=attention), jax.random.key(0))
    block = block_of(dataclasses.replace(MOE, num_experts=1), attention=attention)
    np.testing.assert_array_equal(block.attention.output[...], dense.attention.output[...])
    for name in ("query", "key", "value"):
        getattr(block.attention_experts.experts, name)[...] = getattr(dense.attention, name)[None]
    y, (report,), _ = block(X, CONTEXT, mode=DECODE, rng=None)
    expected, nothing, _ = dense(X, CONTEXT, mode=DECODE, rng=None)
    real = np.asarray(CONTEXT.valid)
    np.testing.assert_allclose(np.asarray(y)[real], np.asarray(expected)[real], atol=1e-6)
    assert nothing == () and float(report.counts.valid) == 7


def test_each_token_is_projected_by_its_expert_times_the_gate():
    block = block_of(MOE)
    made, report = block.attention_experts(X, CONTEXT.valid, mode=Mode("full", record=True))
    inner = block.attention_experts
    logits = np.asarray(X) @ np.asarray(inner.router.kernel[...])
    gates = np.asarray(jax.nn.softmax(logits))
    kernels = [np.asarray(getattr(inner.experts, n)[...]) for n in ("query", "key", "value")]
    for b, t in np.argwhere(np.asarray(CONTEXT.valid)):
        e = logits[b, t].argmax()
        assert np.asarray(report.experts)[b, t].tolist() == [i == e for i in range(3)]
        parts = [np.einsum("m,mhd->hd", X[b, t], kernel[e]).reshape(-1) for kernel in kernels]
        np.testing.assert_allclose(made[b, t], gates[b, t, e] * np.concatenate(parts), atol=1e-6)
    np.testing.assert_array_equal(made[1, 3], np.zeros(made.shape[-1]))  # padding
    # The rest is attention: queries of one expert see keys of another.
    y, _, _ = block(X, CONTEXT, mode=DECODE, rng=None)
    sources, _ = inner(block.attention_norm(X), CONTEXT.valid, mode=DECODE)
    mixed = X + block.attention(sources, CONTEXT.view)
    expected = mixed + block.feed_forward(block.feed_forward_norm(mixed))
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_equal_experts_with_gate_one_are_attention_by_a_loop():
    # Hash routing has gate 1; experts that are all the same make routing irrelevant.
    router = routing.preset("hash")
    block = block_of(dataclasses.replace(MOE, router=router))
    plain = Block(DENSE, jax.random.key(0)).attention
    for name in ("query", "key", "value"):
        kernel = getattr(plain, name)[...]
        getattr(block.attention_experts.experts, name)[...] = jnp.stack([kernel] * 3)
    whole = jnp.ones((2, 4), bool)
    ids = jnp.arange(8).reshape(2, 4)
    sources, _ = block.attention_experts(X, whole, mode=DECODE, token_ids=ids)
    view = View(whole.astype(jnp.int32), POSITIONS)
    expected = loop(plain, X, np.ones((2, 4)), np.asarray(POSITIONS))
    np.testing.assert_allclose(block.attention(sources, view), expected, atol=2e-6)


def test_a_token_without_a_slot_projects_to_zero():
    # One slot for each of 3 experts and 7 tokens: at least four have none.
    router = routing.preset("switch", capacity_factor=1e-6, input_jitter=0.0)
    tight = dataclasses.replace(router, capacity=routing.Capacity(1e-6, 1e-6, minimum=1))
    block = block_of(dataclasses.replace(MOE, router=tight))
    made, report = block.attention_experts(X, CONTEXT.valid, mode=TRAIN)
    zero = (np.asarray(made) == 0).all(-1)
    assert zero.sum() == 1 + float(report.counts.unrouted) >= 5
    y, _, _ = block(X, CONTEXT, mode=TRAIN, rng=None)
    assert np.isfinite(y).all()


def test_both_kinds_report_in_order_and_repeat_their_own_records():
    block = block_of(MOE, moe=dataclasses.replace(MOE, num_experts=2, expert_dim=16))
    record = Mode("train", record=True)
    _, reports, _ = block(X, CONTEXT, mode=record, rng=None)
    assert [report.counts.load.shape for report in reports] == [(3,), (2,)]
    assert [router.num_experts for router in block.routers] == [3, 2]
    forced = {
        name: dataclasses.replace(
            MOE, num_experts=n, expert_dim=16, router=routing.preset("forced")
        )
        for name, n in (("attention_experts", 3), ("moe", 2))
    }
    again = Block(dataclasses.replace(block.config, **forced), jax.random.key(0))
    wanted = tuple(jnp.where(r.choices < 0, r.choices, 1).astype(jnp.int32) for r in reports)
    _, found, _ = again(X, CONTEXT, mode=record, rng=jax.random.key(2), records=wanted)
    for report, choices in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(report.choices, choices)


# In a model


@pytest.mark.parametrize("scan", [False, True])
def test_layers_with_experts_report_in_order(scan):
    config = dataclasses.replace(SMALL, attention_experts=ON, scan_layers=scan)
    assert [layer.name for layer in config.sparse_layers()] == ["attention 1", 1, "attention 3", 3]
    model = jax.jit(lambda: Decoder(config, 20, jax.random.key(0)))()
    tokens = jnp.arange(16).reshape(2, 8)
    run = jax.jit(lambda model: model.hidden(tokens, tokens * 0 + 1, tokens % 8, mode=TRAIN))
    _, reports = run(model)
    assert [report.counts.load.size for report in reports] == [3, 8, 3, 8]
    assert all(set(report.losses) == {"balance"} for report in reports)
    assert model.layers.num_sparse == 4


def test_off_is_the_default_and_leaves_the_model_as_it_is():
    assert not any(layer.attention_experts for layer in SMALL.layers())
    block = Block(DENSE, jax.random.key(0))
    assert not hasattr(block, "attention_experts") and block.source_width == 8


def test_parameters_and_flops_are_counted():
    plain, config = (
        count(dataclasses.replace(SMALL, attention_experts=on), 20, 16)
        for on in (AttentionExpertsConfig(), ON)
    )
    # Two layers: each of three experts has q, k and v, of which there was one; a router (8, 3).
    maps, router = 3 * 8 * 2 * 4, 8 * 3
    assert config.total - plain.total == 2 * (2 * maps + router)
    assert config.active - plain.active == 2 * router
    assert config.flops_per_token - plain.flops_per_token == 2 * 2 * router
    assert config.parameters["experts"] - plain.parameters["experts"] == 2 * 3 * maps
    assert plain.parameters["attention"] - config.parameters["attention"] == 2 * maps
    assert config.experts - plain.experts == 2 * 3


def test_names_in_an_encoder_decoder_say_the_stack():
    config = EncoderDecoderConfig(encoder_layers=2, decoder_layers=2, attention_experts=ON)
    names = [layer.name for layer in config.sparse_layers()]
    assert names == ["encoder attention 1", "encoder 1", "decoder attention 1", "decoder 1"]
    assert [layer.of_inputs for layer in config.sparse_layers()] == [True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "AttentionExpertsConfig.num_experts=0 must be at least 1"),
        ({"layers": (4,)}, "model.attention_experts names layer 4, but layers are 0 to 3"),
        (
            {"router": routing.preset("expert_choice")},
            "set model.attention_experts.allow_future_leak=True",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        dataclasses.replace(SMALL, attention_experts=dataclasses.replace(ON, **settings)).layers()
    assert "\n" not in str(error.value)


def test_latent_attention_is_refused():
    with pytest.raises(ConfigError, match="latent attention has no experts"):
        dataclasses.replace(SMALL, attention=Latent(), attention_experts=ON)


def test_experts_may_choose_in_an_encoder_alone():
    choice = dataclasses.replace(ON, router=routing.preset("expert_choice"))
    with pytest.raises(ConfigError, match="attention_experts.allow_future_leak"):
        EncoderDecoderConfig(attention_experts=choice)
    asked = dataclasses.replace(choice, allow_future_leak=True)
    assert len(EncoderDecoderConfig(attention_experts=asked).sparse_layers()) == 8
