"""Which expert leaves, in the order of evictions."""

import numpy as np

from moe_jax.offload import Clock, LeastRecentlyUsed, LeastStale, Pinned, hottest


def order(policy, used, layer):
    """Held experts in the order in which they leave."""
    left, held = [], sorted(used)
    while held:
        left.append(policy.leaves(held, Clock(layer, used)))
        held.remove(left[-1])
    return left


def test_least_recently_used():
    used = {(0, 1): 3, (1, 0): 1, (2, 2): 2}
    assert order(LeastRecentlyUsed(), used, layer=1) == [(1, 0), (2, 2), (0, 1)]


def test_least_stale():
    used = {(0, 0): 5, (0, 1): 1, (1, 0): 6, (2, 0): 3, (2, 1): 2, (3, 0): 4}
    # The pass computes layer 2. Stale are the experts of layers 0 and 1, the oldest use first. Then
    # layer 3 is needed last of all that is left, and in layer 2 the older use leaves first.
    expected = [(0, 1), (0, 0), (1, 0), (3, 0), (2, 1), (2, 0)]
    assert order(LeastStale(), used, layer=2) == expected


def test_the_first_layer_finds_no_stale_experts():
    # The pass has come back to layer 0. Layer 2 is farther ahead than layer 1.
    used = {(0, 0): 3, (1, 0): 1, (2, 0): 5, (2, 1): 4}
    assert order(LeastStale(), used, layer=0) == [(2, 1), (2, 0), (1, 0), (0, 0)]


def test_pinned_experts_leave_last():
    used = {(0, 0): 1, (0, 1): 3, (1, 0): 2, (1, 1): 4}
    policy = Pinned(LeastRecentlyUsed(), frozenset({(0, 0), (1, 1)}))
    assert order(policy, used, layer=1) == [(1, 0), (0, 1), (0, 0), (1, 1)]


def test_the_hottest_experts_are_those_of_the_largest_loads():
    loads = [np.array([1, 7, 3]), np.array([5, 0, 3])]
    # The two loads of 3 are equal: the earlier layer comes first.
    assert hottest(loads, 3) == {(0, 1), (1, 0), (0, 2)}
