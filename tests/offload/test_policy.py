"""Which expert leaves, in the order of evictions."""

from moe_jax.offload import Clock, LeastRecentlyUsed


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
