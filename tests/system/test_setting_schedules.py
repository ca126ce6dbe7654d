"""A run with schedules that is killed ends as if nothing had happened, to the last bit."""

import signal

from moe_jax.training.metrics import read_metrics
from tests.system.runs import Braked, assert_same, train

SCHEDULES = (
    '({"setting": "capacity_factor", "steps": (1, 30), "values": (0.5, 1.25)},'
    '{"setting": "balance_weight", "steps": (1, 22), "values": (0.01, 0.1), "shape": "steps"},'
    '{"setting": "input_jitter", "steps": (10, 40), "values": (0.2, 0.0), "shape": "cosine"},'
    '{"setting": "frozen/router", "steps": (1, 22), "values": (1, 0), "shape": "steps"})'
)


def test_a_killed_run_goes_on_with_the_values_of_its_steps(whole, tmp_path):
    flags = [*whole().flags, f"--config.training.schedules={SCHEDULES}"]
    reference, folder = tmp_path / "reference", tmp_path / "run"
    train(reference, *flags)
    process = Braked(folder, 25, *flags)
    process.wait_for(checkpoint=20)
    assert process.signal(signal.SIGKILL)[0] == -signal.SIGKILL
    assert "resuming at step 20 of 40" in train(folder, *flags).stdout
    assert_same(folder, reference)
    lines = {r["step"]: r["settings"] for r in read_metrics(folder) if r["kind"] == "train"}
    assert [lines[step]["balance_weight"] < 0.05 for step in (21, 22)] == [True, False]
    assert [lines[step]["frozen/router"] for step in (21, 22)] == [1, 0]
    assert lines[30]["capacity_factor"] == 1.25
