"""Runs that grow when an alarm stops them: real runs, and a real process that is killed."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import moe_jax as mj
from moe_jax.errors import ConfigError
from moe_jax.surgery.growing import train_growing
from moe_jax.training.state import named_leaves
from tests.surgery.test_api import SMALL

SETTINGS = SMALL | {
    "training.steps": 10,
    "training.log_every": 1,
    "training.checkpoint_every": 2,
    "model.moe.every": 1,
    "model.moe.router": {"preset": "mixtral"},
    # The loss falls by less than 100 nats in two steps, so the rule fires at step 5.
    "training.alarms": ({"type": "Plateau", "steps": 2, "least": 100.0, "stop": True},),
}
GROWTHS = ({"parts": 2},)


def test_a_run_needs_an_alarm_that_stops_it(tmp_path):
    for alarms in ((), ({"type": "Plateau"},)):
        with pytest.raises(ConfigError, match="needs a growth and an alarm that stops it"):
            settings = SETTINGS | {"training.alarms": alarms}
            train_growing("quickstart", tmp_path / "out", GROWTHS, settings)
    assert not (tmp_path / "out").exists()


def killed(folder):
    """Kills a process that trains in ``folder`` once its second stage has a checkpoint."""
    text = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        "from tests.surgery.test_growing import GROWTHS, SETTINGS, train_growing\n"
        f"train_growing('quickstart', {str(folder)!r}, GROWTHS, SETTINGS)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", text])
    while not (folder / "stage1" / "checkpoints" / "2").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_saturated_run_grows_keeps_its_function_and_is_the_same_after_a_kill(tmp_path):
    whole = train_growing("quickstart", tmp_path / "whole", GROWTHS, SETTINGS)
    first = mj.open_run(tmp_path / "whole" / "stage0")
    begun = mj.open_run(tmp_path / "whole" / "stage1", step=0)
    assert (first.step, whole.step) == (5, 5)
    experts = [run.config.model.moe.num_experts for run in (first, whole)]
    assert experts[1] == 2 * experts[0] and whole.config.training.alarms == ()
    assert begun.evaluate()["loss"] == pytest.approx(first.evaluate()["loss"], rel=1e-5)
    killed(tmp_path / "killed")
    resumed = train_growing("quickstart", tmp_path / "killed", GROWTHS, SETTINGS)
    states = (named_leaves(run.state) for run in (whole, resumed))
    jax.tree.map(np.testing.assert_array_equal, *states)
