"""Real processes on this machine train one run; one dies; others, or other meshes, go on."""

import shutil
import signal
import time

import numpy as np
import pytest

from tests.system.hosts import Hosts, trace, traced
from tests.system.runs import records

_MESH = ("--config.mesh.data=2", "--config.mesh.expert=4")
_SETTINGS = (
    "--config.data.streams=4",
    "--config.training.steps=6",
    "--config.training.eval_every=0",
    "--config.training.checkpoint_every=2",
    "--config.training.keep_last=3",
)
# Nothing takes longer where the code is right; JAX's own heartbeat would take a minute.
_SOON = 45


@pytest.fixture(scope="module")
def flags(source):
    return source, *_SETTINGS


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    """One process with eight devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    Hosts(folder, 1, *flags, *_MESH).finish()
    return folder


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """Four processes, one of which is killed after step 5: their folder and how they ended."""
    folder = tmp_path_factory.mktemp("four") / "run"
    hosts = Hosts(folder, 4, *flags, *_MESH, hold=5)
    hosts.wait_for(checkpoint=4)
    hosts.processes[2].send_signal(signal.SIGKILL)
    hosts.release()
    return folder, hosts.end(_SOON)


@pytest.fixture
def left(killed, tmp_path):
    """A copy of what the killed run left."""
    folder = shutil.copytree(killed[0], tmp_path / "run")
    shutil.copy(trace(killed[0]), trace(folder))
    return folder


def test_a_lost_process_ends_the_others_with_a_line(killed):
    ends = killed[1]
    assert ends.pop(2)[0] == -signal.SIGKILL
    for code, _, err in ends:
        assert code == 1
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "another process of this run is gone" in line
        assert line.endswith("again with the same command to go on from checkpoint 4")
        assert "Traceback" not in err


def test_four_processes_have_the_losses_of_one(killed, reference):
    found = records(killed[0])
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    _assert_close(found, records(reference)[:5])


def test_two_processes_go_on_where_four_stopped(left, killed, reference, flags):
    out = Hosts(left, 2, *flags, *_MESH).finish()
    assert "resuming at step 4 of 6" in out
    assert traced(left, "restored", 4) == traced(left, "saved", 4)
    # Gloo's rings do not depend on which process holds a device.
    assert records(left)[:5] == records(killed[0])
    _assert_ends_like(left, reference)


@pytest.mark.parametrize(
    ("number", "name", "expected"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_to_one_process_stops_all_at_one_step(
    flags, reference, tmp_path, number, name, expected
):
    folder = tmp_path / "run"
    hosts = Hosts(folder, 2, *flags, *_MESH, hold=3)
    hosts.wait_for(checkpoint=2)
    hosts.processes[1].send_signal(number)
    # JAX looks for the signal every second and then tells the others.
    time.sleep(4)
    hosts.release()
    ends = hosts.end()
    assert [code for code, _, _ in ends] == [expected] * 2, ends
    assert f"stopped by {name} at step 3, which is saved" in ends[0][1]
    out = Hosts(folder, 2, *flags, *_MESH).finish()
    assert "resuming at step 3 of 6" in out
    assert traced(folder, "restored", 3) == traced(folder, "saved", 3)
    _assert_ends_like(folder, reference)


def test_one_process_goes_on_upon_other_meshes(left, reference, flags):
    meshes = {2: ("fsdp=2", "expert=2", "model=2", "data=1"), 4: ("data=1",)}
    for start, sizes in meshes.items():
        _forget_after(left, start)
        mesh = [f"--config.mesh.{size}" for size in sizes]
        out = Hosts(left, 1, *flags, *mesh, devices=8 if start == 2 else 1).finish()
        assert f"resuming at step {start} of 6" in out
        assert traced(left, "restored", start) == traced(left, "saved", start)
        _assert_ends_like(left, reference)


def test_streams_must_fall_whole_to_the_processes(source, tmp_path):
    hosts = Hosts(tmp_path / "run", 2, source, *_MESH)
    for code, out, err in hosts.end():
        assert code == 2
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "data.streams=1 cannot be split over 2 processes: set it to a multiple of 2" in line
        assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def _forget_after(folder, step):
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    (folder / "result.json").unlink(missing_ok=True)
    # Of two saves of a step, the digests of the later are wanted.
    lines = trace(folder).read_text().splitlines()
    kept = [line for line in lines if int(line.split(",")[1]) <= step]
    trace(folder).write_text("".join(f"{line}\n" for line in kept))


def _assert_ends_like(folder, reference):
    _assert_close(records(folder), records(reference))
    _assert_close(records(folder, "eval"), records(reference, "eval"))


def _assert_close(found, expected):
    """Equal but for the order in which float32 numbers are added up."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
        for name in {"grad_norm", "bits_per_byte"} & other.keys():
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4)
        for layer, like in zip(one["layers"], other["layers"], strict=True):
            np.testing.assert_allclose(layer["load"], like["load"], atol=0.01)
