"""A run that is extended, and one whose rates change: the numbers before and after."""

import json

import numpy as np
import pytest

from tests.system.runs import CONFIG, command, error_line, final, records, train

_CONSTANT = (CONFIG, "--config.optimizer.schedule.type=Constant", "--config.training.eval_every=10")
_RATE = "--config.optimizer.learning_rate=0.001"


def _steps(number):
    return f"--config.training.steps={number}"


@pytest.fixture(scope="module")
def short(source, tmp_path_factory):
    """Flags and folder of a finished run of 20 steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    flags = (*_CONSTANT, source)
    train(folder, *flags, _steps(20))
    return flags, folder


def test_a_plain_change_is_refused_and_the_line_names_the_flag(short):
    flags, folder = short
    line = error_line(command("moe_jax.train", f"--workdir={folder}", *flags, _steps(30), _RATE))
    assert "learning_rate: 0.003 there, 0.001 here; training.steps: 20 there, 30 here" in line
    assert line.endswith("add --change to go on, or use another --workdir")
    assert (folder / "result.json").exists()


def test_an_extended_run_ends_as_one_that_was_long_from_its_start(short, tmp_path):
    flags, folder = short
    long = tmp_path / "long"
    train(long, *flags, _steps(30))
    out = train(folder, *flags, _steps(30), "--change").stdout
    assert "changed     training.steps: 20 up to step 20, 30 from now on" in out
    assert "schedule    Constant over all 30 steps: learning rate 0.003 at step 20" in out
    assert "resuming at step 20 of 30" in out
    (step, leaves, _), (expected_step, expected, _) = final(folder), final(long)
    assert step == expected_step == 30
    assert leaves.keys() == expected.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    for kind in ("train", "eval"):
        assert records(folder, kind) == records(long, kind)
    assert json.loads((folder / "result.json").read_text())["steps"] == 30
    # The same command, and the one without the flag, find the run finished.
    for flag in ((), ("--change",)):
        again = train(folder, *flags, _steps(30), *flag).stdout
        assert again == f"{folder} is finished; its results are in {folder}/report.html\n"
    # Other rates from here on, in the log and in the record of the run.
    train(folder, *flags, _steps(34), _RATE, "--change")
    rates = {record["step"]: record["learning_rate"] for record in records(folder)}
    assert rates[30] == pytest.approx(0.003) and rates[31] == pytest.approx(0.001)
    changes = json.loads((folder / "config.json").read_text())["changes"]
    assert [change["step"] for change in changes] == [20, 30]
    assert changes[1]["settings"] == {
        "optimizer.learning_rate": [0.003, 0.001],
        "training.steps": [30, 34],
    }
