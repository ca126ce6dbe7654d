"""Checkpoints on real files: damaged, killed half-way, refused by the disk, moved to a mesh."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.training import checkpoint, integrity
from moe_jax.training.checkpoint import Checkpoints

# What Orbax writes after the record is sealed, and no content depends on.
UNSEALED = {"commit_success.txt"}


def make_state(scale=1.0, sharding=None):
    key = jax.random.key(0)
    state = {
        "w": scale * jax.random.normal(key, (16, 32)),
        "half": (scale * jax.random.normal(key, (8, 8))).astype(jnp.bfloat16),
        "step": jnp.int32(7),
        "table": jnp.arange(64, dtype=jnp.int32).reshape(8, 8),
        "raw_key": jax.random.key_data(key).astype(jnp.uint32),
    }
    if sharding is not None:
        state = {
            name: jax.device_put(x, sharding if x.ndim == 2 else NamedSharding(sharding.mesh, P()))
            for name, x in state.items()
        }
    return state


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert bits(x) == bits(y)


def steps(directory):
    return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdigit())


def save_two(directory):
    """Writes steps 10 and 20 and returns their states."""
    old, new = make_state(1.0), make_state(2.0)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, old, {"at": 10})
        checkpoints.save(20, new, {"at": 20})
    return old, new


def all_files(step_directory):
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


# ---------------------------------------------------------------- round trips


def test_round_trip_with_data_state(tmp_path):
    state = make_state()
    data_state = {
        "shards": [{"next": 3, "epoch": 2**40}, None],
        "blob": b"\x00\xff",
        "name": "mix",
        "n": np.int64(4),
        "w": 0.1,
        "empty": {},
    }
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(like(state)) is None
        checkpoints.save(5, state, data_state)
        step, restored, position = checkpoints.restore(like(state))
        assert checkpoints.latest_step() == step == 5
    assert position == {**data_state, "n": 4}
    assert type(position["n"]) is int
    assert_same(restored, state)
    assert checkpoints.skipped == ()


def test_a_step_is_restored_by_its_number(two_checkpoints):
    directory, old, new = two_checkpoints
    with Checkpoints(directory, read_only=True) as checkpoints:
        for step, saved in ((10, old), (20, new), (None, new)):
            found, restored, _ = checkpoints.restore(like(new), step=step)
            assert found == (step or 20)
            assert_same(restored, saved)
        with pytest.raises(CheckpointError, match="no checkpoint of step 15; it has 10, 20"):
            checkpoints.restore(like(new), step=15)


def test_a_damaged_step_is_not_replaced_by_another(tmp_path):
    directory = tmp_path
    _, new = save_two(directory)
    name = next(name for name in names_of_a_checkpoint(directory) if name.startswith("state"))
    flip(directory / "20" / name)
    with (
        Checkpoints(directory, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="is damaged .*choose another step"),
    ):
        checkpoints.restore(like(new), step=20)


def test_optimizer_state_lists_and_typed_keys(tmp_path):
    params = {"layers": [{"w": jnp.ones((4, 4))}, {"w": jnp.zeros((4, 2))}]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "params": params,
        "opt": optimizer.init(params),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 8),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(like(state))
    assert_same(restored, state)


@pytest.mark.parametrize("source", [None, (4, 2)])
def test_restores_on_another_mesh(tmp_path, source):
    devices = np.array(jax.devices())
    sharding = source and NamedSharding(Mesh(devices.reshape(source), ("a", "b")), P("a", "b"))
    state = make_state(sharding=sharding)
    target_mesh = Mesh(devices.reshape(2, 4), ("data", "expert"))
    target = make_state(0.0, NamedSharding(target_mesh, P("expert", "data")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(like(target))
    assert_same(restored, state)
    for name, array in restored.items():
        assert array.sharding == target[name].sharding
    assert len(restored["w"].sharding.device_set) == 8


def test_state_may_be_donated_after_save(tmp_path):
    state = {"w": jnp.arange(500_000, dtype=jnp.float32)}
    expected = np.asarray(state["w"]).copy()
    abstract = like(state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = update(state)
        _, restored, _ = checkpoints.restore(abstract)
    np.testing.assert_array_equal(restored["w"], expected)


def test_keeps_the_last_and_every_kth(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpoints(tmp_path, keep_last=2, keep_every=4, asynchronous=False) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state, {})
    assert steps(tmp_path) == [4, 6, 7]


def test_a_pinned_checkpoint_is_kept_until_another_is_pinned(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpoints(tmp_path, keep_last=1, asynchronous=False) as checkpoints:
        for step in range(1, 5):
            checkpoints.pin(min(step, 2))
            checkpoints.save(step, state, {})
        assert steps(tmp_path) == [2, 4]
        checkpoints.pin(5)
        checkpoints.save(5, state, {})
        checkpoints.save(6, state, {})
        assert steps(tmp_path) == [5, 6]
    with Checkpoints(tmp_path, keep_last=1, asynchronous=False) as checkpoints:
        checkpoints.pin(5)
        checkpoints.save(7, state, {})
    assert steps(tmp_path) == [5, 7]


@pytest.mark.parametrize("bad", [(1, 2), {3: "x"}, {"x": object()}, {"x": {1}}])
def test_refuses_a_data_state_it_would_change(tmp_path, bad):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="data_state"):
        checkpoints.save(1, {"w": jnp.ones(2)}, {"ok": 1, "bad": {"deep": bad, 3: 1}})


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return directory, *save_two(directory)


def names_of_a_checkpoint(directory):
    return [str(path.relative_to(directory / "20")) for path in all_files(directory / "20")]


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_each_damaged_file_is_detected(two_checkpoints, damage):
    directory, old, new = two_checkpoints
    names = names_of_a_checkpoint(directory)
    assert len(names) > 8 and "data_state/process_0.json" in names
    for name in names:
        path = directory / "20" / name
        original = path.read_bytes()
        damage(path)
        try:
            checkpoints = Checkpoints(directory)
            step, restored, position = checkpoints.restore(like(old))
        finally:
            path.write_bytes(original)
        if name in UNSEALED:
            assert step == 20 and checkpoints.skipped == (), name
            assert_same(restored, new)
            continue
        if name == "_CHECKPOINT_METADATA" and step == 20:
            # Of this file only the form is checked: Orbax's own notes, which no value depends on.
            assert_same(restored, new)
            continue
        assert step == 10 and position == {"at": 10}, name
        assert_same(restored, old)
        (skipped,) = checkpoints.skipped
        # A flip in the record itself may strike a file's name there.
        named = name in skipped.reason or name == integrity.INTEGRITY_FILE
        assert skipped.step == 20 and named, skipped.reason


def test_damage_is_reported_in_the_log(tmp_path, caplog):
    old, _ = save_two(tmp_path)
    flip(max(all_files(tmp_path / "20" / "state"), key=lambda path: path.stat().st_size))
    Checkpoints(tmp_path).restore(like(old))
    assert any("skipped checkpoint step 20" in record.getMessage() for record in caplog.records)


def test_every_byte_of_the_integrity_record_counts(two_checkpoints):
    path = two_checkpoints[0] / "20" / integrity.INTEGRITY_FILE
    original = path.read_bytes()
    try:
        for position in range(0, len(original), 7):
            content = bytearray(original)
            content[position] ^= 0x20
            path.write_bytes(bytes(content))
            assert checkpoint.damage(path.parent) is not None, position
    finally:
        path.write_bytes(original)
    assert checkpoint.damage(path.parent) is None


def test_all_damaged_is_one_error_never_a_fresh_start(tmp_path, caplog):
    old, _ = save_two(tmp_path)
    for step in (10, 20):
        flip(tmp_path / str(step) / "state" / "_METADATA")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact: 2 are damaged") as e:
        checkpoints.restore(like(old))
    assert "\n" not in str(e.value)
    # The error names both, so no warning comes before it.
    assert re.search(r"\(step 20: .*_METADATA.*; step 10: .*_METADATA.*\)", str(e.value))
    assert "skipped checkpoint" not in caplog.text
    assert [skipped.step for skipped in checkpoints.skipped] == [20, 10]


def test_a_reader_changes_nothing(tmp_path):
    old, _ = save_two(tmp_path)
    flip(tmp_path / "20" / "state" / "_METADATA")
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(like(old))[0] == 10
    assert [skipped.step for skipped in checkpoints.skipped] == [30, 20]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("restore_first", [True, False])
def test_a_damaged_step_is_moved_aside_and_saved_again(tmp_path, restore_first):
    old, new = save_two(tmp_path)
    flip(tmp_path / "20" / "state" / "_METADATA")
    with Checkpoints(tmp_path) as checkpoints:
        if restore_first:
            assert checkpoints.restore(like(old))[0] == 10
            checkpoints.save(15, old, {})
            assert steps(tmp_path)[:1] == [10] and 20 not in steps(tmp_path)
        checkpoints.save(20, new, {"again": True})
        step, restored, position = checkpoints.restore(like(old))
    assert (step, position) == (20, {"again": True})
    assert_same(restored, new)
    assert (tmp_path / "corrupt-20-1" / "state").is_dir()


def test_an_intact_step_is_not_overwritten(tmp_path):
    old, new = save_two(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="intact checkpoint of step 20 exists"):
            checkpoints.save(20, old, {})
        assert_same(checkpoints.restore(like(old))[1], new)


def test_an_older_damaged_step_does_not_stop_a_writer(tmp_path):
    old, _ = save_two(tmp_path)
    for path in all_files(tmp_path / "10"):
        path.unlink()
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.restore(like(old))[0] == 20
        checkpoints.save(30, old, {})
        assert checkpoints.restore(like(old))[0] == 30
    assert steps(tmp_path) == [30]


# ---------------------------------------------------------------- another model


def change_shape(state):
    return {**state, "w": jnp.ones((16, 64))}


def change_dtype(state):
    return {**state, "w": state["w"].astype(jnp.bfloat16)}


def add_parameter(state):
    return {**state, "extra": jnp.ones(3)}


def drop_parameter(state):
    return {name: x for name, x in state.items() if name != "w"}


@pytest.mark.parametrize(
    "change, message",
    [
        (change_shape, r"w is float32\[16,32\] in the checkpoint and float32\[16,64\]"),
        (change_dtype, r"w is float32\[16,32\] .* and bfloat16\[16,32\] in the model"),
        (add_parameter, r"extra is absent in the checkpoint and float32\[3\] in the model"),
        (drop_parameter, r"w is float32\[16,32\] in the checkpoint and absent in the model"),
    ],
)
def test_another_model_is_an_error_not_damage(two_checkpoints, change, message):
    directory, old, _ = two_checkpoints
    checkpoints = Checkpoints(directory)
    with pytest.raises(CheckpointError, match=message) as e:
        checkpoints.restore(like(change(old)))
    assert "\n" not in str(e.value)
    assert checkpoints.skipped == ()


# ---------------------------------------------------------------- failing saves


def wait_for_check(checkpoints):
    """Calls check() as a training loop does, until it raises."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.01)
    pytest.fail("the failed save was never reported")


def make_disk_refuse(monkeypatch):
    def refuse(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_integrity", refuse)


def test_check_raises_a_failed_save_once_and_training_goes_on(tmp_path, monkeypatch):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            make_disk_refuse(patch)
            checkpoints.save(2, state, {})
            with pytest.raises(CheckpointError, match="step 2 was not saved.*No space left") as e:
                wait_for_check(checkpoints)
            assert "\n" not in str(e.value)
        checkpoints.check()
        assert checkpoints.restore(like(state))[0] == 1
        checkpoints.save(3, state, {})
        assert checkpoints.restore(like(state))[0] == 3
    assert steps(tmp_path) == [1, 3]
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("how", ["save", "wait", "close", "with"])
def test_a_failed_save_is_raised_by(tmp_path, monkeypatch, how):
    state = {"w": jnp.ones(4)}
    make_disk_refuse(monkeypatch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        if how == "save":
            checkpoints.save(2, state, {})
        elif how == "with":
            with checkpoints:
                pass
        else:
            getattr(checkpoints, how)()
    checkpoints.close()


def test_a_failed_save_does_not_hide_the_error_of_the_block(tmp_path, monkeypatch):
    make_disk_refuse(monkeypatch)
    with pytest.raises(KeyError, match="mine"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(4)}, {})
        raise KeyError("mine")


def test_a_write_that_the_system_refuses_is_raised(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (400, 400))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoints.save(1, state, {})
            with pytest.raises(CheckpointError, match="step 1 was not saved"):
                wait_for_check(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.restore(like(state)) is None
        checkpoints.save(1, state, {})
        assert_same(checkpoints.restore(like(state))[1], state)


def test_a_directory_replaced_by_a_file_is_raised(tmp_path):
    state = {"w": jnp.ones(4)}
    directory = tmp_path / "run"
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    shutil.rmtree(directory)
    directory.write_text("in the way")
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        checkpoints.save(2, state, {})
        wait_for_check(checkpoints)
    checkpoints.close()


def test_check_does_not_block(tmp_path, monkeypatch):
    go_on = threading.Event()
    seal = checkpoint.write_integrity
    monkeypatch.setattr(checkpoint, "write_integrity", lambda d: (go_on.wait(20), seal(d)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(4)}, {})
        start = time.monotonic()
        for _ in range(1000):
            checkpoints.check()
        assert time.monotonic() - start < 0.5
        assert steps(tmp_path) == []
        go_on.set()
    assert steps(tmp_path) == [1]


def test_unusable_directory_or_settings(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="cannot write checkpoints to .*; choose") as e:
            Checkpoints(directory)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ConfigError, match="keep_every is 0"):
        Checkpoints(tmp_path, keep_every=0)


def test_full_disk_at_construction(tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.epath.Path("/").__class__, "write_bytes", refuse)
    with pytest.raises(CheckpointError, match="No space left on device.*free space"):
        Checkpoints(tmp_path)


# ---------------------------------------------------------------- kill -9

KILLED = """
import sys
import jax, jax.numpy as jnp
from moe_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_last=2)
for step in range(1, 10_000):
    state = {"w": jnp.full((600, 600), step, jnp.float32), "step": jnp.int32(step)}
    checkpoints.save(step, state, {"at": step})
    print(step, flush=True)
"""


def assert_restorable(directory, known):
    """Restores what a killed run left, checks it, and saves on from there."""
    abstract = like({"w": jnp.zeros((600, 600)), "step": jnp.int32(0)})
    with Checkpoints(directory, keep_last=2) as checkpoints:
        step, state, position = checkpoints.restore(abstract)
        assert step >= known
        assert position == {"at": step} and int(state["step"]) == step
        assert (np.asarray(state["w"]) == step).all()
        checkpoints.save(step + 1, state, {"at": step + 1})
        assert checkpoints.restore(abstract)[0] == step + 1
    assert not list(directory.glob("*tmp*"))
    return step


def test_kill_at_any_moment_leaves_a_restorable_directory(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    # Returning from save(n) means that n - 1 is committed; the delays hit many points of save n.
    for delay in (0.0, 0.004, 0.009, 0.015, 0.022, 0.03):
        shutil.rmtree(tmp_path)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) == 3:
                    break
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        assert_restorable(tmp_path, known=2)


KILLED_AT = """
import os, signal, sys
import jax, jax.numpy as jnp
from moe_jax.training import checkpoint
from orbax.checkpoint.path import atomicity

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(sys.argv[1], keep_last=2)
def save(step):
    state = {"w": jnp.full((600, 600), step, jnp.float32), "step": jnp.int32(step)}
    checkpoints.save(step, state, {"at": step})
    checkpoints.wait()

save(1)
save(2)
point = sys.argv[2]
if point == "before the record":
    checkpoint.write_integrity = die
elif point == "in the record":
    checkpoint.write_integrity = lambda d: ((d / "integrity.json").write_text("{"), die())
elif point == "before the rename":
    seal = checkpoint.write_integrity
    checkpoint.write_integrity = lambda d: (seal(d), die())
elif point == "while old ones are removed":
    import pathlib, shutil
    def half(path, *args, **kwargs):
        next(p for p in pathlib.Path(path).rglob("_METADATA")).unlink()
        die()
    shutil.rmtree = half
save(3)
"""


@pytest.mark.parametrize(
    "point",
    ["before the record", "in the record", "before the rename", "while old ones are removed"],
)
def test_kill_at_a_chosen_point(tmp_path, point):
    command = [sys.executable, "-c", KILLED_AT, str(tmp_path), point]
    assert subprocess.run(command, timeout=50).returncode == -signal.SIGKILL
    step = assert_restorable(tmp_path, known=2)
    assert step == (3 if "removed" in point else 2)
    assert steps(tmp_path) == [step, step + 1]


# ---------------------------------------------------------------- several processes


def test_input_positions_of_several_processes_are_united(tmp_path):
    old, _ = save_two(tmp_path)
    positions = tmp_path / "20" / "data_state"
    (positions / "process_1.json").write_text('{"at":20,"streams":{"1":{"n":2}}}')
    (positions / "process_2.json").write_text('{"at":20,"streams":{"2":{"n":3}}}')
    checkpoint.write_integrity(tmp_path / "20")
    united = {"at": 20, "streams": {"1": {"n": 2}, "2": {"n": 3}}}
    assert Checkpoints(tmp_path).restore(like(old))[2] == united
    (positions / "process_3.json").write_text('{"streams":{"2":{"n":4}}}')
    checkpoint.write_integrity(tmp_path / "20")
    with pytest.raises(CheckpointError, match="do not fit together: /streams/2/n is 3 and 4"):
        Checkpoints(tmp_path).restore(like(old))


TWO_PROCESSES = """
import sys
import jax
directory, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, index)
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pathlib import Path
from moe_jax.errors import CheckpointError
from moe_jax.training.checkpoint import Checkpoints

sharding = NamedSharding(Mesh(np.array(jax.devices()), ("a",)), P("a"))
full = np.arange(64, dtype=np.float32).reshape(16, 4)
state = {"w": jax.make_array_from_callback(full.shape, sharding, lambda i: full[i])}
like = {"w": jax.ShapeDtypeStruct(full.shape, full.dtype, sharding=sharding)}

def assert_restores(step, position):
    found, restored, data = checkpoints.restore(like)
    both = {str(host): position + host for host in range(2)}
    assert (found, data) == (step, {"host": both}), (found, data)
    for shard in restored["w"].addressable_shards:
        assert (np.asarray(shard.data) == full[shard.index]).all()

with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state, {"host": {str(index): step + index}})
    assert_restores(2, 2)
    if index == 0:
        path = next(Path(directory, "2", "state", "ocdbt.process_1", "d").iterdir())
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(bytes(content))
    multihost_utils.sync_global_devices("damaged")
    assert_restores(1, 1)
    checkpoints.save(2, state, {"host": {str(index): 22 + index}})
    assert_restores(2, 22)
    try:
        checkpoints.save(2, state, {})
    except CheckpointError:
        print("refused", flush=True)
"""


def test_two_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for run in runs:
            output, _ = run.communicate(timeout=100)
            assert run.returncode == 0 and "refused" in output, output
    finally:
        for run in runs:
            run.kill()
    assert (tmp_path / "corrupt-2-1").is_dir()


# ---------------------------------------------------------------- cost


def test_save_blocks_briefly(tmp_path):
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (1250, 1000)) for i in range(4)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        start = time.monotonic()
        checkpoints.save(2, state, {})
        blocked = time.monotonic() - start
        checkpoints.wait()
        written = time.monotonic() - start
        start = time.monotonic()
        checkpoints.restore(like(state))
        restored = time.monotonic() - start
    print(f"20 MB: save blocks {blocked:.3f} s, written {written:.3f} s, restored {restored:.3f} s")
    assert blocked < 2 and restored < 5
