import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.models.stack import Stack, runs
from moe_jax.nn.attention import AttentionConfig, causal_bias
from moe_jax.nn.block import Block, BlockConfig, Context
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe import MoEConfig

DENSE = BlockConfig(
    AttentionConfig(8, 2, 2, 4), FeedForwardConfig(8, 8), moe=None, dropout=0.0, norm_eps=1e-6
)


def sparse(num_experts: int) -> BlockConfig:
    return dataclasses.replace(DENSE, moe=MoEConfig(num_experts=num_experts, group_size=4))


X = jax.random.normal(jax.random.key(1), (1, 4, 8))
SEGMENTS = jnp.ones((1, 4), jnp.int32)
CONTEXT = Context(causal_bias(SEGMENTS), jnp.arange(4)[None], SEGMENTS > 0)


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
    found = {}
    for scan in (True, False):
        stack = Stack(layers, jax.random.key(0), scan=scan, remat="none")
        run = jax.jit(lambda stack, x: stack(x, CONTEXT, mode=DECODE, rng=None))
        found[scan] = run(stack, X)
    (y, reports), (expected, others) = found[True], found[False]
    assert [aux.counts.load.shape for aux in reports] == [(3,), (2,), (3,), (2,), (3,)]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert len({float(aux.loss) for aux in others}) == 5  # no two layers report the same
    for report, other in zip(reports, others, strict=True):
        np.testing.assert_array_equal(report.counts.load, other.counts.load)
        np.testing.assert_allclose(report.loss, other.loss, rtol=1e-5)


def test_a_stack_is_its_blocks_each_from_its_own_key():
    stack = Stack([DENSE] * 3, jax.random.key(0), scan=True, remat="none")
    y, reports = stack(X, CONTEXT, mode=DECODE, rng=None)
    expected = X
    for key in jax.random.split(jax.random.key(0), 3):
        expected, _ = Block(DENSE, key)(expected, CONTEXT, mode=DECODE, rng=None)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert reports == ()


def test_scanned_layers_are_stacked():
    stack = Stack([DENSE, sparse(2)] * 3, jax.random.key(0), scan=True, remat="none")
    assert stack.counts == (3,)
    dense, mixture = stack.parts[0]
    assert dense.feed_forward.up[...].shape == (3, 8, 8)
    assert mixture.feed_forward.experts.up[...].shape == (3, 2, 8, 8)
    unrolled = Stack([DENSE, sparse(2)] * 3, jax.random.key(0), scan=False, remat="none")
    assert unrolled.counts == (1,) * 6
