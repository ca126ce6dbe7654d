"""Runs that grow when an alarm stops them: real runs, and a real process that is killed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import moe_jax as mj
from moe_jax.cli.train_growing import growth_of
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import load
from moe_jax.routing import Limit
from moe_jax.run import workdir
from moe_jax.surgery import growing
from moe_jax.surgery.growing import train_growing
from moe_jax.surgery.growth import Growth
from moe_jax.training.state import named_leaves
from tests.parity.compare_models import recorded
from tests.surgery.small import MOE, config, weights
from tests.surgery.test_api import SMALL, add_tokenizer

SETTINGS = SMALL | {
    "training.steps": 10,
    "training.log_every": 1,
    "training.checkpoint_every": 2,
    "training.keep_last": 9,
    "model.dropout": 0.0,
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


WRONG = {
    "devices": ({"mesh.expert": 2, "mesh.data": 4}, {"copy": [0]}, "growth 2 .copy=.0..: .*expert"),
    "way": ({}, {"parts": 2, "copies": 2}, "exactly one of"),
    "name": ({}, {"prats": 2}, "no 'prats'; did you mean 'parts'"),
    "width": ({}, {"parts": 7}, "factor=7 does not divide"),
    "adapters": ({"model.lora": {"groups": ("experts",)}}, {"parts": 2}, "unset model.lora"),
    "lookahead": ({"model.lookahead": 1}, {"parts": 2}, "model.lookahead=0"),
    "data": (
        {},
        {"parts": 2, "overrides": {"data.batch_size": 16}},
        "growth 2 .*keeps its data: leave the settings data.NAME out",
    ),
    "validations": (
        {"training.alarms": ({"type": "Plateau", "log": "eval", "stop": True},)},
        {"parts": 2},
        "set training.eval_every",
    ),
    "shapes": (
        {},
        {"parts": 2, "overrides": {"model.moe.num_experts": 64}},
        "growth 2 .*change the parameters of the model",
    ),
    "frozen": (
        {"optimizer.frozen_experts": 4},
        {"copy": [0]},
        "give the new value, --config.optimizer.frozen_experts",
    ),
    "schedule": (
        {"training.schedules": ({"setting": "top_k", "steps": (1, 9), "values": (1, 2)},)},
        {"parts": 2},
        "has a schedule of top_k",
    ),
    "optimizer": (
        {},
        {"parts": 2, "overrides": {"optimizer.ema_decay": 0.9}},
        "optimizer.ema_decay gives the optimizer other arrays",
    ),
    "teacher": ({"training.teacher": "nowhere"}, {"parts": 2}, "training.teacher.*nowhere"),
    "setting": ({}, {"parts": 2, "overrides": {"optimizer.rate": 1}}, "optimizer.rate|'rate'"),
}


def test_stages_go_on_with_the_growths_that_began_them(tmp_path, monkeypatch):
    def stopped(experiment, folder, *, say):
        workdir.claim(folder, experiment, {})
        raise KeyboardInterrupt

    monkeypatch.setattr(growing, "train", stopped)
    for growth in ({"parts": 2}, {"parts": 2, "layers": ()}):  # the second has a default value
        with pytest.raises(KeyboardInterrupt):
            train_growing("quickstart", tmp_path, (growth,), SETTINGS)
    for growth in ({"copies": 2}, {"parts": 2, "overrides": {"optimizer.learning_rate": 1e-4}}):
        with pytest.raises(ConfigError, match="holds stages of other growths .*growths.json"):
            train_growing("quickstart", tmp_path, (growth,), SETTINGS)


def test_stages_of_a_released_model_go_on(tmp_path, monkeypatch):
    found = []

    def stopped(experiment, folder, *, say):
        found.append(experiment)
        workdir.claim(folder, experiment, {})
        raise KeyboardInterrupt

    (tmp_path / "hf").mkdir()
    recorded("mixtral", tmp_path / "hf")
    add_tokenizer(tmp_path / "hf")
    monkeypatch.setattr(growing, "train", stopped)
    settings = {n: v for n, v in SETTINGS.items() if not n.startswith("model.")}
    settings |= {"training.start_from": str(tmp_path / "hf")}
    for _ in range(2):  # The second call finds the configuration of the released model.
        with pytest.raises(KeyboardInterrupt):
            train_growing("quickstart", tmp_path / "run", GROWTHS, settings)
    released = load(tmp_path / "hf").config
    assert found[0].model == dataclasses.replace(released, scan_layers=found[0].model.scan_layers)


@pytest.mark.parametrize("case", WRONG)
def test_a_growth_that_cannot_be_is_one_line_before_the_first_stage(tmp_path, case):
    settings, growth, words = WRONG[case]
    with pytest.raises(ConfigError, match=words):
        train_growing("quickstart", tmp_path / "out", ({"parts": 2}, growth), SETTINGS | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("router", "growth", "words"),
    [
        # 9 experts are not 4 equal groups.
        (
            dataclasses.replace(
                MOE.router, select=dataclasses.replace(MOE.router.select, limit=Limit(4, 2))
            ),
            Growth(copy=(0,)),
            "limit.groups",
        ),
        # 9 experts are not 4 devices of equal budgets.
        (
            dataclasses.replace(
                MOE.router, capacity=dataclasses.replace(MOE.router.capacity, devices=4)
            ),
            Growth(copy=(0,)),
            "capacity.devices=4",
        ),
    ],
)
def test_a_configuration_grows_as_its_weights_do_up_to_the_limit_of_the_router(
    router, growth, words
):
    model = config(router, num_experts=8)
    with pytest.raises(ConfigError, match=words):
        growth.model(model)
    larger = Growth(parts=2).model(model)
    assert larger == Growth(parts=2)(weights(model))[0].model
    assert larger.moe.num_experts == 16 and larger.moe.expert_dim == 3


def test_the_flag_of_a_growth_has_its_values_and_settings():
    start = experiment_of("quickstart", SETTINGS)
    text = "copy=0,3 noise=0.01 config.optimizer.learning_rate=1e-4"
    rate = {"optimizer.learning_rate": 1e-4}
    assert growth_of(text, start) == {"copy": [0, 3], "noise": 0.01, "overrides": rate}
    for text, words in {
        "prats=2": "no 'prats'; did you mean 'parts'",
        "parts=two": "parts=two is not an integer",
        "copy=0-3": "not a list of integers such as 0,3",
    }.items():
        with pytest.raises(ConfigError, match=words):
            growth_of(text, start)


def command(folder):
    """A process of ``moe-jax train_growing`` with the settings of this file."""
    settings = [
        f"--config.{name}={value if isinstance(value, str) else repr(value)}"
        for name, value in SETTINGS.items()
    ]
    start = [sys.executable, "-m", "moe_jax", "train_growing", "quickstart", f"--workdir={folder}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.Popen([*start, *settings, "--growth=parts=2"], env=environment)


def killed(folder):
    """Kills a command that trains in ``folder`` once its second stage has saved its first step."""
    process = command(folder)
    while not (folder / "stage1" / "checkpoints" / "6").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def losses(run):
    """The loss of the batch of every step, before its update."""
    return {line["step"]: line["loss"] for line in run.metrics if line["kind"] == "train"}


def test_a_saturated_run_grows_keeps_its_function_and_is_the_same_after_a_kill(tmp_path):
    whole = train_growing("quickstart", tmp_path / "whole", GROWTHS, SETTINGS)
    first = mj.open_run(tmp_path / "whole" / "stage0")
    begun = mj.open_run(tmp_path / "whole" / "stage1", step=5)
    assert (first.step, whole.step) == (5, 10)
    experts = [run.config.model.moe.num_experts for run in (first, whole)]
    assert experts[1] == 2 * experts[0] and whole.config.training.alarms == ()
    assert begun.state.opt_state[-1].count == 5 and [*losses(whole)] == [6, 7, 8, 9, 10]
    # Step 6 has the batch, the keys and the function of a run that does not grow.
    alone = mj.train("quickstart", tmp_path / "alone", SETTINGS | {"training.alarms": ()})
    assert losses(whole)[6] == pytest.approx(losses(alone)[6], rel=1e-5)
    assert losses(whole)[6] != pytest.approx(losses(alone)[1], rel=1e-3)  # of the first batch
    assert begun.evaluate()["loss"] == pytest.approx(first.evaluate()["loss"], rel=1e-5)
    killed(tmp_path / "killed")
    assert command(tmp_path / "killed").wait() == 0
    resumed = mj.open_run(tmp_path / "killed" / "stage1")
    states = (named_leaves(run.state) for run in (whole, resumed))
    jax.tree.map(np.testing.assert_array_equal, *states)
