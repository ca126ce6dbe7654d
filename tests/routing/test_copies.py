"""Slots of copies, by hand."""

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.routing import Copies


def test_places_by_hand():
    # Expert 1 has places 0 and 2, experts 0 and 2 have one place each.
    copies = Copies.of(np.array([1, 0, 1, 2]), 3)
    assert copies.order.tolist() == [0, 0, 1, 0]
    assert copies.number.tolist() == [1, 2, 1]
    assert copies.place.tolist() == [[1, 0], [0, 2], [3, 0]]


def test_the_tokens_of_an_expert_alternate_between_its_copies():
    # Tokens 0, 1, 2 choose expert 1, token 3 chooses expert 0; all have slots.
    logits = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    slots = routing.preset("switch")(logits, capacity=4).slots
    assert slots.token.tolist() == [[3, 4, 4, 4], [0, 1, 2, 4]]
    seated = Copies.of(np.array([1, 0, 1]), 2).seat(slots)
    # Tokens 0 and 2 stay in copy 0 (place 0), token 1 goes to copy 1 (place 2), each at its place
    # in the queue of the expert.
    assert seated.token.tolist() == [[0, 4, 2, 4], [3, 4, 4, 4], [4, 1, 4, 4]]
    assert seated.place[:, 0].tolist() == [0, 9, 2, 4]
    assert seated.expert[:, 0].tolist() == [0, 2, 0, 1]
    np.testing.assert_array_equal(seated.gate, slots.gate)
    np.testing.assert_array_equal(seated.weight[np.array([0, 2])].sum(0), slots.weight[1])


def test_a_dropped_choice_has_no_place():
    logits = np.array([[0.0, 1.0], [0.0, 2.0]])
    slots = routing.preset("switch")(logits, capacity=1).slots
    seated = Copies.of(np.array([1, 0, 1]), 2).seat(slots)
    assert seated.token.tolist() == [[0], [2], [2]]
    assert seated.place[:, 0].tolist() == [0, 3] and seated.expert[:, 0].tolist() == [0, -2]


def test_experts_without_a_place_and_experts_that_choose_are_refused():
    with pytest.raises(ConfigError, match=r"each of the 3 experts needs a place.* \[0, 1\]: list"):
        Copies.of(np.array([0, 1, 1]), 3)
    slots = routing.preset("expert_choice")(np.ones((4, 2)), capacity=2).slots
    with pytest.raises(ConfigError, match="copies of experts need tokens that choose"):
        Copies.of(np.array([0, 1, 1]), 2).seat(slots)
