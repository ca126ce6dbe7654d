"""Replays of recorded routing: hits that can be counted by hand."""

import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.offload import (
    LeastRecentlyUsed,
    LeastStale,
    NoPrediction,
    Pinned,
    Traces,
    by_position,
    replayed,
)
from moe_jax.training.routing_log import RoutingRecord

LRU = LeastRecentlyUsed()
# Three layers; every token chooses expert 0 in each of them.
SAME = [[np.array([[0]])] * 3] * 4


def test_least_recently_used_misses_every_expert_of_a_cycle_that_is_too_long():
    # Room for 2 of the 3: the expert that is needed next is the one that has just left.
    found = replayed(SAME, [2] * 3, 2, LRU, NoPrediction())
    assert (found.wanted, found.hits, found.loads) == (12, 0, 12)


def test_least_stale_keeps_a_part_of_the_cycle():
    # Pass 1 ends with layers 1 and 2 on the device: both others were stale, and layer 0 was older.
    # Pass 2 loads layer 0 in place of layer 2, the farthest ahead; layer 1 is a hit; layer 2 takes
    # the place of layer 0, which is stale and older than layer 1. Passes 3 and 4 are as pass 2.
    found = replayed(SAME, [2] * 3, 2, LeastStale(), NoPrediction())
    assert (found.hits, found.loads) == (3, 9)


def test_a_pinned_expert_is_loaded_once():
    policy = Pinned(LRU, frozenset({(0, 0)}))
    # (0, 0) stays after its first load: 3 hits. The others miss all 4 passes.
    assert replayed(SAME, [2] * 3, 2, policy, NoPrediction()).hits == 3


def test_traces_foresee_a_chain_after_they_have_seen_it():
    # Pass 1 teaches 0 -> 1 -> 2, and pass 2 repeats it with both later layers predicted.
    chain = [np.array([[0]]), np.array([[1]]), np.array([[2]])]
    found = replayed([chain, chain], [4] * 3, 2, LRU, Traces([4] * 3))
    assert (found.predicted, found.right, found.hits) == (2, 2, 2)
    # Learned before, they predict the first pass too.
    traces = Traces([4] * 3)
    traces.learn(chain)
    assert replayed([chain, chain], [4] * 3, 2, LRU, traces).hits == 4


def test_choices_that_are_none_ask_for_nothing():
    passes = [[np.array([[0, -1], [-1, -1]]), np.array([[1, -1], [0, -1]])]]
    found = replayed(passes, [2, 2], 4, LRU, Traces([2, 2]))
    assert found.wanted == 3


def test_a_budget_of_no_expert_is_rejected():
    with pytest.raises(ConfigError, match="a budget of 0 bytes does not hold expert 0"):
        replayed(SAME, [2] * 3, 0, LRU, NoPrediction())


def test_recorded_routing_is_replayed_position_by_position(tmp_path):
    record = RoutingRecord(tmp_path)
    choices = [np.arange(6).reshape(1, 3, 2), np.zeros((1, 3, 2), int)]
    record.write(1, {"inputs": np.zeros((1, 3), np.int32)}, choices)
    trace = [one for step in record.passes() for one in by_position(step)]
    assert [[own.tolist() for own in one] for one in trace] == [
        [[[0, 1]], [[0, 0]]],
        [[[2, 3]], [[0, 0]]],
        [[[4, 5]], [[0, 0]]],
    ]
    # Layer 1 asks for expert 0 three times and finds it twice; layer 0 asks for six others.
    found = replayed(trace, [6, 1], 7, LRU, NoPrediction())
    assert (found.wanted, found.hits) == (9, 2)


def test_a_folder_without_recorded_routing_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="holds no recorded routing: train with"):
        list(RoutingRecord(tmp_path).passes())
