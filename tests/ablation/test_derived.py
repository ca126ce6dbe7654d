import numpy as np
import pytest

from moe_jax.ablation.derived import (
    JOULES_PER_FLOP,
    axis_of,
    by_arm,
    by_size,
    paired,
    ratio,
    smoothed,
    step_seconds,
    with_thresholds,
)
from moe_jax.ablation.sizes import MeasuredSeries
from tests.ablation.records import FULL, STEPS, divergent, record, records


def test_smoothing_is_the_mean_of_the_last_twentieth():
    steps, losses = smoothed([[step, float(step)] for step in range(1, 41)])
    assert steps.tolist() == list(range(2, 41))
    np.testing.assert_allclose(losses, steps - 0.5)
    assert smoothed([[5, 2.0], [10, 1.0]])[1].tolist() == [2.0, 1.0]


def test_a_threshold_is_the_last_loss_of_the_arm_with_the_same_seed():
    lines = with_thresholds(FULL, [line for line in records() if line["seed"] < 2])
    # A nat is a quarter of the way; with seed 1 the dense arm is .01 worse, a tenth of a step.
    assert [line["steps_to"] for line in lines] == [STEPS, 30, STEPS, 30]
    assert lines[0]["seconds_to"] == pytest.approx(STEPS * 10 / 100)
    assert lines[1]["seconds_to"] == pytest.approx(30 * 10 / 50)


def test_seconds_of_a_step_are_the_median_over_seeds():
    speeds = (100.0, 50.0, 10.0)
    lines = [record(FULL, "dense", seed, 3.0, speed) for seed, speed in enumerate(speeds)]
    # Steps have 10 tokens.
    assert step_seconds(lines) == {"dense": pytest.approx(0.2)}
    assert step_seconds([divergent(FULL, "dense", 0, 10)]) == {}


def test_a_dip_is_not_yet_there():
    line = record(FULL, "switch", 0, 2.0)
    line["curve"] = [[10, 3.0], [20, 1.9], [30, 2.5], [40, 2.0]]
    dense = record(FULL, "dense", 0, 2.0)
    (_, found) = with_thresholds(FULL, [dense, line])
    assert found["steps_to"] == 40


def test_who_never_gets_there_has_no_threshold():
    lines = with_thresholds(FULL, [record(FULL, "dense", 0, 2.0), record(FULL, "switch", 0, 2.1)])
    assert lines[0]["steps_to"] == STEPS
    assert "steps_to" not in lines[1]
    (alone,) = with_thresholds(FULL, [record(FULL, "switch", 0, 2.1)])
    assert "steps_to" not in alone


def test_a_run_that_diverged_gets_nowhere_and_sets_no_threshold():
    dense, switch = record(FULL, "dense", 0, 3.0), record(FULL, "switch", 0, 2.0)
    lines = with_thresholds(FULL, [dense, switch | {"diverged": 30}])
    assert ["steps_to" in line for line in lines] == [True, False]
    nowhere = dense | {"diverged": 0, "curve": []}
    assert not any("steps_to" in line for line in with_thresholds(FULL, [nowhere, switch]))


def test_comparisons_are_of_common_seeds():
    arms = by_arm(FULL, records()[:-1])
    assert {arm: len(mine) for arm, mine in arms.items()} == {"dense": 3, "switch": 2}
    found = paired(arms["dense"], arms["switch"], "loss")
    assert found.mean == pytest.approx(1.005)
    assert paired(arms["dense"], arms["switch"][:1], "loss") is None
    assert paired(arms["dense"], arms["switch"], "purity") is None
    assert ratio(arms["switch"], arms["dense"], "tokens_per_second") == pytest.approx(0.5)
    assert ratio(arms["switch"], arms["dense"], "purity") is None


def test_what_training_has_spent_grows_to_the_whole():
    line = records()[0]
    assert axis_of(line, "tokens")[[0, -1]].tolist() == [10, line["tokens"]]
    assert axis_of(line, "flops")[-1] == line["training_flops"]
    np.testing.assert_allclose(axis_of(line, "energy"), axis_of(line, "flops") * JOULES_PER_FLOP)


def test_the_energy_of_a_flop_is_that_of_glams_second_figure_too():
    assert pytest.approx(JOULES_PER_FLOP, rel=0.01) == 213e6 * 3600 / (280e9 * 6 * 96.6e9)
    utilisation = 280e9 * 6 * 96.6e9 / (574 * 3600 * 1024 * 275e12)
    assert utilisation == pytest.approx(0.28, abs=0.005)


def test_a_threshold_is_of_validation_losses_if_all_runs_have_them():
    # The dense model ends at 3.0; switch is there from the third validation on, step 30 of 40.
    def validated(arm, losses, **more):
        curve = [[10 * (place + 1), loss] for place, loss in enumerate(losses)]
        return record(FULL, arm, 0, losses[-1], eval_curve=curve, **more)

    dense, switch = with_thresholds(
        FULL, [validated("dense", (4.0, 3.5, 3.2, 3.0)), validated("switch", (3.0, 3.1, 2.9, 2.8))]
    )
    assert dense["steps_to"] == 40
    assert switch["steps_to"] == 30
    assert switch["seconds_to"] == pytest.approx(30 * 10 / 100.0)
    # Equal FLOPs per step: three quarters of the steps are three quarters of the FLOPs.
    assert switch["compute_multiplier"] == pytest.approx(4 / 3)
    dear = validated("switch", (3.0, 3.1, 2.9, 2.8), training_flops=2 * dense["training_flops"])
    costly = with_thresholds(FULL, [validated("dense", (4.0, 3.5, 3.2, 3.0)), dear])[1]
    assert costly["compute_multiplier"] == pytest.approx(2 / 3)
    # One run without validations: the training losses are compared again.
    mixed = [validated("dense", (4.0, 3.0)), record(FULL, "switch", 0, 2.5)]
    assert with_thresholds(FULL, mixed)[1]["steps_to"] > 30


def test_a_series_of_sizes_is_compared_with_its_own_reference():
    # Two common seeds with differences of 0.5 and 0.7; the dense arm has one seed alone.
    lines = [record(FULL, "switch", seed, loss) for seed, loss in ((0, 2.5), (1, 2.7), (2, 9.0))]
    lines += [record(FULL, "dense", seed, 2.0) for seed in (0, 1)]
    series = MeasuredSeries("halve", "dense", {0.5: "switch"})
    (effect,) = by_size(FULL, series, lines).values()
    assert effect.mean == pytest.approx(0.6)
    swapped = MeasuredSeries("double", "switch", {2.0: "dense", 0.5: "switch"})
    found = by_size(FULL, swapped, lines)
    assert list(found) == [0.5, 2.0]
    assert [effect.mean for effect in found.values()] == pytest.approx([0.0, -0.6])
    assert by_size(FULL, series, lines[:-1]) == {}  # one common seed
    assert by_size(FULL, series, lines[:3]) == {}
