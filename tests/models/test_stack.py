import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.attend import View
from moe_jax.models.stack import Stack, runs
from moe_jax.nn.attention import AttentionConfig
from moe_jax.nn.block import Block, BlockConfig, Context
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig

DENSE = BlockConfig(AttentionConfig(8, 2, 2, 4), FeedForwardConfig(8, 8), moe=None, dropout=0.0)


def sparse(num_experts: int) -> BlockConfig:
    moe = MoEConfig(num_experts=num_experts, expert_dim=8, group_size=4)
    return dataclasses.replace(DENSE, moe=moe)


def shapes(layers: list[BlockConfig], scan: bool) -> Stack:
    return jax.eval_shape(lambda key: Stack(layers, key, scan=scan, remat="none"), KEY)


KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (1, 4, 8))
SEGMENTS = jnp.ones((1, 4), jnp.int32)
CONTEXT = Context(View(SEGMENTS, jnp.arange(4)[None]), SEGMENTS > 0, SEGMENTS)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("", []),
        ("d", [("d", 1)]),
        ("dddd", [("d", 4)]),
        ("dmdm", [("dm", 2)]),
        ("dmmm", [("d", 1), ("m", 3)]),
        ("dmdmd", [("dm", 2), ("d", 1)]),  # an odd tail
        ("mdmdm", [("md", 2), ("m", 1)]),
        ("ddmddmd", [("ddm", 2), ("d", 1)]),  # (d, d, m) twice covers 6, d twice covers 2
        ("dmmmmm", [("d", 1), ("m", 5)]),  # DeepSeek's first dense layer
        ("dm", [("d", 1), ("m", 1)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_runs(layers, expected):
    assert runs(list(layers)) == [(tuple(pattern), count) for pattern, count in expected]


@hypothesis.given(st.text("dm", max_size=12))
def test_runs_concatenate_to_the_layers(layers):
    assert "".join("".join(pattern) * count for pattern, count in runs(list(layers))) == layers


def test_reports_come_in_layer_order():
    # Two sizes of mixture tell the layers apart: (3, d, 2) twice, then 3 experts.
    layers = [sparse(3), DENSE, sparse(2), sparse(3), DENSE, sparse(2), sparse(3)]
    for scan in (True, False):
        stack = shapes(layers, scan)
        _, reports, _ = jax.eval_shape(
            lambda stack: stack(X, CONTEXT, mode=DECODE, rng=None), stack
        )
        assert [aux.counts.load.shape for aux in reports] == [(3,), (2,), (3,), (2,), (3,)]


def test_a_stack_is_its_blocks_each_from_its_own_key():
    @jax.jit
    def both(key):
        stack = Stack([DENSE] * 3, key, scan=True, remat="none")
        y, reports, _ = stack(X, CONTEXT, mode=DECODE, rng=None)
        expected = X
        for one in jax.random.split(key, 3):
            expected, _, _ = Block(DENSE, one)(expected, CONTEXT, mode=DECODE, rng=None)
        return y, expected, reports

    y, expected, reports = both(KEY)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert reports == ()


def test_scanned_layers_are_stacked_and_others_are_not():
    # The pattern (d, m) runs three times; the odd dense layer behind it runs once.
    stack = shapes([DENSE, sparse(2)] * 3 + [DENSE], scan=True)
    assert stack.repeats == (3, 1)
    dense, mixture = stack.parts[0]
    assert dense.feed_forward.up.shape == (3, 8, 8)
    assert mixture.feed_forward.experts.up.shape == (3, 2, 8, 8)
    assert stack.parts[1][0].feed_forward.up.shape == (8, 8)
    unrolled = shapes([DENSE, sparse(2)] * 3, scan=False)
    assert unrolled.repeats == (1,) * 6
    up = [layer.block.feed_forward for layer in unrolled.layers()]
    assert [up[i].up.shape for i in (0, 2, 4)] == [(8, 8)] * 3
    assert [up[i].experts.up.shape for i in (1, 3, 5)] == [(2, 8, 8)] * 3


def test_the_layers_of_a_stack_say_where_they_are():
    # (d, 2 experts) twice, then 3 experts: the last layer is in a part of its own.
    layers = [DENSE, sparse(2), DENSE, sparse(2), sparse(3)]
    found = [(x.index, x.path, x.entry) for x in shapes(layers, scan=True).layers()]
    assert found == [
        (0, ("parts", 0, 0), 0),
        (1, ("parts", 0, 1), 0),
        (2, ("parts", 0, 0), 1),
        (3, ("parts", 0, 1), 1),
        (4, ("parts", 1, 0), None),
    ]
    for scan in (True, False):
        configs = [x.block.config for x in shapes(layers, scan).layers()]
        assert configs == layers
    alone = [(x.path, x.entry) for x in shapes(layers, scan=False).layers()]
    assert alone == [(("parts", i, 0), None) for i in range(5)]


def test_a_layer_is_taken_out_of_its_stacked_form():
    one, two = list(Stack([DENSE] * 2, KEY, scan=True, remat="none").layers())
    assert one.block is two.block and one.block.feed_forward.up.shape == (2, 8, 8)
    for layer in (one, two):
        found = layer.take(layer.block).feed_forward.up
        np.testing.assert_array_equal(found, layer.block.feed_forward.up[layer.index])
    (alone,) = Stack([DENSE], KEY, scan=True, remat="none").layers()
    assert alone.take(alone.block) is alone.block


@pytest.mark.parametrize("scan", [True, False])
def test_caches_have_the_shapes_of_the_layers(scan):
    # Rows, heads, slots and features of one layer; a scan has both layers in one array.
    stack = shapes([DENSE] * 2, scan)
    cache = jax.eval_shape(lambda: stack.empty_cache(3, 5, jnp.float32))
    lead = (2,) if scan else ()
    one = jax.eval_shape(
        lambda: Block(DENSE, KEY).attention.project(jnp.zeros((3, 5, 8)), jnp.zeros((3, 5), int))
    )
    expected = jax.tree.map(lambda leaf: (*lead, *leaf.shape), one)
    for part in cache:
        assert jax.tree.map(lambda leaf: leaf.shape, part[0]["self"]) == expected
    assert len(cache) == (1 if scan else 2)
