"""Optuna's samplers behind a study that a killed sweep opens again."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.sweeps.axes import axes_of
from moe_jax.sweeps.sampler import OptunaStudy, check_sampler

pytest.importorskip("optuna", reason="pip install 'moe_jax[sweep]'")
AXES = axes_of(["rate=1e-4:1e-2:log", "kind=a,b"])


def value(point):
    return abs(float(point["rate"]) - 1e-3) + (point["kind"] == "b")


def drawn(folder, count, sampler="tpe"):
    """Goes on with a study by so many trials; all points so far."""
    study = OptunaStudy(folder, AXES, sampler, "loss")
    for _ in range(count):
        number, point = study.ask()
        study.tell(number, value(point))
    return study.points


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_a_study_that_is_opened_again_draws_the_same_points(tmp_path, sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes", reason="pip install 'moe_jax[sweep]'")
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = drawn(tmp_path / "whole", 14, sampler)
    drawn(tmp_path / "stopped", 5, sampler)
    drawn(tmp_path / "stopped", 7, sampler)
    assert drawn(tmp_path / "stopped", 2, sampler) == whole
    assert [*whole] == list(range(14))
    assert len({point["rate"] for point in whole.values()}) == 14
    assert all(1e-4 <= float(point["rate"]) <= 1e-2 for point in whole.values())


def test_a_trial_without_a_result_stays_open(tmp_path):
    study = OptunaStudy(tmp_path, AXES, "tpe", "loss")
    first, second = study.ask(), study.ask()
    study.tell(second[0], None)  # a run that fails has no result
    again = OptunaStudy(tmp_path, AXES, "tpe", "loss")
    assert again.open == [first[0]] and again.points[first[0]] == first[1]
    again.tell(first[0], None, diverged=True)
    assert again.open == []


def test_the_sampler_learns_from_results(tmp_path):
    # Random search finds kind=a in half of its points; a sampler that learns, in most late points.
    late = list(drawn(tmp_path, 40).values())[20:]
    assert sum(point["kind"] == "a" for point in late) >= 15


@pytest.mark.parametrize(
    ("name", "trials", "said"),
    [("grid", 3, "add --sampler=tpe"), ("tpe", 0, "add --trials=20")],
)
def test_a_sampler_needs_a_number_of_trials(name, trials, said):
    with pytest.raises(ConfigError, match=said):
        check_sampler(name, trials)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optuna: pip install 'moe_jax\[sweep\]'"):
        check_sampler("tpe", 3)


def test_points_of_failed_trials_are_drawn_again(tmp_path):
    study = OptunaStudy(tmp_path, AXES, "random", "loss")
    drawn = [study.ask() for _ in range(3)]
    study.tell(0, 1.0)
    study.tell(1, None)
    again = OptunaStudy(tmp_path, AXES, "random", "loss")
    assert list(again.points) == [0, 2] and again.open == [2]
    number, point = again.ask()
    assert number == 3 and point == drawn[1][1]
    again.tell(3, 2.0)
    # A trial that was drawn again and has ended is not drawn a third time.
    assert OptunaStudy(tmp_path, AXES, "random", "loss").ask()[1] != drawn[1][1]


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    OptunaStudy(tmp_path, AXES, "random", "loss").ask()
    with pytest.raises(ConfigError, match="--metric=loss, and not accuracy: use another --workdir"):
        OptunaStudy(tmp_path, AXES, "random", "accuracy")
    with pytest.raises(ConfigError, match="holds a sweep over .*, and not over .*: use another"):
        OptunaStudy(tmp_path, AXES[:1], "random", "loss")
