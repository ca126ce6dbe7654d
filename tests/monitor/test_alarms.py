"""Each rule on lines of two layers, whose loads are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from moe_jax.errors import ConfigError
from moe_jax.monitor import (
    DeadExperts,
    Drift,
    Drops,
    LowEntropy,
    Overload,
    Plateau,
    SaturatedGates,
    SilentBalance,
    Watch,
)
from moe_jax.monitor.alarms import load_distance
from moe_jax.training.metrics import load_statistics

EVEN, HOT, DEAD = [0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]


def layer(name, load, dropped=0.0, losses=None):
    numbers = {
        "dropped_fraction": dropped,
        "losses": {"balance": 1.0} if losses is None else losses,
    }
    return {"layer": name, "load": load, **numbers, **load_statistics(np.array(load))}


def line(step, *layers, kind="train"):
    return {"kind": kind, "step": step, "layers": list(layers)}


def test_an_expert_is_dead_when_every_line_of_the_steps_lacks_it():
    lines = [line(step, layer(1, DEAD), layer(3, EVEN)) for step in (10, 20, 30)]
    assert DeadExperts(steps=20).found(lines, None) == {
        "1": "2 of 4 experts (2, 3) had no token in 20 steps"
    }
    # The log covers 20 steps, and 30 would need a line at step 0.
    assert DeadExperts(steps=30).found(lines, None) == {}


def test_one_token_revives_an_expert():
    loads = [DEAD, [0.5, 0.4, 0.1, 0.0], DEAD]
    lines = [line(step, layer(1, load)) for step, load in zip((10, 20, 30), loads, strict=True)]
    found = DeadExperts(steps=20).found(lines, None)
    assert found == {"1": "1 of 4 experts (3) had no token in 20 steps"}


def test_the_largest_load_over_the_mean():
    # 0.7 of the choices on one of 4 experts is 2.8 times the mean share of 0.25.
    lines = [line(1, layer(1, HOT), layer(3, EVEN))]
    words = "the largest load is 2.80 times the mean, above 2.5"
    assert Overload(above=2.5).found(lines, None) == {"1": words}
    assert Overload(above=2.9).found(lines, None) == {}


def test_entropy_as_a_share_of_log_e():
    # Two of four experts share the load evenly: log 2 / log 4 = 0.5.
    lines = [line(1, layer(1, DEAD), layer(3, EVEN))]
    words = "the entropy of the load is 0.500 of log E, below 0.6"
    assert LowEntropy(below=0.6).found(lines, None) == {"1": words}
    assert LowEntropy(below=0.4).found(lines, None) == {}


def test_a_layer_without_a_token_has_no_entropy():
    assert LowEntropy(below=0.6).found([line(1, layer(1, [0.0] * 4))], None) == {}


def test_dropped_choices():
    lines = [line(1, layer(1, EVEN, dropped=0.3), layer(3, EVEN, dropped=0.1))]
    words = "30.0% of the choices are dropped, above 20.0%"
    assert Drops(above=0.2).found(lines, None) == {"1": words}


def test_gates_are_saturated_when_every_line_of_the_steps_is():
    tops = [(0.5, 0.99), (0.99, 0.97), (0.98, 0.99)]
    lines = [
        line(step, layer(1, EVEN) | {"top_score": a}, layer(3, EVEN) | {"top_score": b})
        for step, (a, b) in zip((10, 20, 30), tops, strict=True)
    ]
    # Layer 1 was not saturated at step 10, and 30 steps would need a line at step 0.
    assert SaturatedGates(steps=20, above=0.95).found(lines, None) == {
        "3": "the mean share of the top score was at least 0.970 in 20 steps, above 0.95"
    }
    assert list(SaturatedGates(steps=10, above=0.95).found(lines, None)) == ["1", "3"]
    assert SaturatedGates(steps=30, above=0.95).found(lines, None) == {}
    # Lines from before the alarm was set have no shares.
    earlier = [line(step, layer(1, EVEN)) for step in (10, 20)]
    assert SaturatedGates(steps=10, above=0.0).found(earlier, None) == {}


def test_rules_on_an_evaluated_stream():
    # An evaluation has no losses, and a stream counts as all steps of a rule.
    one = line(5, {**layer(1, DEAD, dropped=0.3), "top_score": 0.99}, kind="eval")
    del one["layers"][0]["losses"]
    assert DeadExperts(steps=100).on_stream(one, None) == {
        "1": "2 of 4 experts (2, 3) had no token in the stream"
    }
    words = SaturatedGates().on_stream(one, None)["1"]
    assert words == "the mean share of the top score was at least 0.990 in the stream, above 0.95"
    assert list(Drops(above=0.2).on_stream(one, None)) == ["1"]
    assert SilentBalance(above=1.5).on_stream(one, None) == {}
    assert list(Drift(above=0.2).on_stream(one, line(1, layer(1, EVEN)))) == ["1"]


def test_an_uneven_load_without_a_loss():
    # The loss of balance of layer 1 has the weight 0; its loss on logits does not count.
    quiet = layer(1, HOT, losses={"balance": 1.0, "z": 3.0}) | {"balance_loss": 0.0}
    absent = layer(3, HOT, losses={}) | {"balance_loss": 0}
    heard, even = (
        layer(5, HOT) | {"balance_loss": 0.01},
        layer(7, EVEN, losses={}) | {"balance_loss": 0},
    )
    older = layer(9, HOT, losses={})  # a line of a run before the field
    found = SilentBalance(above=2.0).found([line(1, quiet, absent, heard, even, older)], None)
    assert list(found) == ["1", "3"]


def test_drift_from_a_reference():
    reference = line(10, layer(1, EVEN), layer(3, EVEN), kind="eval")
    lines = [line(20, layer(1, DEAD), layer(3, EVEN), kind="eval")]
    distance = jensenshannon(DEAD, EVEN, base=2)
    words = f"the load is at a distance of {distance:.3f} from the reference (step 10), above 0.2"
    assert Drift(above=0.2).found(lines, reference) == {"1": words}
    assert Drift(above=0.2).found(lines, None) == {}


def test_drift_is_that_of_the_load_before_capacity():
    # Full experts look balanced: the load that capacity leaves is even, and the demand is not.
    before = line(10, layer(1, EVEN) | {"demand": EVEN}, kind="eval")
    after = line(20, layer(1, EVEN) | {"demand": DEAD}, kind="eval")
    assert list(Drift(above=0.2).found([after], before)) == ["1"]
    older = line(10, layer(1, EVEN), kind="eval")  # a line that has the load after capacity alone
    assert Drift(above=0.2).found([after], older) == {}


_SHARE = st.floats(0, 10, allow_subnormal=False)  # SciPy's distance of subnormal ones is infinite.
_LOADS = st.lists(_SHARE, min_size=5, max_size=5).filter(lambda load: sum(load) > 0.01)


@given(_LOADS, _LOADS)
def test_the_distance_is_scipys(first, second):
    # SciPy's sum of two almost equal loads may be just below 0, whose root is no number.
    theirs = np.nan_to_num(jensenshannon(first, second, base=2), nan=0.0)
    assert load_distance(first, second) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ([1, 0], [0, 1], 1.0),
        ([2, 2], [1, 1], 0.0),
        ([0, 0], [0, 0], 0.0),
        ([0, 0], [1, 1], 1.0),
        ([1, 5e-324], [1, 0], 0.0),  # the least number above 0
    ],
)
def test_distances_at_the_ends(first, second, distance):
    assert math.isclose(load_distance(first, second), distance)


def test_limits_have_ranges():
    with pytest.raises(ConfigError, match=r"above=0\.5 must be at least 1"):
        Overload(above=0.5)


def test_a_plateau_compares_two_means_of_the_loss():
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((9, 4, 2, 2.5, 1.5), 0)]
    # The means of the steps 1 and 2 and of the steps 3 and 4 are 3 and 2.
    words = "the loss fell by 1.0000 in 2 steps, below 1.5"
    assert Plateau(steps=2, least=1.5).found(lines, None) == {"all": words}
    assert Plateau(steps=2, least=0.9).found(lines, None) == {}
    assert Plateau(steps=2, least=1.5).found(lines[1:], None) == {}  # three steps of four
    assert Plateau(steps=2).window == 4 and Plateau().on_stream(lines[0], None) == {}


def test_values_that_were_not_finite_are_no_plateau_and_no_saturation():
    # The log of a resumed run has ``None`` for them.
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((9, 4, None, 2.5, 1.5), 0)]
    assert Plateau(steps=2, least=1.5).found(lines, None) == {}
    scores = [0.99, None, 0.99]
    lines = [
        {"step": step, "layers": [{"layer": 1, "top_score": score}]}
        for step, score in enumerate(scores, 1)
    ]
    assert SaturatedGates(steps=2, above=0.9).during(lines, "two steps") == {}


def test_a_plateau_of_validations_reads_no_training_loss():
    """The training loss falls by 4 in two steps, and the validation loss stays at 3."""
    rule = Plateau(steps=2, least=0.1, log="eval", stop=True)
    watch, stops = Watch((rule,)), []
    for step in range(1, 7):
        watch.see({"kind": "train", "step": step, "loss": 20.0 - 2 * step})
        stops.append(watch.see({"kind": "eval", "step": step, "loss": 3.0}).stops)
    # Four steps lie behind the validation of step 5; a lasting condition stops no run again.
    assert stops == [False, False, False, False, True, False]
    assert (Plateau().log, Plateau().kind, rule.kind) == ("train", "train", "eval")
