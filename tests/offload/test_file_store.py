"""Experts in files are as they were written, and damage is one line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.offload import ExpertCache, FileStore, LeastRecentlyUsed, write_experts
from moe_jax.offload.forms import quantised_expert


def layers(dtype=np.float32):
    """Two layers of three experts."""
    drawn = np.random.default_rng(0)

    def expert():
        up, down = drawn.standard_normal((6, 4)), drawn.standard_normal((4, 6))
        return {"up": up.astype(dtype), "down": down.astype(dtype), "up_bias": np.ones(6, dtype)}

    return [[expert() for _ in range(3)] for _ in range(2)]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_every_expert_is_as_it_was_written(tmp_path, dtype):
    written = layers(dtype)
    write_experts(iter(written), tmp_path / "experts")
    store = FileStore(tmp_path / "experts")
    assert store.experts == (3, 3)
    for layer, index in [(0, 0), (1, 2), (0, 1)]:
        same(store.read((layer, index)), written[layer][index])
        expected = sum(array.nbytes for array in written[layer][index].values())
        assert store.nbytes((layer, index)) == expected


def test_experts_of_one_layer_may_differ_in_their_precision(tmp_path):
    own = layers()[0]
    held = [own[0], quantised_expert(own[1], "int8"), quantised_expert(own[2], "int4")]
    write_experts([held], tmp_path)
    store = FileStore(tmp_path)
    for index, expected in enumerate(held):
        same(store.read((0, index)), expected)
    # 48 weights: 192, 48 and 24 bytes; scales of 6 + 4 outputs and 6 biases take 4 bytes each.
    sizes = [store.nbytes((0, index)) for index in range(3)]
    assert sizes == [192 + 24, 48 + 40 + 24, 24 + 40 + 24]


def test_a_file_cut_short_is_named_by_the_taker(tmp_path):
    write_experts(layers(), tmp_path)
    cache = ExpertCache(FileStore(tmp_path), 10_000, LeastRecentlyUsed())
    path = tmp_path / "layer0001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert next(cache.take(0, [0]))[0] == 0
    cache.prefetch(1, [0])
    with pytest.raises(ConfigError, match="layer0001.safetensors is damaged: .*; write the exp"):
        next(cache.take(1, [0]))
    with pytest.raises(ConfigError, match="layer0001.safetensors is damaged"):
        FileStore(tmp_path)


def test_a_write_that_ends_early_leaves_no_store(tmp_path):
    def cut():
        yield layers()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_experts(cut(), tmp_path)
    with pytest.raises(ConfigError, match="holds no experts, or not all of them"):
        FileStore(tmp_path)


def test_folders_that_hold_experts_and_damaged_indices_are_rejected(tmp_path):
    write_experts(layers(), tmp_path)
    with pytest.raises(ConfigError, match="already holds experts: use a new folder"):
        write_experts(layers(), tmp_path)
    (tmp_path / "offload.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError, match="offload.json is damaged"):
        FileStore(tmp_path)
