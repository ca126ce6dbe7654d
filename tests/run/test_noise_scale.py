"""A measurement of the gradient noise scale: its experiment, its result and its suggestion."""

import json

import numpy as np
import pytest

from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.schedules import Constant, Cosine
from moe_jax.errors import ConfigError
from moe_jax.run.noise_scale import measurement, measuring, table, write_measurement
from moe_jax.training.metrics import read_metrics
from tests.system import runs


def records(squared, traces):
    """Lines of a run whose batches have 400 target tokens."""
    noise = [
        {"squared_gradient": one, "trace": trace, "tokens": 400.0}
        for one, trace in zip(squared, traces, strict=True)
    ]
    lines = [
        {"kind": "train", "step": step, "gradient_noise": one}
        for step, one in enumerate(noise, start=1)
    ]
    return [*lines, {"kind": "eval", "step": len(lines), "loss": 0.0}]


def test_the_experiment_of_a_measurement():
    optimizer = OptimizerConfig(schedule=Cosine(), warmup_steps=100)
    found = measuring(Experiment("x", optimizer=optimizer), 40)
    assert found.optimizer.schedule == Constant() and found.optimizer.warmup_steps == 20
    training = found.training
    assert (training.noise_scale, training.microbatches, training.log_every) == (True, 2, 1)
    assert training.steps == training.checkpoint_every == 40
    four = measuring(Experiment("x", training=TrainingConfig(microbatches=4)), 40)
    assert four.training.microbatches == 4
    found.check_settings()


def test_the_result_is_the_ratio_of_averages_of_the_second_half(tmp_path):
    # The warm-up has other numbers. Of the second half, |G|^2 is 1 or 3, tr(S) is 1500 or 2500:
    # 2000 / 2 tokens. A batch of 8 rows has 400 tokens, so 20 rows, and 16 is the nearest power.
    squared, traces = [50.0] * 20 + [1.0, 3.0] * 10, [9.0] * 20 + [1500.0, 2500.0] * 10
    found = measurement(records(squared, traces), 8)
    low, high = found.interval
    assert found.tokens == 1000.0 and found.sequences == 16
    assert 700 < low < 1000 < high < 1500
    text = table(found)
    assert "33 to 40          2      2e+03        1,000" in text
    assert "noise scale: 1,000 tokens, 90% interval" in text and "from steps 21 to 40" in text
    assert text.endswith("batches of 1,000 tokens, --config.data.batch_size=16")
    write_measurement(found, tmp_path)
    written = json.loads((tmp_path / "noise_scale.json").read_text())
    assert written["tokens"] == 1000.0 and written["interval"] == [low, high]
    assert (written["sequences"], written["first_step"], written["last_step"]) == (16, 21, 40)


def test_a_batch_has_at_least_one_sequence():
    assert measurement(records([2.0] * 10, [1.0] * 10), 8).sequences == 1


def test_an_upper_end_beyond_the_measurement_is_null(tmp_path):
    found = measurement(records([-1.0, 1.5] * 10, [100.0] * 20), 8)
    write_measurement(found, tmp_path)
    assert json.loads((tmp_path / "noise_scale.json").read_text())["interval"][1] is None
    assert "to inf" in table(found)


@pytest.mark.parametrize(
    ("squared", "advice"),
    [
        ([1.0] * 9, "9 steps have an estimate .* and 10 are needed: raise --steps"),
        ([-1.0] * 20, "the mean gradient is not above its noise: raise --steps or"),
        ([], "0 steps have an estimate"),
    ],
)
def test_a_run_that_measures_nothing_is_one_line(squared, advice):
    with pytest.raises(ConfigError, match=advice) as error:
        measurement(records(squared, [1.0] * len(squared)), 8)
    assert "\n" not in str(error.value)


def test_the_command_measures_a_real_run_and_prints_it_again(tmp_path):
    folder = tmp_path / "run"
    source = f"--config.data.source={runs.write_text(tmp_path / 'text')}"
    flags = (runs.CONFIG, source, f"--workdir={folder}", "--steps=12")
    first = runs.command("moe_jax", "noise_scale", *flags)
    assert first.returncode == 0, first.stderr
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    noise = [line["gradient_noise"] for line in lines]
    # The batches have 8 rows of 32 tokens; the gradient of the whole batch has its own norm.
    assert [one["tokens"] for one in noise] == [8 * 32] * 12
    for line, one in zip(lines, noise, strict=True):
        whole = one["squared_gradient"] + one["trace"] / one["tokens"]
        np.testing.assert_allclose(whole, line["grad_norm"] ** 2, rtol=1e-4)
    assert "Gradient noise scale" in (folder / "report.html").read_text()
    written = json.loads((folder / "noise_scale.json").read_text())
    shown = f"--config.data.batch_size={written['sequences']}"
    again = runs.command("moe_jax", "noise_scale", *flags)
    assert first.stdout.strip().endswith(shown) and again.stdout.strip().endswith(shown)
