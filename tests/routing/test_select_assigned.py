"""Selections that assign tokens: balanced, hashed, random and forced."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moe_jax.errors import ConfigError
from moe_jax.routing import Balanced, Forced, Hash, Random, preset
from moe_jax.routing.select.assigned import auction, balanced_table
from tests.routing.helpers import jitted, normal, select, weights

KEY = jax.random.key(0)


def best_total(values: np.ndarray, seats: int) -> float:
    """Returns the largest total where every expert has so many seats."""
    copies = np.repeat(values, seats, axis=1)
    return copies[linear_sum_assignment(copies, maximize=True)].sum()


def test_auction_by_hand():
    # All prefer expert 0, by 3, 1, 2 and 0: its two seats go to tokens 0 and 2.
    values = np.array([[3, 0], [1, 0], [2, 0], [0, 0]], np.float32)
    expert = auction(values, np.ones(4, bool), 1e-3, 2000)
    np.testing.assert_array_equal(expert, [0, 1, 0, 1])


def test_tokens_that_an_auction_leaves_without_a_seat_take_their_best_expert():
    # No round of bids seats nobody.
    values = np.array([[1, 2, 3], [1, 3, 2]], np.float32)
    np.testing.assert_array_equal(auction(values, np.ones(2, bool), 1e-3, 0), [2, 1])


run_auction = jax.jit(auction, static_argnums=(2, 3))


@pytest.mark.parametrize(("tokens", "experts"), [(16, 4), (10, 4), (12, 1)])
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_auction_is_balanced_and_best_within_its_tolerance(tokens: int, experts: int, skew: float):
    tolerance, seats = 1e-3, -(-tokens // experts)
    for seed in range(10):
        values = normal(seed, tokens, experts)
        values[:, 0] += skew
        valid = np.arange(tokens) != 3 if seed % 2 else np.ones(tokens, bool)
        expert = np.asarray(run_auction(values, valid, tolerance, 2000))
        load = np.bincount(expert[valid], minlength=experts)
        assert load.max() <= seats
        if tokens % experts == 0 and valid.all():
            assert (load == tokens // experts).all()
        total = values[np.arange(tokens), expert][valid].sum()
        slack = tokens * tolerance * np.ptp(values)
        best = best_total(values[valid], seats)
        assert best - slack - 1e-4 <= total <= best + 1e-4


def test_equal_values_are_dealt_evenly():
    expert = auction(np.zeros((8, 4), np.float32), np.ones(8, bool), 1e-3, 2000)
    np.testing.assert_array_equal(np.bincount(expert), [2] * 4)


def test_balanced_is_balanced_in_training_and_greedy_at_test_time():
    # As by hand above, in scores that are the exponentials of the values.
    scores = np.exp([[3, 0], [1, 0], [2, 0], [0.5, 0]])
    choice = select(Balanced(), scores, rng=KEY)
    np.testing.assert_array_equal(choice.expert[:, 0], [0, 1, 0, 1])
    np.testing.assert_allclose(choice.gate[:, 0], [np.exp(3), 1, np.exp(2), 1], rtol=1e-6)
    np.testing.assert_array_equal(select(Balanced(), scores).expert, [[0]] * 4)


def test_hash_modulo():
    choice = select(Hash("modulo"), np.full((4, 4), 0.25), ids=[0, 5, 7, 2])
    np.testing.assert_array_equal(choice.expert, [[0], [1], [3], [2]])
    np.testing.assert_array_equal(choice.gate, [[1]] * 4)


def test_hash_balanced_gives_frequent_ids_first_to_the_expert_with_least():
    # Zipf: 1 to expert 0; 1/2, 1/3 and 1/4 to expert 1, which then has 1.08; 1/5 to expert 0 (1.2),
    # 1/6 to expert 1.
    assert balanced_table(6, 2).tolist() == [0, 1, 1, 1, 0, 1]
    choice = select(Hash("balanced", vocab_size=6), np.full((3, 2), 0.5), ids=[4, 3, 0])
    np.testing.assert_array_equal(choice.expert, [[0], [1], [0]])
    # At the size of a vocabulary, experts with more than one id see as many tokens.
    table, frequency = balanced_table(32000, 64), 1 / np.arange(1, 32001)
    load = np.bincount(table, frequency)[np.bincount(table) > 1]
    assert len(load) > 50 and load.max() / load.min() < 1.01


def test_hash_random_is_a_fixed_even_function_of_the_id():
    # MurmurHash3's finaliser maps 0 to 0 and 1 to 0x514E28B7, whose last three bits are 7.
    uniform = np.full((4, 8), 1 / 8)
    choice = select(Hash("random"), uniform, ids=[0, 1, 1, 0])
    np.testing.assert_array_equal(choice.expert, [[0], [7], [7], [0]])
    # 16,000 ids: each expert gets a share of 1/8, with 4.9 standard deviations of a fair draw.
    n = 16_000
    one, other = (
        np.asarray(
            select(Hash("random", seed=seed), np.full((n, 8), 1 / 8), ids=np.arange(n)).expert
        )
        for seed in (0, 1)
    )
    share = np.bincount(one[:, 0]) / n
    assert np.abs(share - 1 / 8).max() <= 4.9 * np.sqrt(1 / 8 * 7 / 8 / n)
    # Another seed agrees by chance alone.
    assert abs((one == other).mean() - 1 / 8) <= 4.9 * np.sqrt(1 / 8 * 7 / 8 / n)


@pytest.mark.parametrize("kind", ["random", "modulo", "balanced"])
def test_hash_asks_for_token_ids(kind: str):
    with pytest.raises(ConfigError, match="Hash routes by token id: pass token_ids"):
        select(Hash(kind), [[0.5, 0.5]])
    assert Hash(kind).needs_token_ids and not Random().needs_token_ids


def test_random_without_a_key_deals_in_turn():
    choice = select(Random(2), np.full((3, 4), 1 / 4))
    np.testing.assert_array_equal(choice.expert, [[0, 1], [2, 3], [0, 1]])
    np.testing.assert_array_equal(choice.gate, np.full((3, 2), 0.5))


def test_random_with_a_key_draws_different_experts_evenly():
    # 20,000 tokens, two of four experts: each expert half the time, within 4.9 deviations.
    n = 20_000
    expert = np.asarray(select(Random(2), np.full((n, 4), 1 / 4), rng=KEY).expert)
    assert (expert[:, 0] != expert[:, 1]).all()
    share = np.bincount(expert.reshape(-1)) / n
    assert np.abs(share - 0.5).max() <= 4.9 * np.sqrt(0.25 / n)


def test_forced_takes_the_record_with_its_own_gates():
    # -2 is expert 1 without a slot: it counts in the sum of the gates and gets nothing.
    part, scores = Forced(2, normalize=True, scale=2), [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]
    choice = select(part, scores, experts=[[2, -2], [0, 1]])
    np.testing.assert_array_equal(choice.expert, [[2, 1], [0, 1]])
    np.testing.assert_allclose(choice.gate, [[0.5, 1.5], [4 / 7, 10 / 7]], rtol=1e-5)
    np.testing.assert_array_equal(choice.wanted, [[True, False], [True, True]])


ROUND_TRIPS = {
    "switch": {},
    "vmoe": {"k": 2},
    "glam": {"k": 2, "normalize": True},
    "gshard": {"k": 2, "normalize": True},
    "fairseq_top2": {"k": 2, "renormalize": True},
    "mixtral": {"k": 2, "normalize": True},
    "loss_free": {"k": 2, "scored_by": "sigmoid"},
    "deepseek_v3": {"k": 2, "scored_by": "sigmoid", "normalize": True, "scale": 2.5},
    "no_token_left_behind": {"k": 4},
    "base": {"scored_by": "sigmoid"},
    "sinkhorn": {},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_record_forced_upon_the_same_logits_gives_the_same_weights(name: str):
    # Two slots for eight tokens, so that some choices are lost, in training, two tokens padding.
    given = {"loss_free": {"k": 2}, "deepseek_v3": {"k": 2, "groups": 2, "keep_groups": 1}}
    router = preset(name, **given.get(name, {}))
    logits, valid = normal(4, 8, 4), np.arange(8) < 6
    logits = logits + (0 if name == "vmoe" else normal(5, 4))
    key = None if name == "vmoe" else KEY  # noise would be part of the recorded gates
    bias = {"bias": normal(6, 4, scale=0.3)} if router.state_shapes(4) else {}
    if not router.mask_padding:
        valid = np.ones(8, bool)
    plan = jitted(router, 2)(logits, valid, key, None, bias)
    assert plan.counts.dropped > 0 or name in ("base", "sinkhorn")
    forced = preset("forced", **ROUND_TRIPS[name])
    again = jitted(forced, 8)(logits, valid, key, None, {"experts": plan.slots.expert})
    np.testing.assert_allclose(weights(again), weights(plan), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(again.slots.expert, plan.slots.expert)
    np.testing.assert_array_equal(again.counts.load, plan.counts.load)


def test_forced_without_a_record_is_greedy_at_test_time_and_refused_in_training():
    choice = select(Forced(2), [[0.2, 0.5, 0.3]])
    np.testing.assert_array_equal(choice.expert, [[1, 2]])
    with pytest.raises(ConfigError, match="Forced needs state=.'experts': .S, 2. recorded"):
        select(Forced(2), [[0.5, 0.5]], rng=KEY)


def test_forced_refuses_a_record_of_another_width():
    with pytest.raises(ConfigError, match="record has 3 choices per token, but Forced has k=2"):
        select(Forced(2), [[0.5, 0.5]], experts=[[0, 1, 0]])


def test_padding_wants_nothing():
    parts = ((Balanced(), {}), (Hash(), {"ids": [0, 1, 2]}), (Random(), {}))
    for part, given in (*parts, (Forced(1), {"experts": [[0], [1], [0]]})):
        choice = select(part, np.full((3, 2), 0.5), [True, False, True], rng=KEY, **given)
        np.testing.assert_array_equal(choice.wanted, [[True], [False], [True]])
