import jax
import pytest
from jax.sharding import AxisType

from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.parallel.mesh import batch_shards


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(-1, 4), (2, 1, 4, 1, 1)),
        (MeshConfig(-1, 2, 2), (2, 1, 2, 1, 2)),
        (MeshConfig(1, 8), (1, 1, 8, 1, 1)),
        (MeshConfig(-1, 8), (1, 1, 8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1, 1, 1)),
        (MeshConfig(1, 2, 2, fsdp=2), (1, 2, 2, 1, 2)),
        (MeshConfig(sequence=4), (2, 1, 1, 4, 1)),
    ],
)
def test_minus_one_takes_what_is_left(config, sizes):
    assert config.resolve(8).sizes == sizes
    assert config.resolve(8).resolve(8).sizes == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(3, 2),
            "data=3 x fsdp=1 x expert=2 x sequence=1 x model=1 = 6 does not make the 8 devices",
        ),
        (
            MeshConfig(-1, 3),
            "data=-1 x fsdp=1 x expert=3 x sequence=1 x model=1 does not make the 8 devices",
        ),
        (MeshConfig(-1, 16), "does not make the 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        config.resolve(8)


@pytest.mark.parametrize(
    ("axis", "size"), [("data", 0), ("data", -2), ("expert", -1), ("model", 0), ("fsdp", -1)]
)
def test_an_axis_has_at_least_one_device(axis, size):
    with pytest.raises(ConfigError, match=f"MeshConfig.{axis}={size} must be at least 1"):
        MeshConfig(**{axis: size})


def test_the_mesh_has_five_automatic_axes():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert mesh.axis_names == ("data", "fsdp", "expert", "sequence", "model")
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert mesh.devices.shape == (2, 1, 2, 1, 2)


def test_a_mesh_over_some_devices():
    mesh = make_mesh(MeshConfig(-1, 2), jax.devices()[:4])
    assert mesh.devices.shape == (2, 1, 2, 1, 1)
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


def test_batch_shards():
    assert batch_shards(MeshConfig(2, 2, 2)) == 4
    assert batch_shards(MeshConfig(1, 2, 2, fsdp=2)) == 4
    assert batch_shards(MeshConfig(2, 2, sequence=2)) == 4  # each row on both
