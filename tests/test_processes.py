"""Which rows fall to whom, on simulated devices that are said to be of several processes."""

import jax
import numpy as np
import pytest

from moe_jax import processes
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.parallel.rows import fewest_parts, rows_by_process


def _rows(sizes, rows, process_of):
    return rows_by_process(make_mesh(MeshConfig(**sizes)), rows, process_of)


def _of_two(device):
    return device.id // 4


def test_neighbouring_devices_hold_neighbouring_rows():
    owned = _rows({"data": 2, "expert": 4}, 16, _of_two)
    assert owned == {0: tuple(range(8)), 1: tuple(range(8, 16))}
    assert fewest_parts(owned, 16) == 2


def test_rows_follow_the_mesh_and_not_the_number_of_a_process():
    """As where a mesh follows the wiring of the chips."""
    owned = _rows({"data": 8}, 8, lambda device: (device.id // 2) % 2)
    assert owned == {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}
    assert fewest_parts(owned, 8) == 4
    owned = _rows({"data": 8}, 16, lambda device: device.id % 2)
    assert owned[1] == (2, 3, 6, 7, 10, 11, 14, 15)
    assert fewest_parts(owned, 16) == 8


def test_processes_that_split_the_model_hold_the_same_rows():
    owned = _rows({"data": 1, "model": 8}, 4, _of_two)
    assert owned == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
    assert fewest_parts(owned, 4) == 1
    owned = _rows({"data": 2, "model": 4}, 4, lambda device: device.id // 2)
    assert owned == {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    assert fewest_parts(owned, 4) == 2


def test_one_process_decides_for_itself():
    assert processes.agreed(lambda: 7) == 7
    seen = []
    processes.first(lambda: seen.append(1))
    assert seen == [1] and processes.is_first()


def test_errors_of_a_single_process_pass():
    with (
        pytest.raises(jax.errors.JaxRuntimeError),
        processes.together(lambda: "never said"),
    ):
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")


def test_fetched_arrays_are_numpys():
    x = jax.device_put(np.arange(3), jax.devices()[0])
    fetched = processes.fetch({"x": x})
    assert type(fetched["x"]) is np.ndarray


def test_joining_alone_names_the_flags(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match="pass --coordinator=HOST:PORT, --num_processes"):
        processes.join(processes.Hosts())


def test_work_of_one_process_is_refused_to_several(monkeypatch):
    processes.check_one_process("a change of a model runs")
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    with pytest.raises(
        ConfigError, match="a change of a model runs in one process, and here are 2"
    ):
        processes.check_one_process("a change of a model runs")
