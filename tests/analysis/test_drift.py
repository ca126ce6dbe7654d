"""Streams in which only the data or only the router changes, by hand."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from moe_jax.analysis.drift import (
    by_token,
    chance_distance_of_tokens,
    conditional_distance,
    drift,
    halves,
)
from tests.analysis.test_atlas import layer, observed

# The router of every first stream sends the tokens 5 and 6 to the experts 0 and 1.
EXPERTS = {5: 0, 6: 1}


def stream(tokens, experts=EXPERTS, copies=2):
    """A stream of two documents, each with all tokens, or with every second one (``copies=1``)."""
    tokens = [token for token in tokens for _ in range(copies)]
    choices = [[experts[token]] for token in tokens]
    return (observed([layer(choices, experts=2)], tokens, [i % 2 for i in range(len(tokens))]),)


def test_only_the_data_change():
    # The load moves as the tokens do, and each token keeps its expert.
    found = drift(stream([5, 5, 5, 6]), stream([5, 6, 6, 6]))
    distance = jensenshannon([3 / 4, 1 / 4], [1 / 4, 3 / 4], base=2)
    (one,) = found["layers"]
    assert found["tokens"] == pytest.approx(distance) == pytest.approx(one["load"])
    assert one["same_tokens"] == 0
    assert found["drifted"] == "data"
    assert found["words"].startswith("drift: data (distance of the tokens 0.4")


def test_only_the_router_changes():
    # Token 6 moves to expert 0: an id with half of the choices has a divergence of 1.
    found = drift(stream([5, 5, 6, 6]), stream([5, 5, 6, 6], {5: 0, 6: 0}))
    (one,) = found["layers"]
    assert found["tokens"] == 0 and one["load"] > 0
    assert one["same_tokens"] == pytest.approx(np.sqrt(1 / 2)) and one["by_chance"] == 0
    assert found["drifted"] == "routing"
    assert "experts of the same tokens 0.707 in layer 0" in found["words"]


def test_experts_that_are_exchanged_drift_under_the_same_load():
    found = drift(stream([5, 6]), stream([5, 6], {5: 1, 6: 0}))
    (one,) = found["layers"]
    assert one["load"] == 0 and one["same_tokens"] == 1 and found["drifted"] == "routing"


def test_a_layer_is_compared_on_the_tokens_of_its_own_stack():
    # The encoder reads token 5 alone and keeps its expert, the decoder token 6, which moves.
    before = (*stream([5, 5]), *stream([6, 6]))
    found = drift(before, (*stream([5, 5]), *stream([6, 6], {6: 0})))
    assert [one["same_tokens"] for one in found["layers"]] == [0, 1]
    assert found["tokens"] == 0 and found["drifted"] == "routing"


def test_both_change_and_neither():
    both = drift(stream([5, 5, 5, 6]), stream([5, 6, 6, 6], {5: 1, 6: 0}))
    assert both["drifted"] == "data and routing"
    assert drift(stream([5, 6]), stream([6, 5]))["drifted"] == "none"


def test_streams_without_a_common_token_say_so():
    found = drift(stream([5, 5]), stream([6, 6]))
    assert found["tokens"] == 1 and found["layers"][0]["same_tokens"] is None
    assert found["drifted"] == "data" and "no token id is in both streams" in found["words"]


def test_routing_that_varies_by_chance_is_no_drift():
    # In the even and the odd documents of the first stream, each token has another expert, so the
    # router reads more than the token, and the second stream's choice is within that range.
    choices = [[0], [1], [0], [1]]
    even_odd = (observed([layer(choices, experts=2)], [5, 5, 5, 5], [0, 1, 0, 1]),)
    found = drift(even_odd, stream([5, 5, 5, 5]))
    (one,) = found["layers"]
    assert one["by_chance"] == 1 and 0.2 < one["same_tokens"] < 1
    assert found["drifted"] == "none"


def test_two_samples_of_many_ids_are_no_drift_of_the_data():
    # Both streams are drawn from the same 5,000 ids, of which 4,000 tokens repeat few.
    generator = np.random.default_rng(0)
    one, other = (generator.integers(5000, size=4000) for _ in range(2))
    router = dict.fromkeys(range(5000), 0)
    found = drift(stream(one, router, copies=1), stream(other, router, copies=1))
    assert found["tokens_by_chance"] > found["tokens"] > 0.2
    assert found["drifted"] == "none" and "by chance" in found["words"]
    # Ids that the first stream lacks are a drift still.
    assert drift(stream([5, 6] * 9), stream([7, 8] * 9, {7: 0, 8: 1}))["drifted"] == "data"


def test_one_document_has_its_beginning_and_its_end_as_halves():
    np.testing.assert_array_equal(halves(np.array([4, 4, 4, 4])), [True, True, False, False])
    np.testing.assert_array_equal(halves(np.array([4, 5, 5, 6])), [True, False, False, True])
    assert chance_distance_of_tokens(np.array([5, 6]), np.array([0, 0])) == 1
    assert chance_distance_of_tokens(np.array([5, 5]), np.array([1, 3])) == 0


def test_choices_by_token_leave_free_experts_out():
    # With 2 experts, index 2 is free.
    found = by_token(layer([[0, 1], [-2, -3]], experts=2), np.array([5, 6]))
    assert {token: counts.tolist() for token, counts in found.items()} == {5: [1, 1], 6: [0, 1]}
    assert conditional_distance(found, {6: np.array([0, 0])}) is None
