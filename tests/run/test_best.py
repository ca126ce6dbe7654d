"""The step with the lowest validation loss, from the log and the kept checkpoints."""

import json

import pytest

from moe_jax.errors import ConfigError
from moe_jax.run.best import step_of

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: None}


def folder_with(tmp_path, kept, losses=LOSSES):
    lines = [{"kind": "eval", "step": step, "loss": loss} for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in kept:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


def test_the_best_step_has_the_lowest_loss(tmp_path):
    assert step_of(folder_with(tmp_path, [20, 30, 40]), "best") == 20


@pytest.mark.parametrize("step", [None, 7])
def test_other_steps_are_as_given(tmp_path, step):
    assert step_of(tmp_path, step) == step


def test_a_best_step_that_is_not_kept_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match="step 20 has .* training.keep_best=True, or .* of 30, 40"
    ) as e:
        step_of(folder_with(tmp_path, [40, 30]), "best")
    assert "\n" not in str(e.value)


def test_without_a_validation_no_step_is_best(tmp_path):
    with pytest.raises(ConfigError, match="has no validation yet"):
        step_of(folder_with(tmp_path, [10], {}), "best")
