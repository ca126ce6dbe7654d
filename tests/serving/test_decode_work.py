"""Bytes that a decode step reads and its FLOPs, against sums by hand."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from moe_jax import routing
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.models.config import AttentionOverride
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig
from moe_jax.serving.decode_work import Decoding, Reads, model_flops, reads, touched
from moe_jax.serving.program import abstract_pages

SWITCH = routing.preset("switch")
ASKED = Decoding(batch=2, context=5, page=4)


@pytest.fixture(scope="module")
def model():
    moe = MoEConfig(every=1, num_experts=4, expert_dim=3, router=SWITCH)
    config = DecoderConfig(
        num_layers=2,
        width=4,
        num_heads=2,
        head_dim=2,
        moe=moe,
        attention_overrides=(AttentionOverride(layers=(1,), details=Details(window=3)),),
        tie_embeddings=False,
        lookahead=1,
    )
    shapes = jax.eval_shape(lambda: Decoder(config, 10, jax.random.key(0)))
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


def test_a_request_takes_whole_pages():
    # Two pages of four entries hold five tokens; the engine has one more page for padding.
    assert ASKED.pages == 2
    assert ASKED.entries == (1 + 2 * 2) * 4


def test_bytes_are_those_of_parameters_experts_and_entries(model):
    pages = abstract_pages(model, ASKED.entries)
    # Attention has 4 maps of 4 x 2 x 2, a layer 2 norms of 4 and a router of 4 x 4.
    layer = 4 * 16 + 2 * 4 + 16
    # The final norm has 4 numbers and the head 4 x 10; the embedding is read for two tokens.
    dense = 2 * layer + 4 + 40 + 2 * 4
    # Both tokens leave out an expert with probability (3 / 4) ** 2. An expert has 2 maps of 4 x 3.
    experts = 2 * (1 - 9 / 16) * 4 * 24
    # A layer keeps a key and a value of 2 heads of 2; layer 1 reaches 3 of the 5 tokens.
    entries = 2 * (5 + 3) * 2 * 2 * 2
    found = reads(model, pages, ASKED, MeshConfig(data=1))
    assert found == Reads(4 * dense, 4 * round(experts), 4 * entries)
    # Two devices read one request each, and all parameters.
    split = reads(model, pages, ASKED, MeshConfig(data=2))
    assert split == Reads(4 * dense, 4 * round(experts), 2 * entries)


def test_requests_that_do_not_divide_are_not_split(model):
    pages = abstract_pages(model, ASKED.entries)
    found = [reads(model, pages, ASKED, MeshConfig(data=n)).cache for n in (1, 3)]
    assert found[0] == found[1]


def test_flops_count_the_scores_of_the_context(model):
    # Per layer: maps of attention, the router and one expert; 2 FLOPs per multiply-add.
    maps = 2 * (2 * 64 + 2 * 16 + 2 * 24) + 2 * 40
    # A key costs 4 multiply-adds for its scores and 4 for its values.
    scores = 2 * 8 * (5 + 3)
    assert model_flops(model, ASKED) == 2 * (maps + scores)


def test_a_large_batch_touches_all_experts():
    moe = MoEConfig(num_experts=8, router=routing.preset("mixtral"))
    assert touched(moe, 1) == pytest.approx(2 / 8)
    assert touched(moe, 2) == pytest.approx(1 - (6 / 8) ** 2)
    assert touched(moe, 1000) == pytest.approx(1.0)
