"""Settings of a run whose experts change."""

import dataclasses

import pytest

from moe_jax import routing
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.surgery.destination import with_model
from tests.system import tiny

SCHEDULE = {"setting": "capacity_factor", "steps": (1, 4), "values": (1.0, 1.25)}
VOCAB = 64


def changed(settings, overrides, **changes):
    """The settings of a run whose experts changed in number or in capacity."""
    before = experiment_of(tiny.get_config(), settings)
    moe = dataclasses.replace(before.model.moe, **changes)
    model = dataclasses.replace(before.model, moe=moe)
    return with_model(before, model, overrides, VOCAB)


def number(factor=2):
    return experiment_of(tiny.get_config()).model.moe.num_experts * factor


def test_frozen_experts_are_named_anew_if_their_number_changes():
    frozen = {"optimizer.frozen_experts": 1}
    with pytest.raises(ConfigError, match="give the new value, --config.optimizer.frozen_experts"):
        changed(frozen, {}, num_experts=number())
    after = changed(frozen, {"optimizer.frozen_experts": 2}, num_experts=number())
    assert after.optimizer.frozen_experts == 2
    assert changed(frozen, {}).optimizer.frozen_experts == 1


def test_a_schedule_of_what_a_growth_multiplies_is_given_anew():
    router = experiment_of(tiny.get_config()).model.moe.router
    wider = dataclasses.replace(router.capacity, factor=router.capacity.factor * 2)
    grown = dataclasses.replace(router, capacity=wider)
    scheduled = {"training.schedules": (SCHEDULE,)}
    with pytest.raises(ConfigError, match="has a schedule of capacity_factor"):
        changed(scheduled, {}, router=grown)
    other = {"training.schedules": ({**SCHEDULE, "values": (2.0, 2.5)},)}
    assert changed(scheduled, other, router=grown).training.schedules[0].values == (2.0, 2.5)
    assert changed(scheduled, {}).training.schedules


def test_a_mesh_that_does_not_divide_the_new_experts_is_refused_on_any_machine():
    with pytest.raises(ConfigError, match="is not divisible by mesh.expert=2"):
        changed({"mesh.expert": 2}, {}, num_experts=number() + 1)


def test_copies_within_groups_of_neighbours_are_not_behind_the_frozen_experts():
    before = experiment_of(tiny.get_config())
    select = dataclasses.replace(routing.preset("mixtral").select, limit=routing.Limit(2, 1))
    router = dataclasses.replace(routing.preset("mixtral"), select=select)
    old, new = (
        dataclasses.replace(
            before.model, moe=dataclasses.replace(before.model.moe, router=router, num_experts=n)
        )
        for n in (number(1), number())
    )
    grouped = dataclasses.replace(before, model=old)
    with pytest.raises(ConfigError, match="leave optimizer.frozen_experts at 0"):
        with_model(grouped, new, {"optimizer.frozen_experts": number(1)}, VOCAB)
    assert with_model(grouped, new, {}, VOCAB).model.moe.num_experts == number()


def test_a_teacher_that_does_not_fit_is_found_with_the_settings(tmp_path):
    with pytest.raises(ConfigError, match="training.teacher"):
        changed({"training.teacher": str(tmp_path / "none")}, {}, num_experts=number())
