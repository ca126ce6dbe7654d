"""Streams in which only the data or only the router changes, by hand."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from moe_jax.analysis.drift import by_token, conditional_distance, drift
from tests.analysis.test_atlas import layer, observed

# The router of every first stream sends the tokens 5 and 6 to the experts 0 and 1.
EXPERTS = {5: 0, 6: 1}


def stream(tokens, experts=EXPERTS):
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


def test_choices_by_token_leave_free_experts_out():
    # With 2 experts, index 2 is free.
    found = by_token(layer([[0, 1], [-2, -3]], experts=2), np.array([5, 6]))
    assert {token: counts.tolist() for token, counts in found.items()} == {5: [1, 1], 6: [0, 1]}
    assert conditional_distance(found, {6: np.array([0, 0])}) is None
