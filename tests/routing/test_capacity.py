"""Slots by hand: how many, who is seated first, what is counted."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.errors import ConfigError
from moe_jax.routing import Capacity, Counts, Slots, SoftSlots, Uniform
from moe_jax.routing.capacity import exclusive_cumsum
from moe_jax.routing.select import ExpertChoice, TokenChoice
from tests.routing.helpers import examples, inputs

T, F = True, False


def count(capacity: Capacity, tokens: int, experts: int, choices: int = 1) -> int:
    return capacity.slots(tokens, experts, choices, train=True)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [("floor", 3), ("round", 3), ("ceil", 4)],
)
def test_rounding_of_an_uneven_share(rounding: str, expected: int):
    # 1.25 * 10 / 4 = 3.125
    assert count(Capacity(1.25, minimum=1, rounding=rounding), 10, 4) == expected


def test_an_even_share_is_not_rounded_up():
    # 1.25 * 16 / 4 = 5, and 1.1 * 50 / 5 = 11, which is 11.000000000000002 in binary.
    assert count(Capacity(1.25, minimum=1), 16, 4) == 5
    assert count(Capacity(1.1, minimum=1), 50, 5) == 11


def test_evaluation_has_its_own_factor():
    capacity = Capacity(1.0, 2.0, minimum=1)
    assert capacity.slots(16, 4, 1, train=True) == 4
    assert capacity.slots(16, 4, 1, train=False) == 8


def test_per_choice_counts_assignments_instead_of_tokens():
    # 8 tokens over 4 experts: 2 each, or 4 each if every token has 2 choices.
    assert count(Capacity(1.0, minimum=1), 8, 4, choices=2) == 2
    assert count(Capacity(1.0, minimum=1, per_choice=True), 8, 4, choices=2) == 4


def test_minimum_and_at_most_the_whole_group():
    assert count(Capacity(1.0, minimum=4), 8, 8) == 4  # the share is 1
    assert count(Capacity(1.0, minimum=4), 3, 8) == 3  # no more than there are tokens
    assert count(Capacity(100.0), 8, 4) == 8


@pytest.mark.parametrize(("factor", "slots"), [(1.0, 3), (1.5, 4), (2.0, 6)])
def test_fairseq_rounds_the_share_up_before_the_factor_and_down_after(factor: float, slots: int):
    # ceil(10 / 4) = 3, and int(1.5 * 3) = 4; rounding 2 * 10 / 4 itself gives 5.
    assert count(Capacity(factor, minimum=1, rounding="share"), 10, 4) == slots
    assert count(Capacity(2.0, minimum=1), 10, 4) == 5


def test_evaluation_may_take_a_fraction_of_all_tokens():
    # ceil(0.25 * 10) in evaluation, whatever the factors and the number of experts.
    capacity = Capacity(2.0, 9.0, eval_fraction=0.25, minimum=1)
    assert [capacity.slots(10, e, 1, train=False) for e in (1, 4, 64)] == [3, 3, 3]
    assert capacity.slots(10, 4, 1, train=True) == 5


def test_slots_come_in_multiples_but_never_more_than_tokens():
    # 20 / 4 = 5 is 8 in fours; of 6 tokens there are no 8.
    assert count(Capacity(1.0, minimum=1, multiple=4), 20, 4) == 8
    assert count(Capacity(1.0, minimum=1, multiple=4), 16, 4) == 4
    assert count(Capacity(1.0, minimum=1, multiple=4), 6, 1) == 6


@pytest.mark.parametrize(
    ("dropless", "train", "evaluation"), [("never", 4, 8), ("eval", 4, 16), ("always", 16, 16)]
)
def test_dropless_has_as_many_slots_as_tokens(dropless: str, train: int, evaluation: int):
    capacity = Capacity(1.0, 2.0, dropless=dropless, minimum=1)
    assert capacity.slots(16, 4, 1, train=True) == train
    assert capacity.slots(16, 4, 1, train=False) == evaluation


def test_devices_share_their_slots_so_an_expert_may_take_all():
    assert count(Capacity(1.0, devices=2), 16, 4) == 16
    with pytest.raises(ConfigError, match="capacity.devices=3 does not divide 4 experts"):
        Capacity(devices=3).check(4)


@examples
@given(
    st.floats(0.1, 8), st.integers(1, 300), st.integers(1, 64), st.sampled_from(["floor", "ceil"])
)
def test_capacity_is_the_share_within_its_bounds(factor, tokens, experts, rounding):
    slots = count(Capacity(factor, minimum=2, rounding=rounding), tokens, experts)
    assert min(2, tokens) <= slots <= tokens
    if 2 < slots < tokens:
        assert abs(slots - factor * tokens / experts) < 1


def choose(expert: list[list[int]], gate=0.5, wanted=True, queued=None) -> TokenChoice:
    expert = np.array(expert, np.int32)
    wanted = np.broadcast_to(np.array(wanted), expert.shape)
    gate = np.broadcast_to(np.array(gate, np.float32), expert.shape)
    queued = wanted if queued is None else np.array(queued)
    return TokenChoice(expert, gate, wanted, queued, np.log(gate))


def seat(
    choice: TokenChoice | ExpertChoice,
    capacity: int,
    rule: Capacity,
    best: list[float],
    valid=None,
    experts: int = 2,
    train: bool = True,
) -> tuple[Slots, Counts]:
    """Seats on the experts; ``best`` is each token's best score."""
    scores = np.zeros((len(best), experts), np.float32)
    scores[:, 0] = best
    rng = jax.random.key(0) if train else None
    return rule.seat(choice, scores, inputs(scores, valid, capacity, rng=rng))


# Three tokens, two experts with two slots each. Tokens 0 and 1 prefer expert 0, token 2 expert 1;
# everybody's second choice is the other expert. Empty slots hold 3, lost places are 4.
CROSSED = [[0, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("priority", "token", "place"),
    [
        # First choices: 0 and 1 fill expert 0, 2 takes slot 0 of expert 1. Second choices: 0 takes
        # the last slot of expert 1; 1 and 2 find both experts full.
        ("choice", [[0, 1], [2, 0]], [[0, 3], [1, 4], [2, 4]]),
        # Token 0 sits down twice, token 1 sits down twice, token 2 finds everything full although
        # expert 1 is its first choice.
        ("token", [[0, 1], [0, 1]], [[0, 2], [1, 3], [4, 4]]),
        # The order is 2, 1, 0. First choices: 2 in expert 1, then 1 and 0 in expert 0. Second
        # choices: 2 finds expert 0 full, 1 takes the last slot, 0 finds none.
        ("score", [[1, 0], [2, 1]], [[1, 4], [0, 3], [2, 4]]),
    ],
)
def test_priority(priority: str, token: list, place: list):
    slots, counts = seat(choose(CROSSED), 2, Capacity(priority=priority), [0.5, 0.6, 0.9])
    np.testing.assert_array_equal(slots.token, token)
    np.testing.assert_array_equal(slots.place, place)
    np.testing.assert_array_equal(slots.gate, np.where(np.array(place) < 4, 0.5, 0))
    np.testing.assert_array_equal(slots.weight, [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(counts.demand, [3, 3])
    np.testing.assert_array_equal(counts.load, [2, 2])
    np.testing.assert_array_equal(counts.overflow, [1, 1])
    assert counts.dropped == 2
    assert counts.unrouted == (1 if priority == "token" else 0)


def test_equal_scores_are_seated_in_order():
    slots, _ = seat(choose([[0], [0], [0]]), 2, Capacity(priority="score"), [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(slots.token, [[0, 1], [3, 3]])


# Three tokens want expert 0 first and expert 1 second; token 0 gives its second choice up.
GIVEN_UP = [[T, F], [T, T], [T, T]]


def test_a_choice_given_up_holds_no_place_in_the_queue():
    slots, counts = seat(choose([[0, 1]] * 3, wanted=GIVEN_UP), 2, Capacity(), [0.5] * 3)
    np.testing.assert_array_equal(slots.token, [[0, 1], [1, 2]])
    np.testing.assert_array_equal(counts.demand, [3, 2])
    np.testing.assert_array_equal(counts.load, [2, 2])


def test_gshard_counter_advances_for_a_choice_given_up():
    # Slot 0 of expert 1 stays empty for token 0, token 1 sits in slot 1, token 2 is too late.
    choice = choose([[0, 1]] * 3, wanted=GIVEN_UP, queued=[[T, T]] * 3)
    slots, counts = seat(choice, 2, Capacity(), [0.5] * 3)
    np.testing.assert_array_equal(slots.token, [[0, 1], [3, 1]])
    np.testing.assert_array_equal(slots.weight, [[0.5, 0.5], [0, 0.5]])
    np.testing.assert_array_equal(slots.place, [[0, 4], [1, 3], [4, 4]])
    # What was given up was not asked for: expert 1 saw two wishes and granted one.
    np.testing.assert_array_equal(counts.demand, [3, 2])
    np.testing.assert_array_equal(counts.load, [2, 1])
    np.testing.assert_array_equal(counts.overflow, [1, 1])
    assert (counts.unrouted, counts.valid) == (1, 3)


def test_renormalisation_after_dropping():
    # Token 0 keeps both (0.6 and 0.2 over 0.8), token 1 its first alone (1), token 2 nothing.
    choice = choose([[0, 1], [1, 0], [1, 0]], gate=[[0.6, 0.2]] * 3)
    slots, _ = seat(choice, 2, Capacity(renormalize=True), [0.6] * 3)
    # Expert 0: token 0, then the second choices of 1 and 2, of which 1 fits.
    np.testing.assert_array_equal(slots.token, [[0, 1], [1, 2]])
    # Expert 1: tokens 1 and 2 (first choices) fill it, so token 0's second choice is lost.
    np.testing.assert_allclose(slots.gate, [[1, 0], [0.75, 0.25], [1, 0]], rtol=1e-6)
    np.testing.assert_allclose(slots.weight, [[1, 0.25], [0.75, 1]], rtol=1e-6)
    raw, _ = seat(choice, 2, Capacity(), [0.6] * 3)
    np.testing.assert_allclose(raw.gate, [[0.6, 0], [0.6, 0.2], [0.6, 0]], rtol=1e-6)


def test_renormalisation_of_a_token_that_lost_everything_is_zero():
    choice = choose([[0], [0]], gate=0.6)
    slots, counts = seat(choice, 1, Capacity(renormalize=True), [0.6] * 2)
    np.testing.assert_allclose(slots.gate, [[1], [0]])
    assert counts.unrouted == 1


@pytest.mark.parametrize(
    ("capacity", "token", "demand", "load", "unrouted"),
    [
        # Token 2 finds expert 0 full and takes its second choice; nobody else asks for one.
        (2, [[0, 1], [2, 3]], [3, 1], [2, 1], 0),
        # Tokens 1 and 2 find expert 0 full; 1 comes first to expert 1, and 2 has no third choice.
        (1, [[0], [1]], [3, 2], [1, 1], 1),
    ],
)
def test_no_token_left_behind(capacity: int, token: list, demand: list, load: list, unrouted: int):
    slots, counts = seat(choose([[0, 1]] * 3), capacity, Capacity(reroute=True), [0.5] * 3)
    np.testing.assert_array_equal(slots.token, token)
    np.testing.assert_array_equal(counts.demand, demand)
    np.testing.assert_array_equal(counts.load, load)
    assert counts.unrouted == unrouted


def test_a_first_choice_that_was_kept_leaves_the_second_to_others():
    # Token 0 sits in expert 1 and token 1 in expert 0; token 2 finds expert 1 full and expert 0 as
    # well, although token 0 would have asked for it too.
    choice = choose([[1, 0], [0, 1], [1, 0]])
    slots, _ = seat(choice, 1, Capacity(reroute=True), [0.5] * 3)
    np.testing.assert_array_equal(slots.place, [[1, 2], [0, 2], [2, 2]])


def test_renormalised_gates_sum_to_one_however_small_they_are():
    # Token 1 loses its first choice, which token 0 has, and keeps the second, whose gate is 1e-30.
    choice = choose([[0, 1], [0, 1]], gate=[[1, 1e-30], [1, 1e-30]], wanted=[[T, F], [T, T]])
    slots, _ = seat(choice, 1, Capacity(renormalize=True), [0.5] * 2)
    np.testing.assert_allclose(slots.gate, [[1, 0], [0, 1]])


def test_mixtures_of_padding_alone_are_no_load():
    # Two experts of three slots: six slots of work for a group with a token, none without.
    for valid, load in (([T, F], 3), ([F, F], 0)):
        group = inputs(np.zeros((2, 2, 3)), valid)
        made = Uniform()(group)
        _, counts = Capacity().seat(SoftSlots(3)(made, group), made.scores, group)
        np.testing.assert_array_equal(counts.load, [load, load])
        np.testing.assert_array_equal(counts.demand, [load, load])
        assert counts.valid == sum(valid)


# Four tokens, two devices of two experts. Device 0 has three choices of gates 0.5, 0.9 and 0.6.
ON_DEVICES = ([[0], [1], [0], [2]], [[0.5], [0.9], [0.6], [0.1]])


@pytest.mark.parametrize(
    ("factor", "dropless", "train", "kept"),
    [
        # 4 choices over 2 devices: two each, and the lowest gate goes, though it came first.
        (1.0, "eval", True, [F, T, T, T]),
        (0.5, "eval", True, [F, T, F, T]),
        (1.5, "eval", True, [T, T, T, T]),
        (1.0, "eval", False, [T, T, T, T]),
        (1.0, "always", True, [T, T, T, T]),
    ],
)
def test_devices_give_up_their_lowest_gates(
    factor: float, dropless: str, train: bool, kept: list[bool]
):
    rule = Capacity(factor, dropless=dropless, devices=2)
    choice = choose(ON_DEVICES[0], gate=ON_DEVICES[1])
    slots, counts = seat(choice, 4, rule, [0.5] * 4, experts=4, train=train)
    np.testing.assert_array_equal(np.asarray(slots.expert[:, 0]) >= 0, kept)
    np.testing.assert_array_equal(counts.demand, [2, 1, 1, 0])
    assert counts.dropped == 4 - sum(kept) == counts.unrouted


def test_padding_is_not_counted():
    # Token 1 is padding; token 0 takes the only slot of expert 0, token 2 overflows.
    valid = [T, F, T]
    choice = choose([[0], [0], [0]], wanted=[[T], [F], [T]])
    slots, counts = seat(choice, 1, Capacity(), [0.5] * 3, valid)
    np.testing.assert_array_equal(slots.token, [[0], [3]])
    np.testing.assert_array_equal(counts.demand, [2, 0])
    np.testing.assert_array_equal(counts.load, [1, 0])
    assert (counts.unrouted, counts.valid, counts.dropped) == (1, 2, 1)


def test_expert_choice_with_fewer_tokens_than_slots():
    # Expert 0 took token 2 and found nobody else; expert 1 took tokens 2 and 0. Token 1 is padding.
    choice = ExpertChoice(
        np.array([[2, 1], [2, 0]]), np.array([[0.5, 0.4], [0.3, 0.2]]), np.array([[T, F], [T, T]])
    )
    slots, counts = seat(choice, 2, Capacity(), [0.5] * 4, [T, F, T, T])
    np.testing.assert_array_equal(slots.token, [[2, 4], [2, 0]])
    np.testing.assert_allclose(slots.weight, [[0.5, 0], [0.3, 0.2]])
    np.testing.assert_array_equal(slots.filled, [[T, F], [T, T]])
    assert slots.place is None and slots.gate is None
    np.testing.assert_array_equal(counts.load, [1, 2])
    np.testing.assert_array_equal(counts.overflow, [0, 0])
    assert (counts.unrouted, counts.valid) == (1, 3)  # token 3


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_exclusive_cumsum_across_blocks(rows: int):
    x = np.random.default_rng(rows).integers(0, 2, (rows, 3)).astype(np.float32)
    np.testing.assert_array_equal(exclusive_cumsum(x), np.cumsum(x, 0) - x)
