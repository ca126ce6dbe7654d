"""A run that is killed, stopped or damaged ends as if nothing had happened, to the last bit."""

import shutil
import signal

import pytest

from moe_jax.training.metrics import read_metrics
from tests.system.runs import Braked, assert_same, command, error_line, train


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    """A function that returns the folder of a run that died after step 25, saved at 20."""
    made = {}

    def run(devices=1):
        if devices not in made:
            folder = tmp_path_factory.mktemp("killed") / "run"
            process = Braked(folder, 25, *whole(devices).flags, devices=devices)
            process.wait_for(checkpoint=20)
            code, _, _ = process.signal(signal.SIGKILL)
            assert code == -signal.SIGKILL
            made[devices] = folder
        return made[devices]

    return run


@pytest.fixture
def copy(killed, tmp_path):
    """A function that copies the folder of the killed run."""
    return lambda devices=1: shutil.copytree(killed(devices), tmp_path / "run")


@pytest.mark.parametrize("devices", [1, 8])
def test_killed_run_ends_as_if_it_had_not_been(whole, copy, devices):
    folder, reference = copy(devices), whole(devices)
    # What follows the last checkpoint was logged and must be logged anew, not twice.
    assert read_metrics(folder)[-1]["step"] == 25
    done = train(folder, *reference.flags, devices=devices)
    assert "resuming at step 20 of 40" in done.stdout
    assert_same(folder, reference.folder)


def test_terminated_run_saves_and_goes_on(whole, copy):
    folder, reference = copy(), whole()
    process = Braked(folder, 33, *reference.flags)
    process.wait_for(checkpoint=30)
    second = command("moe_jax.train", f"--workdir={folder}", *reference.flags)
    assert "another process is training in" in error_line(second)
    code, out, err = process.signal(signal.SIGTERM)
    assert code == 0, err
    stopped = [line for line in out.splitlines() if "SIGTERM" in line]
    assert stopped == [
        "stopped by SIGTERM at step 33, which is saved; run the same command to go on"
    ]
    assert "Traceback" not in err
    assert (folder / "checkpoints" / "33").exists()
    assert not (folder / "result.json").exists()
    done = train(folder, *reference.flags)
    assert "resuming at step 33 of 40" in done.stdout
    assert_same(folder, reference.folder)


def test_damaged_checkpoint_is_reported_and_the_one_before_used(whole, copy):
    folder, reference = copy(), whole()
    newest = folder / "checkpoints" / "20"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = train(folder, *reference.flags)
    warnings = [line for line in done.stderr.splitlines() if "skipped checkpoint step 20" in line]
    assert len(warnings) == 1
    assert victim.name in warnings[0]
    assert "resuming at step 10 of 40" in done.stdout
    assert_same(folder, reference.folder)


def _size(path):
    return path.stat().st_size
