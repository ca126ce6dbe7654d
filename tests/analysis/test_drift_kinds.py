"""Kinds of a drift on small streams, by hand."""

import numpy as np
import pytest

from moe_jax.analysis.drift import drifted
from moe_jax.analysis.drift_kinds import (
    distances,
    with_kinds,
)
from tests.analysis.test_drift import stream


def test_distances_have_the_names_of_the_layers_and_the_chance_of_the_tokens():
    # The even documents of the first stream hold token 5 alone, and the odd ones 6 alone.
    first = stream([5, 6, 5, 6], copies=1)
    found = distances(first, stream([5, 5, 6, 6], {5: 0, 6: 0}))
    assert found["tokens"] == 0 and found["tokens_by_chance"] == 1
    (layer,) = found["layers"]
    assert layer["layer"] == "0" and layer["same_tokens"] == pytest.approx(np.sqrt(1 / 2))
    # No token id is in both halves, so that the halves have no distance of the routing.
    assert layer["by_chance"] is None and drifted(found, 0.2) == "routing"


def between(tokens=0.0, tokens_by_chance=0.0, same_tokens=0.0, by_chance=0.0):
    layer = {"layer": "1", "load": 0.5, "same_tokens": same_tokens, "by_chance": by_chance}
    return {"tokens": tokens, "tokens_by_chance": tokens_by_chance, "layers": [layer]}


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (between(tokens=0.3), "data"),
        (between(tokens=0.3, tokens_by_chance=0.4), "none"),
        (between(same_tokens=0.3), "routing"),
        (between(same_tokens=0.3, by_chance=0.4), "none"),
        (between(same_tokens=None), "none"),
        (between(tokens=0.3, same_tokens=0.3), "data and routing"),
    ],
)
def test_a_distance_above_limit_and_chance_is_a_drift(found, kind):
    assert drifted(found, 0.2) == kind
    words = with_kinds({"1": "the load is far"}, found, 0.2, "the run")
    assert ("all" in words) == ("data" in kind)
    if kind == "none":
        assert words == {"1": "the load is far: of unknown kind"}
    else:
        named = " and ".join(f"of the {each}" for each in kind.split(" and "))
        assert words["1"].startswith(f"the load is far: drift {named}")


def test_a_drift_of_the_routing_under_the_same_load_is_a_condition():
    words = with_kinds({}, between(same_tokens=0.3), 0.2, "the run")
    assert words == {
        "1": "the experts of the same token ids are at a distance of 0.300 from the run, above "
        "0.2: drift of the routing"
    }


def test_without_another_stream_the_kind_is_unknown():
    assert with_kinds({"1": "the load is far"}, None, 0.2, "the run") == {
        "1": "the load is far: of unknown kind"
    }
