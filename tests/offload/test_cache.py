"""A cache gives every expert that a layer asks for, and stays within its budget."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import ConfigError
from moe_jax.offload import ExpertCache, HostStore, LeastRecentlyUsed
from tests.offload.stores import Broken, named, store


def cache_of(experts, *, room, **kwargs):
    """A cache with room for a number of experts of 8 bytes."""
    return ExpertCache(store(*experts), 8 * room, LeastRecentlyUsed(), **kwargs)


def taken(cache, layer, experts):
    return [index for index, _ in cache.take(layer, experts)]


def test_held_experts_come_first_and_each_expert_once():
    cache = cache_of([4], room=3, workers=0)
    assert taken(cache, 0, [3, 1]) == [3, 1]
    # 1 is held and 2 is not; the second 1 is the same expert.
    assert sorted(taken(cache, 0, [2, 1, 1])) == [1, 2]
    assert (cache.counts.wanted, cache.counts.hits, cache.counts.loads) == (4, 1, 3)
    assert cache.counts.bytes_moved == 3 * 8


def test_room_for_one_expert_is_enough_for_a_layer_with_four():
    cache = cache_of([4], room=1)
    assert sorted(taken(cache, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]
    assert len(cache.held) == 1


def test_the_least_recently_used_expert_leaves():
    cache = cache_of([3, 3], room=3, workers=0)
    taken(cache, 0, [0, 1])
    taken(cache, 1, [0])
    taken(cache, 0, [0])
    # The last uses are, from the oldest: (0, 1), (1, 0), (0, 0).
    taken(cache, 1, [2])
    assert cache.held == ((0, 0), (1, 0), (1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prefetched_expert_is_a_hit_and_the_prediction_is_counted(workers):
    cache = cache_of([4, 4], room=4, workers=workers)
    taken(cache, 0, [0])
    cache.prefetch(1, [2, 3])
    while len(cache.held) < 3:
        threading.Event().wait(0.001)
    assert sorted(taken(cache, 1, [2, 1])) == [1, 2]
    found = cache.counts
    assert (found.wanted, found.hits, found.loads) == (3, 1, 4)
    assert (found.predicted, found.right, found.accuracy, found.foreseen) == (2, 1, 1 / 2, 1 / 3)


def test_a_prefetch_leaves_the_experts_of_the_computed_layer():
    cache = cache_of([4, 4], room=2, workers=0)
    taken(cache, 1, [0])
    taken(cache, 0, [0])
    cache.prefetch(1, [1, 2])
    # (1, 0) leaves for (1, 1). There is no room for (1, 2) unless (0, 0) leaves, which it must not.
    assert cache.held == ((0, 0), (1, 1))


def test_a_load_that_waits_is_cancelled_when_a_layer_asks_for_another_expert():
    store_read, gate, order = store(4, 4), threading.Event(), []

    class Slow(HostStore):
        def read(self, expert):
            order.append(expert)
            if expert == (1, 0):
                gate.wait(10)
            return super().read(expert)

        def nbytes(self, expert):
            return 8

    cache = ExpertCache(Slow(store_read._layers), 64, LeastRecentlyUsed())
    cache.prefetch(1, [0, 1, 2])  # one thread: (1, 1) and (1, 2) wait for (1, 0)
    found = cache.take(0, [3])
    threading.Timer(0.01, gate.set).start()
    assert next(found)[0] == 3
    assert order == [(1, 0), (0, 3)]
    assert cache.counts.stall_seconds > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_expert_that_cannot_be_read_is_named_when_it_is_taken(workers):
    cache = ExpertCache(Broken(store(3, 3)._layers), 8, LeastRecentlyUsed(), workers=workers)
    cache.prefetch(1, [1])
    for _ in range(2):  # The error does not stay behind as a load that never ends.
        with pytest.raises(ConfigError, match=r"expert \(1, 1\) is cut short: write it again"):
            taken(cache, 1, [1])
    cache.prefetch(1, [1])  # The room of a failed load that nobody asks for is free again.
    assert taken(cache, 0, [0]) == [0]


def test_a_budget_below_one_expert_is_rejected():
    layers = [[named(0, 0), named(0, 1, size=5)]]
    with pytest.raises(ConfigError, match="19 bytes does not hold expert 1 of MoE layer 0"):
        ExpertCache(HostStore(layers), 19, LeastRecentlyUsed())


def test_a_taker_that_stops_early_keeps_no_expert_in_place():
    cache = cache_of([4], room=1, workers=0)
    next(cache.take(0, [0, 1]))
    assert taken(cache, 0, [2]) == [2]


ASKED = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 4), min_size=1), st.booleans()),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(ASKED, st.integers(1, 6), st.integers(0, 2))
def test_every_expert_is_right_and_the_budget_holds(asked, room, workers):
    """Sizes differ: expert ``e`` of a layer has ``4 (e + 1)`` bytes."""
    layers = [[named(i, e, size=e + 1) for e in range(5)] for i in range(2)]
    most = []

    def put(arrays):
        most.append(cache.nbytes)
        return jax.device_put(arrays)

    cache = ExpertCache(HostStore(layers), 20 * room, LeastRecentlyUsed(), put=put, workers=workers)
    for layer, experts, ahead in asked:
        if ahead:
            cache.prefetch(1 - layer, experts)
        found = dict(cache.take(layer, experts))
        assert found.keys() == set(experts)
        for expert, arrays in found.items():
            np.testing.assert_array_equal(arrays["up"], layers[layer][expert]["up"])
        assert cache.nbytes <= 20 * room
    cache.close()
    assert all(size <= 20 * room for size in most)
