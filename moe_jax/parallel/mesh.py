"""The mesh: five settings describe one ``jax.sharding.Mesh`` over all devices."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from moe_jax.errors import ConfigError
from moe_jax.ranges import LARGEST, Positive, Range, Ranged

PositiveOrRest = Annotated[int, Range(1, LARGEST, also=(-1,))]
AXES = ("data", "fsdp", "expert", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Ranged):
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
        data: Number of copies of the model, each with its share of the batch; -1 takes all
            remaining devices.
        expert: Number of shards of the experts; the batch is split over this axis too.
        model: Number of shards of every hidden layer (tensor parallelism).
        fsdp: Number of shards of parameters and optimizer state, which are gathered layer by layer
            (fully sharded data parallelism, ZeRO-3); the batch is split over this axis too.
        sequence: Number of shards of every sequence's length, for texts whose activations are too
            large for one device; attention gathers keys and values.
    """

    data: PositiveOrRest = -1
    expert: Positive = 1
    model: Positive = 1
    fsdp: Positive = 1
    sequence: Positive = 1

    def resolve(self, num_devices: int) -> MeshConfig:
        """Returns the sizes, with ``-1`` replaced by the number of remaining devices.

        Raises:
            ConfigError: If the product is not ``num_devices``.
        """
        sizes = dict(zip(AXES, self.sizes, strict=True))
        rest = math.prod(self.sizes[1:])
        data = num_devices // rest if self.data == -1 else self.data
        if data * rest != num_devices:
            product = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
            made = "" if self.data == -1 else f" = {data * rest}"
            raise ConfigError(
                f"mesh {product}{made} does not make the {num_devices} devices present: change "
                f"{', '.join(f'mesh.{axis}' for axis in AXES)}"
            )
        return dataclasses.replace(self, data=data)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the mesh axes, in the order of ``AXES``."""
        return tuple(getattr(self, axis) for axis in AXES)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over ``devices`` (default: all), with axes that GSPMD propagates."""
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices)).sizes
    # jax.make_mesh rejects an axis whose size is no product of whole sides of a TPU slice.
    arranged = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(config: MeshConfig) -> int:
    """Returns the number of shards over which the batch is split."""
    return config.data * config.fsdp * config.expert
