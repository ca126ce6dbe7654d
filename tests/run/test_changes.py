"""What a change of settings says about the settings and the learning rates."""

import dataclasses

from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.schedules import Linear
from moe_jax.run.changes import Change


def test_the_lines_of_an_extended_run():
    optimizer = OptimizerConfig(schedule=Linear(), learning_rate=1.0, warmup_steps=0)
    before = Experiment("run", optimizer=optimizer, training=TrainingConfig(steps=40))
    after = dataclasses.replace(before, training=TrainingConfig(steps=80))
    change = Change(30, {"training.steps": (40, 80)})
    # A line to zero: 10 of 40 steps are left at step 30, and 49 of 80 at step 31.
    assert change.lines(before, after) == [
        "changed     training.steps: 40 up to step 30, 80 from now on",
        "schedule    Linear over all 80 steps: learning rate 0.25 at step 30 before the change, "
        "0.613 at step 31",
    ]
