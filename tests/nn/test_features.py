"""What an MoE layer can have beside router and experts, by hand or against a sum of its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.counting import count
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.mode import DECODE, EVAL, TRAIN, Mode
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import LayerOverride, MoEConfig
from moe_jax.nn.shared import SharedConfig

WIDTH, HIDDEN = 4, 6
EXPERT = FeedForwardConfig(WIDTH, HIDDEN, activation="relu")
KEY = jax.random.key(0)
ROUTER = routing.preset("switch", input_jitter=0.0, balance_weight=0.0)


def make(config=None, **settings):
    usual = {"num_experts": 3, "expert_dim": HIDDEN, "group_size": 8, "router": ROUTER}
    return ConfiguredMoE(config or MoEConfig(**(usual | settings)), EXPERT, KEY)


def tokens(rows=2, length=8):
    return jax.random.normal(jax.random.key(1), (rows, length, WIDTH))


def apply(moe, x, rng=None, mode=DECODE, valid=None, **given):
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    return jax.jit(lambda moe, x: moe(x, valid, mode=mode, rng=rng, **given))(moe, x)


def without_shared(moe):
    """The same layer without its shared network."""
    plain = make(dataclasses.replace(moe.config, shared=SharedConfig()))
    nnx.update(plain.router, nnx.state(moe.router))
    nnx.update(plain.experts, nnx.state(moe.experts))
    return plain


@pytest.mark.parametrize("mix", ["sum", "sigmoid", "softmax", "conditional"])
def test_the_shared_network_is_mixed_as_its_source_says(mix):
    moe, x = make(shared=SharedConfig(5, mix)), tokens()
    y, _ = apply(moe, x)
    routed, _ = apply(without_shared(moe), x)
    shared = moe.shared.network(x)
    assert moe.shared.network.up.shape == (WIDTH, 5)
    gate = x @ moe.shared.gate[...] if mix != "sum" else None
    expected = {
        "sum": lambda: routed + shared,
        "sigmoid": lambda: routed + shared * jax.nn.sigmoid(gate),
        "softmax": lambda: jax.nn.softmax(gate)[..., None, :] * jnp.stack([routed, shared], -1),
        "conditional": lambda: routed * jax.nn.sigmoid(gate) + shared * (1 - jax.nn.sigmoid(gate)),
    }[mix]()
    expected = expected.sum(-1) if mix == "softmax" else expected
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mix", ["sum", "sigmoid", "softmax", "conditional"])
def test_padding_passes_no_shared_network(mix):
    moe, x = make(shared=SharedConfig(5, mix)), tokens()
    valid = jnp.arange(16).reshape(2, 8) % 3 > 0
    y, _ = apply(moe, x, valid=valid)
    np.testing.assert_array_equal(y[~valid], 0)
    assert np.abs(y[valid]).sum(-1).min() > 0


def test_the_conditional_gate_has_its_loss_and_drops():
    # Gate weights 0: every gate is 1/2; the target is 0.2, so the loss is 0.3, times 2.
    shared = SharedConfig(5, "conditional", gate_drop=0.5, gate_target=0.2, gate_weight=2.0)
    moe, x = make(shared=shared), tokens(8, 16)
    moe.shared.gate[...] = jnp.zeros_like(moe.shared.gate[...])
    _, aux = apply(moe, x)
    np.testing.assert_allclose(aux.losses["conditional_gate"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(aux.loss, 0.6, rtol=1e-6)
    # In training half of the gates are dropped: 1/4 on average, and those tokens are the network's.
    y, aux = apply(moe, x, jax.random.key(3))
    dropped = np.isclose(np.asarray(y), moe.shared.network(x), atol=1e-6).all(-1)
    np.testing.assert_allclose(aux.losses["conditional_gate"], abs((~dropped).mean() / 2 - 0.2))
    assert 0.3 < dropped.mean() < 0.7


def test_a_gate_without_conditional_mix_is_refused():
    with pytest.raises(ConfigError, match="gate_drop and gate_weight need mix='conditional'"):
        SharedConfig(5, "sum", gate_drop=0.1)


def test_expert_mask_drops_whole_expert_outputs_and_scales_at_test_time():
    # Two experts per token with 4 slots each: a token keeps none, one or both outputs, unscaled.
    router = routing.preset("mixtral", balance_weight=0.0)
    moe = make(num_experts=2, router=router, expert_mask=0.5)
    plain = make(num_experts=2, router=router)
    x = tokens(8, 16)
    full, _ = apply(plain, x)
    tested, _ = apply(moe, x)
    np.testing.assert_allclose(tested, 0.5 * full, rtol=1e-6, atol=1e-7)
    y = np.asarray(apply(moe, x, jax.random.key(2))[0])
    parts = []
    for lost in (0, 1):
        one = make(num_experts=2, router=router)
        one.experts.down[...] = one.experts.down[...].at[lost].set(0)
        parts.append(np.asarray(apply(one, x)[0]))
    kinds = [np.zeros_like(y), *parts, np.asarray(full)]
    matches = [np.isclose(y, kind, atol=1e-6).all(-1) for kind in kinds]
    assert np.any(matches, axis=0).all()
    # 128 tokens, probability 1/4 each: outside 0.1 to 0.4 is a chance of less than 1e-4.
    assert all(0.1 < match.mean() < 0.4 for match in matches)


def test_final_mask_drops_whole_tokens_and_scales_at_test_time():
    moe, plain = make(final_mask=0.25), make()
    x = tokens(16, 16)
    full, _ = apply(plain, x)
    np.testing.assert_allclose(apply(moe, x)[0], 0.75 * full, rtol=1e-6)
    y = np.asarray(apply(moe, x, jax.random.key(2))[0])
    lost = (y == 0).all(-1)
    np.testing.assert_allclose(y[~lost], np.asarray(full)[~lost], rtol=1e-6)
    assert 0.12 < lost.mean() < 0.4


def test_experts_of_several_widths_are_groups_of_plain_experts():
    moe = make(num_experts=4, expert_dims=(2, 8))
    assert [group.up.shape for group in moe.experts.groups] == [(2, WIDTH, 2), (2, WIDTH, 8)]
    x = jax.random.normal(KEY, (4, 3, WIDTH))
    parts = [group(x[2 * i : 2 * i + 2]) for i, group in enumerate(moe.experts.groups)]
    np.testing.assert_allclose(moe.experts(x), jnp.concatenate(parts), rtol=1e-6)
    y, aux = apply(moe, tokens())
    assert y.shape == (2, 8, WIDTH) and float(aux.counts.load.sum()) == 16
    with pytest.raises(ConfigError, match="expert_dims has 3 widths"):
        MoEConfig(num_experts=4, expert_dims=(1, 2, 3))


def test_gate_on_the_input_scales_before_the_expert():
    # One expert that is the identity on what is positive and squares nothing: with relu and a
    # doubled, shifted input the two orders differ. Llama 4 computes expert(gate * x).
    moe = make(num_experts=2, router=routing.preset("llama4"))
    x = tokens()
    y, _ = apply(moe, x)
    logits = x @ moe.router.kernel[...]
    best = np.asarray(logits.argmax(-1))
    gate = jax.nn.sigmoid(logits.max(-1))[..., None]
    outputs = moe.experts(jnp.tile((gate * x).reshape(1, 16, WIDTH), (2, 1, 1)))
    expected = np.asarray(outputs).reshape(2, 2, 8, WIDTH)
    expected = np.take_along_axis(expected, best[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transport", ["einsum", "gather"])
def test_gate_on_the_input_has_the_same_gradient_with_both_transports(transport):
    def loss(moe, x):
        y, _ = moe(x, jnp.ones(x.shape[:2], bool), mode=DECODE)
        return jnp.sin(y).sum()

    found = jax.jit(jax.grad(loss, (0, 1)))(
        make(num_experts=2, router=routing.preset("llama4"), transport=transport), tokens()
    )
    wanted = jax.jit(jax.grad(loss, (0, 1)))(
        make(num_experts=2, router=routing.preset("llama4"), transport="einsum"), tokens()
    )
    assert np.abs(found[0].router.kernel[...]).max() > 1e-4
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_hash_routing_needs_the_token_ids_and_no_parameters():
    moe = make(num_experts=4, router=routing.preset("hash", kind="modulo"))
    assert not jax.tree.leaves(nnx.state(moe.router, nnx.Param))
    ids = jnp.arange(16).reshape(2, 8)
    _, aux = apply(moe, tokens(), token_ids=ids, mode=Mode("full", record=True))
    np.testing.assert_array_equal(aux.choices[..., 0], ids % 4)
    with pytest.raises(ConfigError, match="Hash routes by token id: pass token_ids"):
        apply(moe, tokens())


def test_soft_moe_needs_the_einsum_transport():
    with pytest.raises(ConfigError, match="one token or none, but .*=SoftSlots.*'einsum'"):
        MoEConfig(router=routing.preset("soft_moe"), transport="gather")
    moe = make(num_experts=3, router=routing.preset("soft_moe", slots_per_expert=2))
    assert moe.router.slots.shape == (WIDTH, 3, 2)
    y, aux = apply(moe, tokens(), mode=TRAIN)
    assert np.abs(y).min() > 0
    np.testing.assert_array_equal(aux.counts.load, [4, 4, 4])


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (routing.preset("deepseek_v3"), "limit: 4 of 8 groups of 12 experts"),
        (routing.preset("olmoe", k=16), "k=16 experts per token, but there are 12"),
        (routing.preset("deepseek_moe", device_weight=0.1), "12 experts do not divide over"),
    ],
)
def test_a_router_that_cannot_choose_among_the_experts_is_refused(router, message):
    with pytest.raises(ConfigError, match=f"model.moe.router: .*{message}"):
        MoEConfig(num_experts=12, router=router)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"k": 3}),
        ("gpt_oss", {"k": 2}),
        ("gshard", {"second": "all", "capacity_factor": 3.0}),
        ("glam", {"capacity_factor": 3.0}),
        ("noisy_top_k", {"k": 2}),
        ("hierarchical", {"groups": 3, "k_groups": 2, "k": 1}),
        ("jacobs_1991", {}),
    ],
)
@pytest.mark.parametrize("transport", ["einsum", "gather"])
def test_an_upcycled_layer_is_its_dense_parent(name, choices, transport):
    # All experts are the dense network, and the gates of every token sum to 1.
    router = routing.preset(name, **choices)
    moe = make(router=router, transport=transport)
    dense = FeedForward(EXPERT, jax.random.key(5))
    for part in ("up", "down"):
        parent = getattr(dense, part)[...]
        getattr(moe.experts, part)[...] = jnp.tile(parent, (3, 1, 1))
    x = tokens()
    y, _ = apply(moe, x, jax.random.key(1))
    np.testing.assert_allclose(y, dense(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- layers of a model

SMALL = DecoderConfig(
    num_layers=4,
    width=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    moe=MoEConfig(every=1, num_experts=4, expert_dim=6, group_size=8, router=ROUTER),
)


def small(**moe):
    return dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, **moe))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"every": 2}, (1, 3, 5, 7)),
        ({"every": 2, "last": 2}, (5, 7)),
        ({"every": 1, "last": 3}, (5, 6, 7)),
        ({"layers": (6, 0, 3)}, (0, 3, 6)),
        ({"layers": (6, 0, 3), "last": 1}, (0, 3, 6)),
        ({"every": 0}, ()),
    ],
)
def test_moe_layers_are_every_nth_the_last_ones_or_listed(settings, layers):
    assert MoEConfig(**settings).moe_layers(8) == layers


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="names layer 4, but layers are 0 to 3"):
        small(layers=(4,))
    with pytest.raises(ConfigError, match="overrides names layer 0, which has no experts"):
        small(every=2, overrides=(LayerOverride((0,), expert_dim=3),))


def test_layers_may_differ_in_router_experts_and_width():
    gshard = routing.preset("gshard")
    config = small(overrides=(LayerOverride((1, 3), gshard, num_experts=2, expert_dim=10),))
    blocks = config.layers()
    assert [block.moe.router for block in blocks] == [ROUTER, gshard, ROUTER, gshard]
    assert [block.moe.num_experts for block in blocks] == [4, 2, 4, 2]
    assert [block.feed_forward.hidden for block in blocks] == [6, 10, 6, 10]
    # The pattern repeats, so it is scanned; scanned or not, the outputs are the same.
    inputs = jnp.arange(16).reshape(2, 8)
    ones = jnp.ones_like(inputs)
    outputs = []
    for scan in (True, False):
        model = Decoder(dataclasses.replace(config, scan_layers=scan), 16, KEY)
        outputs.append(jax.jit(lambda m: m.hidden(inputs, ones, inputs, mode=EVAL))(model))
        assert len(model.layers.parts) == (1 if scan else 4)
    (hidden, reports), (other, other_reports) = outputs
    np.testing.assert_allclose(hidden, other, rtol=1e-5, atol=1e-6)
    assert [report.counts.load.shape for report in reports] == [(4,), (2,), (4,), (2,)]
    for one, two in zip(reports, other_reports, strict=True):
        np.testing.assert_array_equal(one.counts.load, two.counts.load)


@pytest.mark.parametrize("place", ["before", "after"])
def test_sparse_dense_stacking_adds_one_dense_sublayer_per_moe_layer(place):
    plain, stacked = (
        Decoder(small(every=2, extra_dense=where), 16, KEY) for where in ("none", place)
    )
    size = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        for name, model in (("plain", plain), ("stacked", stacked))
    }
    # Two MoE layers; a network 8 -> 12 -> 8 and its norm.
    assert size["stacked"] - size["plain"] == 2 * (2 * 8 * 12 + 8)
    # With the output of the added networks at zero the models are equal.
    block = stacked.layers.parts[0][1]
    block.extra.down[...] = jnp.zeros_like(block.extra.down[...])
    inputs = jnp.arange(16).reshape(2, 8)
    ones = jnp.ones_like(inputs)
    (hidden, _), (other, _) = (
        jax.jit(lambda m: m.hidden(inputs, ones, inputs, mode=EVAL))(m) for m in (plain, stacked)
    )
    np.testing.assert_allclose(hidden, other, rtol=1e-6)


def test_fine_grained_experts_cost_the_same():
    # Four times as many experts of a quarter of the width, four times as many per token: the same
    # parameters and FLOPs but for the router, which is 8 wide and four times as large.
    coarse = small(router=routing.preset("mixtral", k=1))
    fine = small(num_experts=16, expert_dim=3, router=routing.preset("mixtral", k=4))
    coarse = dataclasses.replace(coarse, moe=dataclasses.replace(coarse.moe, expert_dim=12))
    one, four = count(coarse, 16, 8), count(fine, 16, 8)
    assert four.total - one.total == four.active - one.active == 4 * 8 * (16 - 4)
    assert four.flops_by_part["experts"] == one.flops_by_part["experts"]


def test_counting_knows_shared_networks_and_extra_layers():
    base, shared = count(small(), 16, 8), count(small(shared=SharedConfig(5)), 16, 8)
    assert shared.total - base.total == shared.active - base.active == 4 * 2 * 8 * 5
    assert shared.flops_per_token - base.flops_per_token == 2 * 4 * 2 * 8 * 5
    extra = count(small(extra_dense="before"), 16, 8)
    assert extra.flops_per_token - base.flops_per_token == 2 * 4 * 2 * 8 * 12
