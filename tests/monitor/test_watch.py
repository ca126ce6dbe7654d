"""The newest line gets its alarms; a condition is new once, also across a restart."""

from moe_jax.monitor import DeadExperts, Drift, Drops, Overload, Watch
from tests.monitor.test_alarms import DEAD, EVEN, HOT, layer, line


def test_a_condition_is_new_once_until_it_ends():
    watch = Watch([Overload(above=2.5)])
    loads = [EVEN, HOT, HOT, EVEN, HOT]
    seen = [watch.see(line(step, layer(1, load))) for step, load in enumerate(loads)]
    assert [len(one.new) for one in seen] == [0, 1, 0, 0, 1]
    assert [one.line["active_alarms"] for one in seen] == [0, 1, 1, 0, 1]
    assert seen[1].new == (
        "Overload in layer 1: the largest load is 2.80 times the mean, above 2.5",
    )


def test_only_new_conditions_stop():
    watch = Watch([Overload(above=2.5, stop=True), Drops(above=0.1)])
    lines = [line(1, layer(1, HOT)), line(2, layer(1, HOT, dropped=0.3)), line(3, layer(1, EVEN))]
    assert [watch.see(one).stops for one in lines] == [True, False, False]


def test_a_watch_that_starts_again_sees_what_the_first_would():
    alarms = [DeadExperts(steps=20), Overload(above=1.5, stop=True)]
    lines = [line(step, layer(1, DEAD)) for step in range(0, 60, 10)]
    whole = Watch(alarms)
    seen = [whole.see(one) for one in lines]
    for at in range(len(lines)):
        again = Watch(alarms, [one.line for one in seen[:at]])
        assert [again.see(one) for one in lines[at:]] == seen[at:]


def test_lines_of_the_other_kind_do_not_end_a_condition():
    watch = Watch([Overload(above=2.5)])
    watch.see(line(1, layer(1, HOT)))
    assert "alarms" in watch.see(line(1, layer(1, EVEN), kind="eval")).line
    assert watch.see(line(2, layer(1, HOT))).new == ()


def test_drift_compares_with_the_first_validation_or_with_another_run():
    other = line(90, layer(1, DEAD), kind="eval")
    watch = Watch([Drift(above=0.2), Drift(above=0.2, reference="other")], (), {"other": other})
    first = watch.see(line(10, layer(1, EVEN), kind="eval"))
    assert list(first.line["alarms"]) == ["Drift.1"]
    second = watch.see(line(20, layer(1, DEAD), kind="eval"))
    assert list(second.line["alarms"]) == ["Drift"]


def test_without_alarms_a_line_stays_as_it_is():
    one = line(1, layer(1, HOT))
    assert Watch(()).see(one).line == one
