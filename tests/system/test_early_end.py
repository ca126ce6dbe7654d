"""A run that its validations end early, killed and resumed, with averaged weights."""

import json
import signal

import numpy as np
import pytest

import moe_jax as mj
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.run.predecessors import open_finished
from moe_jax.training.state import named_leaves
from tests.system.runs import (
    CONFIG,
    Braked,
    assert_same,
    command,
    kill_and_resume,
    records,
    train,
)

# The learning rate grows until it does harm: the loss is lowest at step 2, higher at 4, 6 and 8.
_FLAGS = (
    CONFIG,
    "--config.optimizer.learning_rate=3.0",
    "--config.optimizer.warmup_steps=30",
    "--config.optimizer.ema_decay=0.5",
    "--config.training.eval_every=2",
    "--config.training.patience=3",
    "--config.training.checkpoint_every=3",
    "--config.training.keep_best=true",
    "--config.training.keep_last=1",
)


@pytest.fixture(scope="module")
def ended(source, tmp_path_factory):
    """Flags and folder of a run that ended early, and what it printed."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    flags = (*_FLAGS, source)
    return flags, folder, train(folder, *flags).stdout


def test_it_ends_after_its_patience_and_keeps_the_best_checkpoint(ended):
    flags, folder, out = ended
    losses = {record["step"]: record["loss"] for record in records(folder, "eval")}
    assert list(losses) == [2, 4, 6, 8]
    assert min(losses, key=losses.get) == 2
    assert f"training ends early at step 8: lowest validation loss {losses[2]:.4f} nats" in out
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"2", "8"}
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["ended_early"], result["loss"]) == (8, True, losses[8])
    again = train(folder, *flags).stdout
    assert again == f"{folder} is finished; its results are in {folder}/report.html\n"


def test_it_is_killed_and_ends_alike(ended, tmp_path):
    flags, whole, _ = ended
    folder = tmp_path / "run"
    process = Braked(folder, 7, *flags)
    process.wait_for(checkpoint=6)
    assert process.signal(signal.SIGKILL)[0] == -signal.SIGKILL
    # Two validations without a lower loss came before the checkpoint, and the third ends the run.
    assert "resuming at step 6 of 40" in train(folder, *flags).stdout
    assert_same(folder, whole)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"2", "8"}


def test_a_run_killed_before_its_result_ends_at_the_same_step(ended, tmp_path):
    flags, whole, _ = ended
    (whole / "result.json").unlink()
    assert "resuming at step 8 of 40" in train(whole, *flags).stdout
    assert json.loads((whole / "result.json").read_text())["steps"] == 8
    assert [record["step"] for record in records(whole)] == [*range(1, 9)]


def test_the_best_step_and_both_kinds_of_weights_are_opened(ended):
    _, folder, _ = ended
    losses = {record["step"]: record["loss"] for record in records(folder, "eval")}
    done = command("moe_jax.evaluate", f"--workdir={folder}", "--step=best")
    found = json.loads(done.stdout)
    assert (found["step"], found["loss"]) == (2, losses[2])
    average, trained = (mj.open_run(folder, average=average) for average in (True, False))
    assert average.evaluate()["loss"] == pytest.approx(losses[8], rel=1e-6)
    assert trained.evaluate()["loss"] != pytest.approx(losses[8], rel=1e-3)
    # A run that starts from this one, or learns from it, reads the average too.
    mesh = make_mesh(MeshConfig())
    leaves = named_leaves(open_finished("training.teacher", str(folder)).weights(mesh)[1].params)
    expected = named_leaves(average.state.params)
    assert leaves.keys() == expected.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_a_sharded_average_is_resumed_to_the_last_bit(source, tmp_path):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "expert")]
    rule = ("--config.optimizer.rule.type=Muon", "--config.optimizer.decay_routers=false")
    average = ("--config.optimizer.ema_decay=0.9", "--config.training.steps=30")
    flags = (CONFIG, source, *mesh, *rule, *average)
    train(tmp_path / "whole", *flags, devices=8)
    kill_and_resume(tmp_path / "run", tmp_path / "whole", *flags, devices=8)
