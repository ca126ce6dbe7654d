import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attend import View
from moe_jax.nn.attention import Attention, AttentionConfig, Details
from moe_jax.nn.positions import RelativeBias, Rotary, YarnScaling, _bucket
from moe_jax.nn.positions import rotate as rotary_positions

GQA = AttentionConfig(width=8, num_heads=4, num_kv_heads=2, head_dim=4)
PLAIN = AttentionConfig(width=8, num_heads=4, num_kv_heads=4, head_dim=4, rotary=None)
POSITIONS = jnp.arange(6)[None] + jnp.zeros((2, 1), jnp.int32)
ONE_DOCUMENT = jnp.ones((2, 6), jnp.int32)
X = jax.random.normal(jax.random.key(1), (2, 6, 8))


@jax.jit
def apply(layer, x, segments, positions):
    return layer(x, View(segments, positions))


def rotate(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """RoPE as complex numbers: feature i and i + D/2 are one, turned by position * base^(-2i/D)."""
    half = len(x) // 2
    angle = position * base ** (-2 * np.arange(half) / len(x))
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def loop(layer: Attention, x, segments, positions) -> np.ndarray:
    """One query at a time over the keys it may see."""
    config = layer.config
    q, k, v, out = (
        np.asarray(p[...], np.float64) for p in (layer.query, layer.key, layer.value, layer.output)
    )
    x = np.asarray(x, np.float64)
    result = np.zeros_like(x)
    base = config.rotary.base if config.rotary else 0
    turn = rotate if config.rotary else lambda vector, position, base: vector
    for b, t, h in np.ndindex(*x.shape[:2], config.num_heads):
        kv = h // (config.num_heads // config.num_kv_heads)
        query = turn(x[b, t] @ q[:, h], positions[b, t], base)
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        keys = [turn(x[b, s] @ k[:, kv], positions[b, s], base) for s in seen]
        weights = np.exp([query @ key / math.sqrt(config.head_dim) for key in keys])
        weights /= weights.sum()
        mixed = sum(w * (x[b, s] @ v[:, kv]) for w, s in zip(weights, seen, strict=True))
        result[b, t] += mixed @ out[h]
    return result


def test_a_gate_multiplies_the_heads_before_the_map_of_the_output():
    gated = dataclasses.replace(GQA, details=Details(output_gate=True))
    layer = Attention(gated, jax.random.key(0))
    # One head passes at a time: its gate is open (sigmoid(0) = 1/2), those of the others closed.
    gate = np.asarray(layer.output_gate[...])
    assert gate.shape == (8, 4, 4)
    whole, parts = Attention(GQA, jax.random.key(0)), []
    x = jnp.abs(X)
    for head in range(4):
        closed = jnp.full((8, 4, 4), -1e3).at[:, head].set(0.0)
        layer.output_gate[...] = closed
        parts.append(apply(layer, x, ONE_DOCUMENT, POSITIONS))
    wanted = apply(whole, x, ONE_DOCUMENT, POSITIONS)
    np.testing.assert_allclose(2 * sum(parts), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [GQA, PLAIN], ids=["rotary, grouped", "plain"])
def test_attention_is_a_loop_over_queries(config):
    layer = Attention(config, jax.random.key(0))
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    expected = loop(layer, X, segments, positions)
    y = apply(layer, X, jnp.asarray(segments), jnp.asarray(positions))
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_the_mask_is_causal_within_segments():
    # Two documents of two tokens and one of padding.
    segments = jnp.array([[1, 1, 2, 2, 0]])
    bias = View(segments, jnp.zeros_like(segments)).bias()
    assert bias.shape == (1, 1, 5, 5) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(
        bias[0, 0] == 0,
        [
            [True, False, False, False, False],
            [True, True, False, False, False],
            [False, False, True, False, False],
            [False, False, True, True, False],
            [False, False, False, False, True],
        ],
    )
    assert float(bias.min()) <= -1e30


def test_rotary_depends_on_relative_positions_alone():
    layer = Attention(GQA, jax.random.key(0))
    y = apply(layer, X, ONE_DOCUMENT, POSITIONS)
    shifted = apply(layer, X, ONE_DOCUMENT, POSITIONS + 17)
    np.testing.assert_allclose(shifted, y, atol=1e-5)
    stretched = apply(layer, X, ONE_DOCUMENT, POSITIONS * 2)
    assert np.abs(stretched - y).max() > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_share_of_each_head_is_rotated(interleaved):
    # Of 8 features 0.5 x 8 = 4 are rotated as a head of 4 would be; the last 4 keep their values.
    x = jax.random.normal(jax.random.key(2), (2, 3, 6, 8))
    whole = Rotary(100.0, interleaved)
    part = dataclasses.replace(whole, share=0.5)
    y = rotary_positions(x, POSITIONS, part)
    np.testing.assert_array_equal(y[..., :4], rotary_positions(x[..., :4], POSITIONS, whole))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    # A rotation keeps lengths, so that half the square of the result has the gradient x.
    half = jax.grad(lambda x: 0.5 * jnp.square(rotary_positions(x, POSITIONS, part)).sum())
    np.testing.assert_allclose(half(x), x, atol=1e-6)


def test_proportional_positions_turn_the_first_pairs_of_the_whole_head():
    # Of the pairs (0, 4), (1, 5), (2, 6), (3, 7) of a head of 8 half are turned, the first ones, by
    # the frequencies that all four would have: base^(-2i/8).
    rotary = Rotary(base=100.0, share=0.5, proportional=True)
    x = jax.random.normal(jax.random.key(0), (1, 1, 4, 8))
    found = np.asarray(rotary_positions(x, jnp.arange(4)[None], rotary))[0, 0]
    whole = np.stack([rotate(row, t, 100.0) for t, row in enumerate(np.asarray(x)[0, 0])])
    np.testing.assert_allclose(found[:, [0, 1, 4, 5]], whole[:, [0, 1, 4, 5]], atol=1e-6)
    np.testing.assert_array_equal(found[:, [2, 3, 6, 7]], np.asarray(x)[0, 0][:, [2, 3, 6, 7]])
    all_pairs = rotary_positions(x, jnp.arange(4)[None], Rotary(100.0, proportional=True))
    np.testing.assert_array_equal(
        all_pairs, rotary_positions(x, jnp.arange(4)[None], Rotary(100.0))
    )


@pytest.mark.parametrize("bias", [False, True])
def test_keys_may_be_the_values_before_their_norm_and_rotation(bias):
    details = Details(qk_norm="head", value_norm=True, keys_as_values=True, qkv_bias=bias)
    layer = Attention(dataclasses.replace(GQA, details=details), jax.random.key(0))
    assert not hasattr(layer, "value") and not hasattr(layer, "value_bias")
    layer.key_norm[...] = jnp.arange(1.0, 5.0)
    mapped = np.einsum("blm,mhd->bhld", X, layer.key[...])
    if bias:
        layer.key_bias[...] = jnp.arange(8.0).reshape(2, 4)
        mapped = mapped + np.arange(8.0).reshape(2, 1, 4)
    unit = mapped / np.sqrt((mapped**2).mean(-1, keepdims=True) + 1e-6)
    kv = layer.project(X, POSITIONS)
    np.testing.assert_allclose(kv["value"], unit, atol=1e-5)
    keys = rotary_positions(jnp.asarray(unit * np.arange(1.0, 5.0)), POSITIONS, Rotary())
    np.testing.assert_allclose(kv["key"], keys, atol=1e-5)


def test_bounds_of_yarn_may_be_equal():
    # Of 8 pairs with base 10000, pair 8 log(300 / 2 pi) / log(10000) = 3.36 turns once in 300
    # positions: pair 3 keeps its wavelength, and that of pair 4 grows by the whole factor.
    plain = 10000.0 ** (-jnp.arange(8) / 8)
    scaled = YarnScaling(4.0, 300, beta_fast=1.0, beta_slow=1.0).frequencies(plain, 10000.0)
    share = np.array([1, 1, 1, 1, *[0.25] * 4])
    np.testing.assert_allclose(scaled, plain * share, rtol=1e-6)


def test_queries_and_keys_may_be_normalized_after_rotation():
    # A rotation keeps the length of a head, so that both orders differ by the learned scale alone.
    before, after = (
        Attention(dataclasses.replace(GQA, details=Details(qk_norm=kind)), jax.random.key(0))
        for kind in ("head", "rotated")
    )
    results = [apply(layer, X, ONE_DOCUMENT, POSITIONS) for layer in (before, after)]
    np.testing.assert_allclose(*results, atol=1e-5)
    for layer in (before, after):
        layer.query_norm[...] = layer.key_norm[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    results = [apply(layer, X, ONE_DOCUMENT, POSITIONS) for layer in (before, after)]
    assert np.abs(results[0] - results[1]).max() > 1e-2
    # A scale of one feature only: scores are products of normalized, rotated queries and keys.
    one = jnp.array([2.0, 0.0, 0.0, 0.0])
    after.query_norm[...] = after.key_norm[...] = one
    key = after.project(X, POSITIONS)["key"]
    np.testing.assert_array_equal(key[..., 1:], 0.0)
    assert np.abs(key[..., 0]).min() > 0


def test_segments_isolate_documents():
    # Two documents packed in a row are each as alone, and neither's change reaches the other.
    layer = Attention(GQA, jax.random.key(0))
    segments = jnp.array([[1, 1, 1, 2, 2, 2]] * 2)
    positions = jnp.array([[0, 1, 2, 0, 1, 2]] * 2)
    y = apply(layer, X, segments, positions)
    for part in (slice(0, 3), slice(3, 6)):
        alone = apply(layer, X[:, part], segments[:, part], positions[:, part])
        np.testing.assert_allclose(y[:, part], alone, atol=1e-6)
    changed = apply(layer, X.at[:, :3].add(1.0), segments, positions)
    np.testing.assert_array_equal(changed[:, 3:], y[:, 3:])


def test_grouped_queries_are_repeated_keys_and_values():
    grouped = Attention(GQA, jax.random.key(0))
    full = Attention(AttentionConfig(8, 4, 4, 4), jax.random.key(1))
    full.query[...], full.output[...] = grouped.query[...], grouped.output[...]
    full.key[...] = jnp.repeat(grouped.key[...], 2, axis=1)  # query heads 0, 1 share kv head 0
    full.value[...] = jnp.repeat(grouped.value[...], 2, axis=1)
    np.testing.assert_allclose(
        apply(grouped, X, ONE_DOCUMENT, POSITIONS),
        apply(full, X, ONE_DOCUMENT, POSITIONS),
        atol=1e-6,
    )


def test_later_tokens_change_nothing_and_get_no_gradient():
    layer = Attention(GQA, jax.random.key(0))
    y = apply(layer, X, ONE_DOCUMENT, POSITIONS)
    changed = apply(layer, X.at[:, 4:].add(1.0), ONE_DOCUMENT, POSITIONS)
    np.testing.assert_array_equal(changed[:, :4], y[:, :4])
    assert np.abs(changed[:, 4:] - y[:, 4:]).min() > 0
    gradient = jax.grad(lambda x: apply(layer, x, ONE_DOCUMENT, POSITIONS)[:, 3].sum())(X)
    np.testing.assert_array_equal(gradient[:, 4:], 0.0)
    assert np.abs(gradient[:, :4]).min() > 0


def published_bucket(relative_position, num_buckets=32, max_distance=128):
    """T5's ``_relative_position_bucket`` for a decoder: key position minus query position."""
    n = np.maximum(-relative_position, 0)
    max_exact = num_buckets // 2
    is_small = n < max_exact
    scaled = np.log(np.maximum(n, 1) / max_exact) / np.log(max_distance / max_exact)
    large = max_exact + (scaled * (num_buckets - max_exact)).astype(np.int32)
    return np.where(is_small, n, np.minimum(large, num_buckets - 1))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_buckets_are_those_of_t5(buckets, max_distance):
    distance = np.arange(300)
    np.testing.assert_array_equal(
        _bucket(jnp.asarray(distance), buckets, max_distance),
        published_bucket(-distance, buckets, max_distance),
    )


def test_buckets_by_hand():
    # 4 buckets, distance 8: 0 and 1 exact, then 2 + floor(log(d / 2) / log(4) * 2): 2 and 3 are in
    # bucket 2, 4 and more in bucket 3.
    found = _bucket(jnp.array([0, 1, 2, 3, 4, 7, 8, 100]), 4, 8)
    np.testing.assert_array_equal(found, [0, 1, 2, 2, 3, 3, 3, 3])


def test_relative_bias_reads_the_table_by_distance():
    bias = RelativeBias(2, jax.random.key(0), buckets=4, max_distance=8)
    table = np.asarray(bias.table[...])
    found = np.asarray(bias(jnp.arange(6), jnp.arange(6)))
    assert found.shape == (1, 2, 6, 6)
    bucket = [0, 1, 2, 2, 3, 3]
    for head, query in np.ndindex(2, 6):
        for key in range(query + 1):
            assert found[0, head, query, key] == table[bucket[query - key], head]


def test_scores_are_softmaxed_in_float32_under_bfloat16():
    layer = Attention(GQA, jax.random.key(0))
    narrow = X.astype(jnp.bfloat16)
    traced = jax.make_jaxpr(lambda x: layer(x, View(ONE_DOCUMENT, POSITIONS)))(narrow)
    exponentials = [e for e in traced.jaxpr.eqns if e.primitive.name == "exp"]
    assert exponentials and all(e.invars[0].aval.dtype == jnp.float32 for e in exponentials)
    y = apply(layer, narrow, ONE_DOCUMENT, POSITIONS)
    assert y.dtype == jnp.bfloat16
    wide = apply(layer, X, ONE_DOCUMENT, POSITIONS)
    assert np.abs(y.astype(jnp.float32) - wide).max() < 0.03 * np.abs(wide).max()
