"""Estimates the time of collectives on the links of a machine without other traffic.

The model follows "How to Scale Your Model" (https://jax-ml.github.io/scaling-book/sharding): only
bandwidth counts, latency is zero, and each collective uses the algorithm that sends least.

* TPU: chips form a torus, and a group of devices spans some sides of it. Gathers, reductions and
  permutations use the links of all these sides at the same time, in both directions if the side is
  a ring; interleaved groups share the links. An all-to-all over a side of ``n`` chips takes
  ``n / 8`` of the time in which one link sends the bytes of a device in one direction, and twice
  that without a ring.
* GPU: a group within one domain uses all links of a GPU; a larger group uses the network adapters
  of its members in one domain.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from moe_jax.planning.collectives import Collective
from moe_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Wires:
    """The positions of a mesh's devices in a machine.

    Attributes:
        topology: The machine.
        axes: Names of the mesh axes.
        places: Position ``(*mesh shape, dimensions)`` of every device: its coordinates in the
            torus, or its number.
    """

    topology: Topology
    axes: tuple[str, ...]
    places: np.ndarray

    def seconds(self, collective: Collective) -> float:
        """Returns the seconds of all executions of a collective in a step."""
        if self.topology.chip.kind == "gpu":
            one = self._gpu_seconds(collective)
        else:
            one = self._torus_seconds(collective)
        return one * collective.times

    def _group(self, axes: tuple[str, ...]) -> np.ndarray:
        """Returns the positions ``(members, dimensions)`` in the group of the first device."""
        index = tuple(slice(None) if name in axes else 0 for name in self.axes)
        return self.places[index].reshape(-1, self.places.shape[-1])

    def _torus_seconds(self, collective: Collective) -> float:
        chip = self.topology.chip
        link = chip.link_bandwidth / chip.devices
        group = self._group(collective.axes)
        sides = [
            (len(np.unique(places)), int(np.ptp(places)) + 1, self._is_ring(side, places))
            for side, places in enumerate(group.T)
            if len(np.unique(places)) > 1
        ]
        if not sides:
            return collective.bytes / (link * chip.links)
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            worst = max(spread / (8 if ring else 4) for _, spread, ring in sides)
            return collective.bytes * max(worst, 1 / len(sides)) / link
        width = sum((2 if ring else 1) * members / spread for members, spread, ring in sides)
        return collective.bytes / (link * width)

    def _is_ring(self, side: int, places: np.ndarray) -> bool:
        """Returns True if the side closes to a ring.

        A whole side closes if it has 4, 8, 12, ... chips in a 3D torus, or 16 chips in a 2D torus.
        """
        shape = self.topology.shape
        length = shape[side] if side < len(shape) else 1
        closes = length % 4 == 0 if self.topology.chip.links == 6 else length == 16
        return closes and int(np.ptp(places)) + 1 > length // 2

    def _gpu_seconds(self, collective: Collective) -> float:
        chip = self.topology.chip
        group = self._group(collective.axes)[:, 0]
        inside = int((group // chip.domain == group[0] // chip.domain).sum())
        within = collective.bytes / (chip.links * chip.link_bandwidth)
        if inside == len(group):
            return within
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            share = (len(group) - inside) / (len(group) - 1)
            return max(within, collective.bytes * share / chip.network)
        return max(within, collective.bytes / (chip.network * inside))


def wires(topology: Topology, sizes: dict[str, int], devices: np.ndarray | None = None) -> Wires:
    """Returns the positions of a mesh's devices in a machine.

    Args:
        topology: The machine.
        sizes: Sizes of the mesh axes by name, in order.
        devices: Devices ``(*sizes,)`` of the mesh; ``None`` numbers them in order, so that on a
            TPU the last axis lies along the last side.
    """
    shape = tuple(sizes.values())
    if devices is not None and hasattr(devices.flat[0], "coords"):
        places = np.array([device.coords for device in devices.flat])
    elif topology.chip.kind == "tpu":
        chips = np.arange(math.prod(shape)) // topology.chip.devices
        places = np.stack(np.unravel_index(chips, topology.shape), axis=-1)
    else:
        places = np.arange(math.prod(shape))[:, None]
    return Wires(topology, tuple(sizes), _shaped(places, shape))


def _shaped(places: np.ndarray, shape: tuple[int, ...]) -> Any:
    return places.reshape(*shape, places.shape[-1])
