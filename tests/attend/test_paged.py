"""Attention on pages is attention on each sequence alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attend import Options, PagedView, View, attend
from moe_jax.nn.positions import BiasByDistance

HEADS, KV_HEADS, WIDTH, PAGE = 4, 2, 3, 4
# Sequences A and B read one token, the 11th and the 2nd; C reads the 6th to 8th, of which B shares
# no page. Pages are in no order, and page 0 is empty.
TABLES = (jnp.array([[5, 2, 7], [3, 0, 0]]), jnp.array([[6, 1, 0]]))
POSITIONS = jnp.array([10, 1, 5, 6, 7])
ENTRIES = jnp.array([7 * 4 + 2, 3 * 4 + 1, 1 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3])
SEQUENCES = {(5, 2, 7): [0], (3,): [1], (6, 1): [2, 3, 4]}
RELATIVE = BiasByDistance(jnp.arange(16.0).reshape(4, 4) / 4, max_distance=8, both_ways=False)


@pytest.mark.parametrize("relative", [None, RELATIVE])
@pytest.mark.parametrize(
    ("options", "reach"),
    [(Options(), 0), (Options(window=3), 3), (Options(window=6), 6), (Options(chunk=4), 4)],
)
def test_each_sequence_attends_to_its_own_pages(options, reach, relative):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (5, HEADS, 1, WIDTH))
    # Entries of no token are large, so that a query which reads one of them is wrong.
    pool = jax.random.normal(keys[1], (2, 1, KV_HEADS, 8 * PAGE, WIDTH)) * 100
    new = jax.random.normal(keys[2], (2, 5, KV_HEADS, 1, WIDTH))
    view = PagedView(POSITIONS[:, None], ENTRIES, TABLES, relative, (1, 3), PAGE)
    kv = {name: view.put(pool[i], new[i]) for i, name in enumerate(("key", "value"))}

    def mix(q, kv, view):
        return attend(q, kv["key"], kv["value"], view, options)

    found = view.over(mix, q, kv, reach)
    for pages, tokens in SEQUENCES.items():
        entries = np.concatenate([np.arange(PAGE) + page * PAGE for page in pages])
        length = int(POSITIONS[tokens[-1]]) + 1
        k, v = (kv[name][:, :, entries[:length]] for name in ("key", "value"))
        np.testing.assert_array_equal(k[0, :, length - 1], new[0, tokens[-1], :, 0])
        queries = (
            jnp.zeros((1, HEADS, length, WIDTH))
            .at[0, :, -len(tokens) :]
            .set(q[jnp.array(tokens), :, 0].swapaxes(0, 1))
        )
        ones, places = jnp.ones((1, length), jnp.int32), jnp.arange(length)[None]
        alone = attend(queries, k, v, View(ones, places, relative=relative), options)
        expected = alone[0, :, -len(tokens) :].swapaxes(0, 1)
        np.testing.assert_allclose(found[jnp.array(tokens), :, 0], expected, atol=2e-5, rtol=1e-5)


def test_a_window_reads_the_pages_that_it_reaches():
    view = PagedView(POSITIONS[:, None], ENTRIES, TABLES, lengths=(1, 3), page=PAGE)
    read = []

    def mix(q, kv, view):
        read.append(kv["key"][:, 0, :, 0].astype(int) // PAGE)
        return q

    # The key of an entry is its index. A window of 3 spans 2 pages for one query and for three.
    pool = jnp.arange(8.0 * PAGE).reshape(1, 1, -1, 1)
    view.over(mix, jnp.zeros((5, HEADS, 1, WIDTH)), {"key": pool}, reach=3)
    assert read[0][:, ::PAGE].tolist() == [[2, 7], [3, 0]]
    assert read[1][:, ::PAGE].tolist() == [[6, 1]]
