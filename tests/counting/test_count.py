import dataclasses
import math

import jax
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.counting import Tokens, count
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import T5Relative
from moe_jax.nn.shared import SharedConfig

VOCAB, LENGTH = 64, 16
DENSE = DecoderConfig(
    num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32, moe=MoEConfig(every=0)
)


def mixture(router, **changes):
    moe = MoEConfig(
        2,
        num_experts=8,
        expert_dim=32,
        group_size=16,
        router=router,
        allow_future_leak=router.experts_choose,
    )
    return dataclasses.replace(DENSE, moe=moe, **changes)


def test_a_dense_model_by_hand():
    # Embedding 64 * 16 = 1024 and final norm 16. A layer: four attention matrices of 16 * 16,
    # two feed-forward matrices of 16 * 32, two norms of 16: 1024 + 1024 + 32 = 2080.
    # FLOPs of a layer: 2 * 1024 for attention's matrices; scores and their weighted sum over 8
    # earlier tokens on average, 2 heads of 8: 2 * 2 * 8 * 16 = 512; feed-forward 2 * 1024.
    parts = {"attention": 2 * (2048 + 512), "dense": 2 * 2048, "experts": 0, "router": 0}
    parts["head"] = 2 * 16 * 64
    cost = count(DENSE, VOCAB, LENGTH)
    assert (cost.total, cost.active, cost.flops_by_part) == (5200, 5200, parts)
    assert cost.flops_per_token == 5120 + 4096 + 2048
    assert cost.training_flops_per_token == 33792


def test_a_switch_model_by_hand():
    # Layer 1 has 8 experts of 1024 instead of one network, and a router of 16 * 8 = 128:
    # 5200 + 7 * 1024 + 128. A token meets one expert: the dense model and the router.
    parts = {"attention": 5120, "dense": 2048, "experts": 2048, "router": 256, "head": 2048}
    cost = count(mixture(routing.presets.switch()), VOCAB, LENGTH)
    assert (cost.total, cost.active, cost.flops_by_part) == (12496, 5328, parts)
    assert cost.flops_per_token == 11520 and cost.experts == 8
    assert cost.training_flops_per_token == 34560


@pytest.mark.parametrize(
    ("router", "experts_per_token"),
    [
        (routing.presets.gshard(), 2),
        (routing.presets.expert_choice(), 2),  # by its capacity factor
        (routing.presets.expert_choice(capacity_factor=1.0), 1),
        (routing.presets.expert_choice(capacity_factor=0.5), 0.5),
        # What is dropped is not foreseen: the capacity factor of a router by tokens is not used.
        (routing.presets.switch(capacity_factor=8.0), 1),
    ],
)
def test_experts_per_token(router, experts_per_token):
    cost = count(mixture(router), VOCAB, LENGTH)
    assert cost.total == 12496
    assert cost.active == 12496 - 8 * 1024 + experts_per_token * 1024
    assert cost.flops_by_part["experts"] == experts_per_token * 2048


def test_free_experts_cost_nothing_but_their_logits_and_the_map_of_constants():
    # Eight experts of 1024 parameters of which two are met. Of two choices among 8 + 8 experts one
    # computes; eight more columns of 16 logits are in the router. A constant has a map to 2 and v.
    plain = count(mixture(routing.preset("mixtral")), VOCAB, LENGTH)
    free = count(mixture(routing.preset("longcat_flash", k=2, copy=8)), VOCAB, LENGTH)
    assert free.total - plain.total == 8 * 16
    assert free.flops_by_part["experts"] == plain.flops_by_part["experts"] / 2
    assert free.flops_by_part["router"] - plain.flops_by_part["router"] == 2 * 8 * 16
    chosen = {"copy": 0, "zero": 0, "constant": 8}
    constant = count(mixture(routing.preset("moe_plus_plus", **chosen)), VOCAB, LENGTH)
    # MoE++ also maps the 16 logits of the layer before to 16 logits.
    assert constant.total - free.total == 8 * (2 * 16 + 16) + 16 * 16


def test_experts_in_a_latent_space_by_hand():
    # Eight experts of 2 * 4 * 32 instead of 2 * 16 * 32 parameters, of which a token meets one, and
    # two projections of 16 * 4 that every token passes; the shared expert of 2 * 16 * 8 is full
    # width. The projections and the shared expert are dense.
    plain = mixture(routing.presets.switch())
    moe = dataclasses.replace(plain.moe, latent_dim=4, shared=SharedConfig(8))
    cost = count(dataclasses.replace(plain, moe=moe), VOCAB, LENGTH)
    assert cost.total == 12496 - 8 * (1024 - 256) + 128 + 256
    assert cost.active == 5328 - (1024 - 256) + 128 + 256
    parts = {"attention": 5120, "experts": 512, "router": 256, "head": 2048}
    assert cost.flops_by_part == parts | {"dense": 2048 + 2 * 128 + 2 * 256}
    assert cost.parameters["experts"] == 8 * 256
    assert cost.parameters["dense"] == 1024 + 32 + 128 + 256


def test_gates_fewer_key_heads_untied_head_and_relative_positions():
    config = mixture(
        routing.presets.switch(),
        gated=True,
        num_kv_heads=1,
        tie_embeddings=False,
        positions=T5Relative(),
    )
    cost = count(config, VOCAB, LENGTH)
    # Per layer, half of keys and values: -256. A third matrix: 512 for the dense layer and for
    # each expert. A head of 1024. A table of 32 buckets for 2 heads.
    assert cost.total == 12496 - 2 * 256 + 9 * 512 + 1024 + 64
    assert cost.active == 5328 - 2 * 256 + 2 * 512 + 1024 + 64
    parts = {"attention": 2 * (1536 + 512), "dense": 3072, "experts": 3072, "router": 256}
    assert cost.flops_by_part == parts | {"head": 2048}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_total_is_the_size_of_the_parameters(every, scan):
    moe = MoEConfig(every, num_experts=8, expert_dim=32, router=routing.presets.gshard())
    config = dataclasses.replace(
        DENSE, num_layers=4, gated=True, num_kv_heads=1, scan_layers=scan, moe=moe
    )
    shapes = jax.eval_shape(lambda: nnx.state(Decoder(config, VOCAB, jax.random.key(0)), nnx.Param))
    sizes = {
        jax.tree_util.keystr(path): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    cost = count(config, VOCAB, LENGTH)
    assert cost.total == sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if "experts" in name)
    # Two of eight.
    assert cost.active == cost.total - experts * 6 // 8
    assert cost.flops_per_token == sum(cost.flops_by_part.values())


def test_flops_grow_with_the_length_in_attention_alone():
    short, long = (count(DENSE, VOCAB, length).flops_by_part for length in (16, 32))
    # 8 more tokens on average, 2 layers.
    assert long.pop("attention") - short.pop("attention") == 2 * 512
    assert long == short


def test_parameters_by_part_add_up():
    cost = count(mixture(routing.presets.switch(), tie_embeddings=False), VOCAB, LENGTH)
    # Norms count with the part that they stand before.
    layers = {"attention": 2 * (1024 + 16), "dense": 1024 + 32, "experts": 8 * 1024, "router": 128}
    ends = {"head": 1024, "embedding": 1024, "final_norms": 16}
    assert cost.parameters == layers | ends
    assert cost.active_by_convention == {
        "embedding_and_head": cost.active,
        "no_input_embedding": cost.active - 1024,
        "one_matrix": cost.active - 1024,
    }


def test_modules_that_look_ahead_are_counted_apart():
    config = mixture(routing.presets.switch(), tie_embeddings=False)
    plain = count(config, VOCAB, LENGTH)
    cost = count(dataclasses.replace(config, lookahead=2), VOCAB, LENGTH)
    # Each has the last layer once more, a projection of 2 M x M and three norms.
    last = (1024 + 16) + 16 + 8 * 1024 + 128
    assert cost.lookahead == 2 * (last + 2 * 16 * 16 + 3 * 16)
    assert (cost.total, cost.active, cost.flops_by_part) == (
        plain.total,
        plain.active,
        plain.flops_by_part,
    )
    # Its FLOPs: those of the layer, of the projection and of the head, which is shared.
    block = (plain.flops_by_part["experts"] + plain.flops_by_part["router"]) + (
        plain.flops_by_part["attention"] / 2
    )
    assert cost.lookahead_flops == 2 * (block + 2 * 2 * 16 * 16 + 2 * 1024)
    extra = cost.training_flops_per_token - plain.training_flops_per_token
    assert extra == 3 * cost.lookahead_flops


def test_flops_of_an_encoder_decoder_by_hand():
    config = EncoderDecoderConfig(
        encoder_layers=1,
        decoder_layers=1,
        width=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        encoder_moe=MoEConfig(every=0),
        decoder_moe=MoEConfig(every=0),
    )
    # Encoder, 8 tokens: 2 * 1024 for attention's matrices, 2 * 2 * 16 * 8 for scores of all and
    # their mixing. Decoder, 4 tokens: the same matrices and 2 * 2 * 16 * 2 for two earlier tokens
    # on average; across: half of 2 * 1024 for queries and output per target, the other half per
    # memory token, and 2 * 2 * 16 * 8 for scores.
    encoder = 8 * (2048 + 512)
    decoder = 4 * (2048 + 128) + 4 * (1024 + 512) + 8 * 1024
    cost = count(config, VOCAB, Tokens(8, 4))
    assert cost.flops_by_part["attention"] == round((encoder + decoder) / 12)
    # Kaplan: half of every score, and keys and values of the memory once per target.
    encoder, decoder = 8 * (2048 + 256), 4 * (2048 + 128) + 4 * (2048 + 256)
    cost = count(config, VOCAB, Tokens(8, 4), "kaplan")
    assert cost.flops_by_part["attention"] == round((encoder + decoder) / 12)


def test_windows_and_chunks_bound_the_scores():
    plain = count(DENSE, VOCAB, 64).flops_by_part["attention"]
    for details, seen in ((Details(window=16), 16 - 16**2 / 128), (Details(chunk=16), 8)):
        config = dataclasses.replace(DENSE, attention=details)
        less = plain - count(config, VOCAB, 64).flops_by_part["attention"]
        assert less == 2 * 2 * 2 * 16 * (32 - seen)
    # Masked scores computed after all: 64 keys instead of 32.
    full = count(DENSE, VOCAB, 64, "full").flops_by_part["attention"]
    assert full - plain == 2 * 2 * 2 * 16 * 32


def test_an_encoder_reads_every_token():
    # Scores and their weighted sum over all 16 tokens: 2 * 2 * 16 * 16 = 1024 instead of 512.
    cost = count(dataclasses.replace(DENSE, causal=False), VOCAB, LENGTH)
    assert cost.flops_by_part["attention"] == 2 * (2048 + 1024)
    assert cost.total == count(DENSE, VOCAB, LENGTH).total
