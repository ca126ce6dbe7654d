"""A run that starts from a finished one and learns from another, killed and gone on with."""

import shutil
import signal

import pytest

from tests.system.runs import Braked, assert_same, records, train


@pytest.fixture(scope="module")
def sources(whole, tmp_path_factory):
    """Copies of a finished run: one to start from, one as the teacher."""
    folder = tmp_path_factory.mktemp("sources")
    return [shutil.copytree(whole().folder, folder / name) for name in ("start", "teacher")]


def flags(whole, start, teacher):
    return (
        *whole().flags,
        f"--config.training.start_from={start}",
        f"--config.training.teacher={teacher}",
        "--config.training.steps=8",
        "--config.training.checkpoint_every=3",
        "--config.training.loss_chunk=8",
        "--config.training.eval_every=0",
    )


def test_killed_it_ends_as_if_it_had_not_been_and_reads_its_start_once(whole, sources, tmp_path):
    start, teacher = sources
    reference, folder = tmp_path / "reference", tmp_path / "run"
    train(reference, *flags(whole, start, teacher))
    process = Braked(folder, 5, *flags(whole, start, teacher))
    process.wait_for(checkpoint=3)
    assert process.signal(signal.SIGKILL)[0] == -signal.SIGKILL
    shutil.rmtree(start)
    moved = teacher.rename(tmp_path / "moved")
    done = train(folder, *flags(whole, start, moved))
    assert "resuming at step 3 of 8" in done.stdout
    assert_same(folder, reference)
    lines = records(folder)
    # It goes on where the other run ended, with what that knew.
    assert lines[0]["loss"] == pytest.approx(records(whole().folder)[-1]["loss"], abs=0.3)
    assert lines[0]["loss"] < records(whole().folder)[0]["loss"] - 0.5
    for line in lines:
        assert line["distillation_loss"] > 0
        share = 0.75 * line["loss"] + 0.25 * line["distillation_loss"]
        routers = 0.01 * line["layers"][0]["losses"]["balance"]
        assert line["objective"] == pytest.approx(share + routers, rel=1e-5)
