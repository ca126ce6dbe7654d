"""Every implementation that runs here has the values and gradients of the dense oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attend import Options, View, attend, blocks, cudnn, splash
from moe_jax.nn.positions import BiasByDistance
from moe_jax.parallel import MeshConfig, make_mesh

LENGTH = 6
# Two documents and one of padding; two documents of three tokens.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 0], [1, 1, 1, 2, 2, 2]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 1, 2]])
TABLE = BiasByDistance(jnp.arange(16.0).reshape(4, 4) / 4, max_distance=8, both_ways=False)
SINKS = jnp.array([0.5, -1.0, 2.0, 0.0])
IDS = jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
CAUSAL = View(*IDS)
BOTH = View(*IDS, causal=False)
CASES = {
    "causal": (CAUSAL, Options(), None),
    "both ways": (BOTH, Options(), None),
    "window": (CAUSAL, Options(window=2), None),
    "window both ways": (BOTH, Options(window=2), None),
    "chunk": (CAUSAL, Options(chunk=2, scale=0.5), None),
    "sinks": (CAUSAL, Options(), SINKS),
    "relative": (View(*IDS, relative=TABLE), Options(), None),
}
# Blocks of two queries, and a last block of one.
LOOPED = functools.partial(blocks.attend, most=2 * LENGTH)
UNEVEN = functools.partial(blocks.attend, most=4 * LENGTH)
CUDNN = functools.partial(cudnn.attend, implementation="xla")
SPLASH = functools.partial(splash.attend, interpret=True)


def arrays(heads=4, kv_heads=2, depth=4, value=4, length=LENGTH):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, heads, length, depth), (2, kv_heads, length, depth), (2, kv_heads, length, value)
    return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))


def sees(view, options, b, i, j):
    """Whether query ``i`` of row ``b`` attends to key ``j``, by the rules one by one."""
    distance = int(POSITIONS[b, i] - POSITIONS[b, j])
    chunk = options.chunk or 10**6
    return (
        SEGMENTS[b, i] == SEGMENTS[b, j]
        and (j <= i or not view.causal)
        and (not options.window or distance < options.window)
        and POSITIONS[b, i] // chunk == POSITIONS[b, j] // chunk
    )


def oracle(q, k, v, sinks, view, options):
    """Attention with whole scores and repeated keys and values."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, repeats, axis=1) for x in (k, v))
    cells = [
        [[sees(view, options, b, i, j) for j in range(LENGTH)] for i in range(LENGTH)]
        for b in range(2)
    ]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * options.scale
    if view.relative is not None:
        scores += view.relative(jnp.arange(LENGTH), jnp.arange(LENGTH))
    powers = jnp.where(jnp.array(cells, bool)[:, None], jnp.exp(scores), 0.0)
    total = powers.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks)[:, None, None]
    return jnp.einsum("bhqk,bhkd->bhqd", powers / total, v)


def both(function, case, given):
    """Values, and gradients of a weighted sum of all of them."""
    view, options, sinks = case

    def value(q, k, v, sinks):
        y = function(q, k, v, sinks, view, options)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    gradient = jax.jit(jax.grad(value, wanted, has_aux=True))
    gradients, y = gradient(*given, sinks)
    return [y, *gradients]


def assert_near(found, wanted, bound=1e-5):
    for one, other in zip(found, wanted, strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) <= bound * np.linalg.norm(other)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", [blocks.attend, LOOPED, UNEVEN], ids=["one", "3", "2"])
def test_blocks_are_attention_with_whole_scores(function, name):
    given = arrays()
    assert_near(both(function, CASES[name], given), both(oracle, CASES[name], given))


@pytest.mark.parametrize("name", ["causal", "window", "chunk", "both ways"])
def test_the_mask_given_to_cudnn_is_exact(name):
    given = arrays()
    assert_near(both(CUDNN, CASES[name], given), both(oracle, CASES[name], given))


@pytest.mark.parametrize("name", [name for name in CASES if name != "relative"])
def test_the_tpu_kernel_is_attention_with_whole_scores(name):
    # Six tokens are padded to a block of 128, and the padding is a segment of its own.
    given = arrays()
    assert_near(both(SPLASH, CASES[name], given), both(oracle, CASES[name], given))


def test_keys_may_be_wider_than_values():
    given = arrays(kv_heads=4, depth=6, value=2)
    wanted = both(oracle, CASES["causal"], given)
    for function in (blocks.attend, LOOPED, SPLASH):
        assert_near(both(function, CASES["causal"], given), wanted)


def test_queries_of_a_cache_see_the_entries_before_theirs():
    # The last two tokens of a row as queries, over a cache of eight entries of which two are free.
    q, k, v = arrays()
    whole = blocks.attend(q, k, v, None, CAUSAL, Options())
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=9.0) for x in (k, v))
    entries = [jnp.pad(x, ((0, 0), (0, 2))) for x in IDS]
    view = View(IDS[0][:, 4:], IDS[1][:, 4:], *entries, start=4)
    for most in (100, 8):
        found = blocks.attend(q[:, :, 4:], k, v, None, view, Options(), most)
        np.testing.assert_allclose(found, whole[:, :, 4:], atol=1e-6)
    np.testing.assert_allclose(attend(q[:, :, 4:], k, v, view), whole[:, :, 4:], atol=1e-6)


def test_blocks_hold_no_scores_of_the_whole_length():
    q, k, v = (jnp.zeros((1, 2, 64, 4)) for _ in range(3))
    view = View(jnp.ones((1, 64), jnp.int32), jnp.arange(64)[None])

    def value(q, most):
        return blocks.attend(q, k, v, None, view, Options(), most).sum()

    def text(most):
        return str(jax.make_jaxpr(jax.grad(functools.partial(value, most=most)))(q))

    assert "64,64]" in text(64 * 64)
    assert "64,64]" not in text(16 * 64)
    assert "16,64]" in text(16 * 64)


@pytest.mark.parametrize("mesh", [MeshConfig(2, model=2), MeshConfig(2, sequence=2)], ids=str)
def test_a_mesh_changes_no_value(mesh):
    given = arrays()
    view, options, sinks = CASES["sinks"]
    wanted = blocks.attend(*given, sinks, view, options)
    functions = [LOOPED] + [SPLASH] * (mesh.sequence == 1)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
        for function in functions:
            call = jax.jit(functools.partial(function, options=options))
            np.testing.assert_allclose(call(*given, sinks, view), wanted, atol=1e-5)
